// What the kernels share: online softmax statistics, block reduction, Philox, type dispatch, the current stream.
//
// Only header-only and stable-ABI parts of torch are used, so one build serves every torch from 2.11 on, and the
// library loads (its schemas included) under a CPU build of torch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

namespace autotool {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr float kNegInf = -__builtin_huge_valf();

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Maximum m, s = sum e^(x-m), u = sum e^(x-m) (x-m). The identity's maximum is -inf: one that starts at 0 loses rows
// whose logits all lie below -88.
struct Stats {
  float m = kNegInf, s = 0.f, u = 0.f;

  __device__ void rebase(float new_m) {
    if (m == kNegInf) return;  // s = u = 0, and -inf - new_m would make NaN of them
    const float shift = m - new_m, scale = expf(shift);
    u = (u + s * shift) * scale;
    s *= scale;
  }

  __device__ void add(float x) {
    if (x == kNegInf) return;  // a masked token has no probability
    if (x > m) {
      rebase(x);
      m = x;
      s += 1.f;
    } else {
      const float d = x - m, e = expf(d);
      s += e;
      u += e * d;
    }
  }

  __device__ void merge(Stats other) {
    const float new_m = fmaxf(m, other.m);
    rebase(new_m);
    other.rebase(new_m);
    m = new_m;
    s += other.s;
    u += other.u;
  }
};

// Merges every thread's statistics in a fixed order; the result is valid in all threads.
__device__ inline Stats block_merge(Stats mine) {
  __shared__ Stats parts[kWarps];
  for (int step = 16; step > 0; step /= 2) {
    Stats other;
    other.m = __shfl_down_sync(~0u, mine.m, step);
    other.s = __shfl_down_sync(~0u, mine.s, step);
    other.u = __shfl_down_sync(~0u, mine.u, step);
    mine.merge(other);
  }
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = mine;
  __syncthreads();
  Stats all = parts[0];
  for (int w = 1; w < kWarps; ++w) all.merge(parts[w]);
  return all;
}

// Philox4x32-10 (Salmon et al., SC 2011).
__device__ inline uint4 philox(uint4 c, uint2 k) {
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c.x), low0 = 0xD2511F53u * c.x;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c.z), low1 = 0xCD9E8D57u * c.z;
    c = make_uint4(high1 ^ c.y ^ k.x, low1, high0 ^ c.w ^ k.y, low0);
    k = make_uint2(k.x + 0x9E3779B9u, k.y + 0xBB67AE85u);
  }
  return c;
}

// The current torch stream. Looked up in the loaded libtorch_cuda when first used: a CPU build of torch has none, and
// torch's libraries are not in the global symbol scope.
inline cudaStream_t current_stream(int32_t device) {
  using Lookup = int32_t (*)(int32_t, void**);
  static void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  STD_TORCH_CHECK(library != nullptr, "this build of torch has no CUDA support");
  static const auto lookup = reinterpret_cast<Lookup>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  STD_TORCH_CHECK(lookup != nullptr, "libtorch_cuda has no aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(lookup(device, &stream) == 0, "torch gave no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, cudaGetErrorString(error));
}

// Calls f with a null pointer of the logits' element type.
template <typename F>
void for_float_type(ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Float: return f(static_cast<float*>(nullptr));
    case ScalarType::Half: return f(static_cast<__half*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<__nv_bfloat16*>(nullptr));
    default: STD_TORCH_CHECK(false, "logits must be float32, float16 or bfloat16");
  }
}

// A float32 vector of any stride, or one number.
struct Scale {
  const float* rows;
  int64_t stride;
  float value;
  __device__ float at(int64_t row) const { return rows == nullptr ? value : rows[row * stride]; }
};

inline Scale make_scale(double value, const std::optional<Tensor>& rows) {
  if (!rows.has_value()) return {nullptr, 0, static_cast<float>(value)};
  return {static_cast<const float*>(rows->const_data_ptr()), rows->stride(0), 1.f};
}

// An optional float32 vector: 0 where absent.
inline Scale make_gradient(const std::optional<Tensor>& rows) {
  if (!rows.has_value()) return {nullptr, 0, 0.f};
  return {static_cast<const float*>(rows->const_data_ptr()), rows->stride(0), 0.f};
}

}  // namespace autotool
