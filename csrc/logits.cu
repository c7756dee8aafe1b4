// logits_logp_entropy: forward in one read of the logits, and its backward. One block per row.
#include "common.cuh"

namespace autotool {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads) forward_kernel(
    const T* logits, int64_t stride_n, int64_t stride_v, int64_t vocab, const int64_t* target, int64_t ignore_index,
    Scale temperature, float* logp, float* entropy, float* row_max, float* log_sum) {
  const int64_t row = blockIdx.x;
  const int64_t y = target[row];
  if (y == ignore_index) {
    if (threadIdx.x == 0) logp[row] = entropy[row] = row_max[row] = log_sum[row] = 0.f;
    return;
  }
  const T* start = logits + row * stride_n;
  const float t = temperature.at(row);
  Stats mine;
  for (int64_t j = threadIdx.x; j < vocab; j += kThreads) mine.add(to_float(start[j * stride_v]) / t);
  const Stats all = block_merge(mine);
  if (threadIdx.x != 0) return;
  const bool valid = y >= 0 && y < vocab;
  const float label = valid ? to_float(start[y * stride_v]) / t : __int_as_float(0x7fc00000);
  const float log_s = logf(all.s), lp = (label - all.m) - log_s, h = log_s - all.u / all.s;
  logp[row] = lp > 0.f ? 0.f : lp;  // comparisons keep NaN, fminf would not
  entropy[row] = h < 0.f ? 0.f : h;
  row_max[row] = all.m;
  log_sum[row] = log_s;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) backward_kernel(
    Scale grad_logp, Scale grad_entropy, const T* logits, int64_t stride_n, int64_t stride_v, int64_t vocab,
    const int64_t* target, int64_t ignore_index, const float* entropy, const float* row_max, const float* log_sum,
    Scale temperature, T* out) {
  const int64_t row = blockIdx.x;
  const int64_t y = target[row];
  const float g = y == ignore_index ? 0.f : grad_logp.at(row), h = y == ignore_index ? 0.f : grad_entropy.at(row);
  T* dz = out + row * vocab;
  if (g == 0.f && h == 0.f) {
    for (int64_t j = threadIdx.x; j < vocab; j += kThreads) dz[j] = from_float<T>(0.f);
    return;
  }
  const T* start = logits + row * stride_n;
  const float t = temperature.at(row), m = row_max[row], log_s = log_sum[row], mean = entropy[row];
  for (int64_t j = threadIdx.x; j < vocab; j += kThreads) {
    const float log_p = (to_float(start[j * stride_v]) / t - m) - log_s;
    const float p = expf(log_p);
    const float spread = p > 0.f || p != p ? p * (g + h * (log_p + mean)) : 0.f;
    dz[j] = from_float<T>(((j == y ? g : 0.f) - spread) / t);
  }
}

}  // namespace

void logits_forward(
    const Tensor& logits, const Tensor& target, double temperature, const std::optional<Tensor>& row_temperature,
    int64_t ignore_index, Tensor logp, Tensor entropy, Tensor row_max, Tensor log_sum) {
  if (logits.size(0) == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  for_float_type(logits.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    forward_kernel<T><<<static_cast<unsigned>(logits.size(0)), kThreads, 0, current_stream(logits.get_device_index())>>>(
        static_cast<const T*>(logits.const_data_ptr()), logits.stride(0), logits.stride(1), logits.size(1),
        static_cast<const int64_t*>(target.const_data_ptr()), ignore_index,
        make_scale(temperature, row_temperature), static_cast<float*>(logp.mutable_data_ptr()),
        static_cast<float*>(entropy.mutable_data_ptr()), static_cast<float*>(row_max.mutable_data_ptr()),
        static_cast<float*>(log_sum.mutable_data_ptr()));
  });
  check_launch();
}

void logits_backward(
    const std::optional<Tensor>& grad_logp, const std::optional<Tensor>& grad_entropy, const Tensor& logits,
    const Tensor& target, const Tensor& entropy, const Tensor& row_max, const Tensor& log_sum, double temperature,
    const std::optional<Tensor>& row_temperature, int64_t ignore_index, Tensor out) {
  if (logits.size(0) == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  for_float_type(logits.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    backward_kernel<T><<<static_cast<unsigned>(logits.size(0)), kThreads, 0, current_stream(logits.get_device_index())>>>(
        make_gradient(grad_logp), make_gradient(grad_entropy), static_cast<const T*>(logits.const_data_ptr()),
        logits.stride(0), logits.stride(1), logits.size(1), static_cast<const int64_t*>(target.const_data_ptr()),
        ignore_index, static_cast<const float*>(entropy.const_data_ptr()),
        static_cast<const float*>(row_max.const_data_ptr()), static_cast<const float*>(log_sum.const_data_ptr()),
        make_scale(temperature, row_temperature), static_cast<T*>(out.mutable_data_ptr()));
  });
  check_launch();
}

}  // namespace autotool
