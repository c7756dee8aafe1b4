// What the kernels share: vector access, online softmax statistics, reductions over a block. Nothing of torch.
#pragma once

#ifdef AUTOTOOL_DEVICE
#include AUTOTOOL_DEVICE
#else
#include "device.cuh"
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace autotool {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr float kNegInf = -__builtin_huge_valf();
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
// Stands for -inf: its exponential is 0 at any temperature, and its product with a count is a number.
constexpr float kFloor = -1e30f;

template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // elements of the widest load

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

template <typename T>
__device__ void unpack(const uint4& from, float (&to)[kVector<T>]) {
  std::remove_const_t<T> values[kVector<T>];
  memcpy(static_cast<void*>(values), &from, 16);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) to[i] = to_float(values[i]);
}

// Elements of a row, `stride` apart.
template <typename T>
struct Row {
  T* start;
  int64_t stride;
  int64_t size;

  // Elements j.. ; kWide asks for unit stride and 16-byte alignment. Past the end: -inf.
  template <bool kWide>
  __device__ void load(int64_t j, float (&x)[kVector<T>]) const {
    if (kWide && j + kVector<T> <= size) {
      unpack<T>(load_16(start + j), x);
    } else {
      T* at = start + j * stride;
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i, at += stride) x[i] = j + i < size ? to_float(*at) : kNegInf;
    }
  }
};

// m = max x, s = sum e, u = sum e (x - m) with e = 2^(scale (x - m)), scale = log2(e) / T: differences of the logits as
// given are exact where they matter, at any offset and temperature. The identity's maximum is -inf: one that starts at 0
// loses rows whose logits all lie below -88. A NaN logit makes s NaN.
struct Stats {
  float m = kNegInf, s = 0.f, u = 0.f;

  __device__ static float base_of(float m) { return m == kNegInf ? 0.f : m; }  // -inf - -inf would be NaN

  // Refers s and u to `base`; m is left to the caller.
  __device__ void rebase(float base, float scale) {
    const float shift = fmaxf(m - base, kFloor), factor = exp2_fast(shift * scale);
    u = (u + s * shift) * factor;
    s *= factor;
  }

  // Adds one element whose maximum is already in m, with base_of(m); returns e.
  __device__ float add(float x, float base, float scale) {
    const float d = max_nan(x - base, kFloor), e = exp2_fast(d * scale);
    s += e;
    u = fmaf(e, d, u);
    return e;
  }

  template <int kCount>
  __device__ void add(const float (&x)[kCount], float scale, float (&e)[kCount]) {
    float top = m;
#pragma unroll
    for (int i = 0; i < kCount; ++i) top = fmaxf(top, x[i]);
    const float base = base_of(top);
    rebase(base, scale);
    m = top;
#pragma unroll
    for (int i = 0; i < kCount; ++i) e[i] = add(x[i], base, scale);
  }

  __device__ void merge(Stats other, float scale) {
    const float top = fmaxf(m, other.m), base = base_of(top);
    rebase(base, scale);
    other.rebase(base, scale);
    m = top;
    s += other.s;
    u += other.u;
  }

  __device__ Stats from_lane_below(int step) const {
    Stats other;
    other.m = __shfl_down_sync(~0u, m, step);
    other.s = __shfl_down_sync(~0u, s, step);
    other.u = __shfl_down_sync(~0u, u, step);
    return other;
  }
};

// Statistics of all threads, merged in a fixed order; valid in thread 0. `parts` holds kWarps entries of shared memory
// that nothing else uses before the next barrier.
__device__ inline Stats block_merge(Stats mine, float scale, Stats* parts) {
  for (int step = 16; step > 0; step /= 2) mine.merge(mine.from_lane_below(step), scale);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x < 32) {
    mine = threadIdx.x < kWarps ? parts[threadIdx.x] : Stats();
    for (int step = 16; step > 0; step /= 2) mine.merge(mine.from_lane_below(step), scale);
  }
  return mine;
}

// What a row reports: logp <= 0 <= entropy; comparisons, because fminf and fmaxf would hide a NaN.
struct Outcome {
  float logp, entropy, log_s;

  __device__ Outcome(const Stats& all, float label, float inverse_t) {
    log_s = logf(all.s);
    logp = (label - all.m) * inverse_t - log_s;
    entropy = log_s - all.u * inverse_t / all.s;
    if (logp > 0.f) logp = 0.f;
    if (entropy < 0.f) entropy = 0.f;
  }
};

// A float32 vector of any stride, or one number.
struct Scale {
  const float* rows;
  int64_t stride;
  float value;
  __device__ float at(int64_t row) const { return rows == nullptr ? value : rows[row * stride]; }
};

// An integer vector of 1, 4 or 8 bytes per element.
struct Integers {
  const void* data;
  int64_t stride;
  int bytes;
  __device__ int64_t at(int64_t i) const {
    if (bytes == 8) return static_cast<const int64_t*>(data)[i * stride];
    if (bytes == 4) return static_cast<const int32_t*>(data)[i * stride];
    return static_cast<const int8_t*>(data)[i * stride];
  }
};

}  // namespace autotool
