// Launchers of logits_logp_entropy: forward and backward.
#include <algorithm>
#include <array>
#include <atomic>

#include "logits.cuh"
#include "torch.cuh"

namespace autotool {
namespace {

// Clusters of `blocks` that the device holds at once; 0 if the ring does not fit. Asked once per device.
template <typename T>
int resident_clusters(int device, int blocks) {
  static std::array<std::array<std::atomic<int>, kMaxCluster + 1>, 64> known = {};
  STD_TORCH_CHECK(device < 64, "device index ", device);
  std::atomic<int>& cached = known[device][blocks];
  if (cached == 0) {
    int found = 0;
    if (has_clusters(device) &&
        attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) >= static_cast<int>(sizeof(RingShared))) {
      check(cudaFuncSetAttribute(
          ring_forward<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(sizeof(RingShared))));
      cudaLaunchAttribute cluster = {};
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim.x = static_cast<unsigned>(blocks);
      cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(static_cast<unsigned>(blocks));
      config.blockDim = dim3(kThreads);
      config.dynamicSmemBytes = sizeof(RingShared);
      config.attrs = &cluster;
      config.numAttrs = 1;
      check(cudaOccupancyMaxActiveClusters(&found, ring_forward<T>, &config));
    }
    cached = found + 1;
  }
  return cached - 1;
}

// Blocks that share a row, by V and the type alone; 0: too long for the largest cluster.
template <typename T>
int ring_blocks(int64_t vocab) {
  int blocks = 1;
  while (blocks <= kMaxCluster &&
         ring_part(vocab, blocks, kVector<T>) * static_cast<int64_t>(sizeof(T)) > kPartChunks * kChunkBytes)
    blocks *= 2;
  return blocks <= kMaxCluster ? blocks : 0;
}

}  // namespace

void logits_forward(
    const Tensor& logits, const Tensor& target, double temperature, const std::optional<Tensor>& row_temperature,
    int64_t ignore_index, Tensor logp, Tensor entropy, Tensor row_max, Tensor log_sum) {
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  if (rows == 0) return;
  const int device = logits.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  for_float_type(logits.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const LogitsForward<T> p = {
        static_cast<const T*>(logits.const_data_ptr()), rows, vocab, logits.stride(0), logits.stride(1),
        make_integers(target, "target"), ignore_index, make_scale(temperature, row_temperature),
        {data<float>(logp), data<float>(entropy), data<float>(row_max), data<float>(log_sum)}};
    const int blocks = fits_ring(p.logits, vocab, p.stride_n, p.stride_v) ? ring_blocks<T>(vocab) : 0;
    const int clusters = blocks > 0 ? resident_clusters<T>(device, blocks) : 0;
    if (clusters > 0)
      launch(
          ring_forward<T>, std::min<int64_t>(clusters, rows) * blocks, kThreads, sizeof(RingShared), device, blocks,
          false, p, ring_part(vocab, blocks, kVector<T>));
    else
      launch(
          is_wide(logits) ? stream_forward<T, true> : stream_forward<T, false>, rows, kThreads,
          kWarps * sizeof(Stats), device, 0, false, p);
  });
}

void logits_backward(
    const std::optional<Tensor>& grad_logp, const std::optional<Tensor>& grad_entropy, const Tensor& logits,
    const Tensor& target, const Tensor& entropy, const Tensor& row_max, const Tensor& log_sum, double temperature,
    const std::optional<Tensor>& row_temperature, int64_t ignore_index, Tensor out) {
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  if (rows == 0) return;
  const int device = logits.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  for_float_type(logits.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const LogitsBackward<T> p = {
        static_cast<const T*>(logits.const_data_ptr()), rows, vocab, logits.stride(0), logits.stride(1),
        make_integers(target, "target"), ignore_index, make_scale(temperature, row_temperature),
        make_scale(0.0, grad_logp), make_scale(0.0, grad_entropy),
        static_cast<const float*>(entropy.const_data_ptr()), static_cast<const float*>(row_max.const_data_ptr()),
        static_cast<const float*>(log_sum.const_data_ptr()), data<T>(out), out.stride(0), out.stride(1)};
    launch(
        is_wide(logits) && is_wide(out) ? backward<T, true> : backward<T, false>, rows * backward_blocks(vocab),
        kBackwardThreads, 0, device, 0, false, p);
  });
}

}  // namespace autotool
