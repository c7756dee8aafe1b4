// Kernels of sample_logp_entropy: token, log-probability and entropy in one read of the logits.
//
// Column j draws word j % 4 of the Philox block with counter (j / 4, 0, offset) and key `seed`; the token is
// argmax z - log(-log(1 - u)), as in autotool_kernels/philox.py. A row is split over up to eight blocks, by V alone;
// they are a thread-block cluster and merge in shared memory, or on sm_80 leave their parts to a second kernel.
#pragma once

#include "common.cuh"

namespace autotool {

// The larger value, the smaller column of equal ones; NaN never wins.
struct Best {
  float value = kNegInf;
  int32_t column = INT32_MAX;

  __device__ void add(float v, int32_t j) {
    if (v > value || (v == value && j < column)) value = v, column = j;
  }
  __device__ void add_lane_below(int step) {
    const float v = __shfl_down_sync(~0u, value, step);
    add(v, __shfl_down_sync(~0u, column, step));
  }
};

// What a block knows of its part of a row.
struct Partial {
  Stats stats;
  Best best;
};

struct Sampling {
  int64_t rows, vocab, stride_n, stride_v;
  Scale temperature;
  const int64_t *seed, *offset;
  int64_t seed_stride, offset_stride;
  int64_t* token;
  float *logp, *entropy;
  Partial* partials;  // [rows, parts] where there are no clusters
  bool wide, cluster;
};

constexpr int kMaxParts = 8;
constexpr int kPartColumns = 4096;  // worth a block of its own

// Blocks per row, a power of two.
inline int sample_parts(int64_t vocab) {
  int parts = 1;
  while (parts < kMaxParts && vocab > static_cast<int64_t>(parts) * kPartColumns) parts *= 2;
  return parts;
}

// Philox4x32-10 (Salmon et al., SC 2011).
__device__ inline uint4 philox(uint4 c, uint2 k) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c.x, p1 = static_cast<uint64_t>(0xCD9E8D57u) * c.z;
    c = make_uint4(
        static_cast<uint32_t>(p1 >> 32) ^ c.y ^ k.x, static_cast<uint32_t>(p1),
        static_cast<uint32_t>(p0 >> 32) ^ c.w ^ k.y, static_cast<uint32_t>(p0));
    k = make_uint2(k.x + 0x9E3779B9u, k.y + 0xBB67AE85u);
  }
  return c;
}

constexpr float kSmallestUniform = 0x1p-33f;
constexpr float kLargestUniform = 0x1.fffffep-1f;  // u = 1 would have no logarithm

__device__ inline float uniform(uint32_t bits) {
  return fminf((static_cast<float>(bits) + 0.5f) * 0x1p-32f, kLargestUniform);
}

// -log(-log(1 - u)); below 1/8 a series, because 1 - u would round away the digits of a small u.
__device__ inline float gumbel(float u) {
  float series = 1.f / 8;
#pragma unroll
  for (int n = 7; n > 0; --n) series = fmaf(u, series, 1.f / static_cast<float>(n));
  const float exponential = u < 0.125f ? u * series : -kLn2 * log2_fast(1.f - u);
  return -kLn2 * log2_fast(exponential);
}

template <typename T>
__device__ void write_sample(const Sampling& p, int64_t n, const Partial& all, const T* start, float inverse_t) {
  const int64_t chosen = all.best.column < p.vocab ? all.best.column : 0;  // only a row of NaN has no candidate
  const Outcome out(all.stats, to_float(start[chosen * p.stride_v]), inverse_t);
  p.token[n] = chosen;
  p.logp[n] = out.logp;
  p.entropy[n] = out.entropy;
}

__device__ inline float sample_inverse_t(const Sampling& p, int64_t n) {
  const float t = p.temperature.at(n);
  return t == 0.f ? 1.f : 1.f / t;
}

__device__ inline Partial merge_parts(const Partial* all, int parts, float inverse_t) {
  Partial total = all[0];
  for (int r = 1; r < parts; ++r) {
    total.stats.merge(all[r].stats, inverse_t * kLog2E);
    total.best.add(all[r].best.value, all[r].best.column);
  }
  return total;
}

