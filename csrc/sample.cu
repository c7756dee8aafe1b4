// Launcher of sample_logp_entropy.
#include "sample.cuh"
#include "torch.cuh"

namespace autotool {

void sample(
    const Tensor& logits, double temperature, const std::optional<Tensor>& row_temperature, const Tensor& seed,
    const Tensor& offset, Tensor token, Tensor logp, Tensor entropy, Tensor workspace) {
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  if (rows == 0) return;
  const int device = logits.get_device_index(), parts = sample_parts(vocab);
  STD_TORCH_CHECK(vocab < INT32_MAX, "logits must have fewer than 2^31 columns");
  STD_TORCH_CHECK(
      workspace.numel() * 4 >= rows * kMaxParts * static_cast<int64_t>(sizeof(Partial)), "workspace is too small");
  const torch::stable::accelerator::DeviceGuard guard(device);
  const bool cluster = parts > 1 && has_clusters(device);
  const Sampling p = {
      rows, vocab, logits.stride(0), logits.stride(1), make_scale(temperature, row_temperature),
      static_cast<const int64_t*>(seed.const_data_ptr()), static_cast<const int64_t*>(offset.const_data_ptr()),
      seed.stride(0), offset.stride(0), data<int64_t>(token), data<float>(logp), data<float>(entropy),
      data<Partial>(workspace), is_wide(logits), cluster};
  for_float_type(logits.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* const start = static_cast<const T*>(logits.const_data_ptr());
    launch(
        autotool::sample<T>, rows * parts, kThreads, kSampleShared, device, cluster ? parts : 0, false, p, start,
        parts);
    if (parts > 1 && !cluster)
      launch(
          sample_merge<T>, (rows + kMergeThreads - 1) / kMergeThreads, kMergeThreads, 0, device, 0, false, p, start,
          parts);
  });
}

}  // namespace autotool
