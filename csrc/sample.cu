// sample_logp_entropy: token, log-probability and entropy in one read of the logits. One block per row.
//
// Column j draws word j % 4 of the Philox block with counter (j / 4, 0, offset) and key `seed`; the token is
// argmax z - log(-log(1 - u)), as in autotool_kernels/philox.py.
#include "common.cuh"

namespace autotool {
namespace {

struct Best {
  float value = kNegInf;
  int64_t column = INT64_MAX;
  // The larger value, the smaller column of equal ones; NaN never wins.
  __device__ void add(float v, int64_t j) {
    if (v > value || (v == value && j < column)) value = v, column = j;
  }
};

__device__ inline float gumbel(uint32_t bits) {
  // __float_as_int(1 - 2^-24) is 0x3f7fffff: u = 1 would have no logarithm.
  const float u = fminf((static_cast<float>(bits) + 0.5f) * 0x1p-32f, __int_as_float(0x3f7fffff));
  return -logf(-log1pf(-u));
}

template <typename T>
__global__ void __launch_bounds__(kThreads) sample_kernel(
    const T* logits, int64_t stride_n, int64_t stride_v, int64_t vocab, Scale temperature, const int64_t* seed,
    const int64_t* offset, int64_t* token, float* logp, float* entropy) {
  __shared__ Best parts[kWarps];
  const int64_t row = blockIdx.x;
  const T* start = logits + row * stride_n;
  const float given = temperature.at(row), t = given == 0.f ? 1.f : given;
  const auto key = static_cast<uint64_t>(seed[row]), step = static_cast<uint64_t>(offset[row]);
  const uint2 k = make_uint2(static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
  Stats mine;
  Best best;
  for (int64_t block = threadIdx.x; block * 4 < vocab; block += kThreads) {
    const uint4 w = philox(
        make_uint4(static_cast<uint32_t>(block), 0u, static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32)),
        k);
    const uint32_t words[4] = {w.x, w.y, w.z, w.w};
    for (int i = 0; i < 4 && block * 4 + i < vocab; ++i) {
      const int64_t j = block * 4 + i;
      const float z = to_float(start[j * stride_v]) / t;
      mine.add(z);
      best.add(given == 0.f ? z : z + gumbel(words[i]), j);
    }
  }
  for (int step_size = 16; step_size > 0; step_size /= 2) {
    const float value = __shfl_down_sync(~0u, best.value, step_size);
    const auto column = static_cast<int64_t>(__shfl_down_sync(~0u, static_cast<long long>(best.column), step_size));
    best.add(value, column);
  }
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = best;
  const Stats all = block_merge(mine);  // its barrier also publishes parts
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) best.add(parts[w].value, parts[w].column);
  const int64_t chosen = best.column < vocab ? best.column : 0;  // only a row of NaN or -inf has no candidate
  const float log_s = logf(all.s), lp = (to_float(start[chosen * stride_v]) / t - all.m) - log_s;
  const float h = log_s - all.u / all.s;
  token[row] = chosen;
  logp[row] = lp > 0.f ? 0.f : lp;
  entropy[row] = h < 0.f ? 0.f : h;
}

}  // namespace

void sample(
    const Tensor& logits, double temperature, const std::optional<Tensor>& row_temperature, const Tensor& seed,
    const Tensor& offset, Tensor token, Tensor logp, Tensor entropy) {
  if (logits.size(0) == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  for_float_type(logits.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    sample_kernel<T><<<static_cast<unsigned>(logits.size(0)), kThreads, 0, current_stream(logits.get_device_index())>>>(
        static_cast<const T*>(logits.const_data_ptr()), logits.stride(0), logits.stride(1), logits.size(1),
        make_scale(temperature, row_temperature), static_cast<const int64_t*>(seed.const_data_ptr()),
        static_cast<const int64_t*>(offset.const_data_ptr()), static_cast<int64_t*>(token.mutable_data_ptr()),
        static_cast<float*>(logp.mutable_data_ptr()), static_cast<float*>(entropy.mutable_data_ptr()));
  });
  check_launch();
}

}  // namespace autotool