// Best candidate and statistics of columns first..stop-1; valid in thread 0.
template <typename T>
__device__ Partial sample_part(const Sampling& p, int64_t n, const Row<const T>& row, int64_t first) {
  const bool greedy = p.temperature.at(n) == 0.f;
  const float inverse_t = sample_inverse_t(p, n), scale = inverse_t * kLog2E;
  const auto key = static_cast<uint64_t>(p.seed[n * p.seed_stride]);
  const auto step = static_cast<uint64_t>(p.offset[n * p.offset_stride]);
  const uint2 k = make_uint2(static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
  constexpr int kCount = kVector<T>;
  constexpr int64_t kStep = static_cast<int64_t>(kThreads) * kCount;
  Stats stats;
  Best best;
  float bound = kNegInf;  // the best score that some lane of the warp has found
  // Rounded up, so that the lanes of a warp stay together.
  const int64_t steps = (row.size - first + kStep - 1) / kStep;
  const auto load = [&](int64_t j, float(&to)[kCount]) {
    p.wide ? row.template load<true>(j, to) : row.template load<false>(j, to);
  };
  float ahead[kCount];
  load(first + static_cast<int64_t>(threadIdx.x) * kCount, ahead);
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t j = first + i * kStep + static_cast<int64_t>(threadIdx.x) * kCount;
    float x[kCount], e[kCount];
    for (int c = 0; c < kCount; ++c) x[c] = ahead[c];
    load(j + kStep, ahead);
    stats.add(x, scale, e);
    if (greedy) {
      for (int c = 0; c < kCount; ++c)
        if (j + c < row.size) best.add(x[c], static_cast<int32_t>(j + c));
      continue;
    }
    // z - log E reaches the bound only if E <= e^(z - bound), and u < E: where u is larger the logarithms are spared,
    // and where no u is small enough the random bits too. The margin covers the rounding of the exponent, and a
    // comparison with NaN (nothing found yet) spares nothing.
    const float z = stats.m * inverse_t, exponent = z - bound + 1e-3f + fabsf(z) * 1e-6f;
    const float reach = exp2_fast(exponent * kLog2E);
#pragma unroll
    for (int group = 0; group < kCount; group += 4) {
      const float top = fmaxf(fmaxf(e[group], e[group + 1]), fmaxf(e[group + 2], e[group + 3]));
      if (top * reach < kSmallestUniform) continue;
      const uint4 w = philox(
          make_uint4(
              static_cast<uint32_t>((j + group) / 4), 0u, static_cast<uint32_t>(step),
              static_cast<uint32_t>(step >> 32)),
          k);
      const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float u = uniform(words[c]);
        if (u > e[group + c] * reach || j + group + c >= row.size) continue;
        best.add(x[group + c] * inverse_t + gumbel(u), static_cast<int32_t>(j + group + c));
      }
    }
    for (int distance = 16; distance > 0; distance /= 2)
      bound = fmaxf(bound, __shfl_xor_sync(~0u, fmaxf(bound, best.value), distance));
  }

  struct Shared {
    Stats stats[kWarps];
    Best best[kWarps];
  }& shared = *reinterpret_cast<Shared*>(shared_memory());
  for (int distance = 16; distance > 0; distance /= 2) best.add_lane_below(distance);
  if (threadIdx.x % 32 == 0) shared.best[threadIdx.x / 32] = best;
  const Stats all = block_merge(stats, scale, shared.stats);  // its barrier also publishes the candidates
  if (threadIdx.x == 0)
    for (int w = 1; w < kWarps; ++w) best.add(shared.best[w].value, shared.best[w].column);
  return {all, best};
}

constexpr int kSampleShared = 2048;  // of one block: its warps' candidates first, the cluster's parts behind them
static_assert(kWarps * (sizeof(Stats) + sizeof(Best)) + kMaxParts * sizeof(Partial) <= kSampleShared, "");

// rows * parts blocks; p.cluster: in clusters of `parts`.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) sample(Sampling p, const T* logits, int parts) {
  const int64_t n = blockIdx.x / parts;
  const int rank = static_cast<int>(blockIdx.x % parts);
  // A multiple of eight columns: whole Philox blocks, whole vectors.
  const int64_t part = (p.vocab + parts * 8 - 1) / (parts * 8) * 8, first = rank * part;
  const int64_t stop = first + part < p.vocab ? first + part : p.vocab;
  const T* const start = logits + n * p.stride_n;
  const Partial mine = sample_part<T>(p, n, Row<const T>{start, p.stride_v, stop}, first);
  const float inverse_t = sample_inverse_t(p, n);
#ifdef AUTOTOOL_CLUSTERS
  if (p.cluster) {
    auto* const all = reinterpret_cast<Partial*>(shared_memory() + kSampleShared) - kMaxParts;
    cluster_sync();  // the first block has started: its shared memory may be written to
    if (threadIdx.x == 0) *cluster_peer(&all[rank], 0) = mine;
    cluster_sync();
    if (rank == 0 && threadIdx.x == 0) write_sample(p, n, merge_parts(all, parts, inverse_t), start, inverse_t);
    return;
  }
#endif
  if (threadIdx.x != 0) return;
  if (parts == 1)
    write_sample(p, n, mine, start, inverse_t);
  else
    p.partials[n * parts + rank] = mine;
}

constexpr int kMergeThreads = 128;

// One thread per row, where there are no clusters.
template <typename T>
__global__ void __launch_bounds__(kMergeThreads) sample_merge(Sampling p, const T* logits, int parts) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (n >= p.rows) return;
  const float inverse_t = sample_inverse_t(p, n);
  write_sample(p, n, merge_parts(p.partials + n * parts, parts, inverse_t), logits + n * p.stride_n, inverse_t);
}

}  // namespace autotool
