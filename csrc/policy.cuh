// Kernel of policy_loss: loss, gradients and metrics in one launch.
//
// Eight blocks of 768 threads, as one thread-block cluster (sm_90 and later; its barrier takes a fraction of a
// microsecond) or as a cooperative grid of eight (sm_80; always resident together). Eight multiprocessors read the
// 1.4 MB of 65536 tokens from L2 in about the time of one launch; more would need a barrier across the device.
// Three phases between two barriers: (1) each warp walks its range of tokens sequence by sequence and keeps the sums of
// every piece; (2) each thread adds up the pieces of its sequences: mean entropy, gate, weights, loss; (3) the warps
// walk their ranges again and write the gradients. Sums run in float64 in a fixed order: repeats are bitwise equal.
#pragma once

#include "common.cuh"

namespace autotool {

constexpr int kPolicyBlocks = 8;
constexpr int kPolicyThreads = 768;  // more would spill
constexpr int kPolicyWarps = kPolicyThreads / 32;
constexpr int kRanges = kPolicyBlocks * kPolicyWarps;
enum Normalize { kTokens = 0, kSequences = 1, kConstant = 2 };
// Sums over a block's tokens, then over its sequences: in the order of autotool_kernels.policy.METRICS, from its third.
enum Sum : int {
  kLow, kHigh, kKl, kRatio, kRatioMax, kCount,
  kEntropyLong, kEntropyShort, kOpenLong, kOpenShort, kLong, kShort, kPolicy, kBonus, kSums
};
constexpr int kTokenSums = kCount + 1, kSequenceSums = kSums - kTokenSums;

struct PolicyLoss {
  const float *logp, *old_logp, *entropy, *advantages;
  Integers cu_seqlens, is_short;
  const bool* mask;
  int tokens, sequences;
  float target_short, target_long, beta_short, beta_long;
  const float* gate;  // the four, where they are on the device
  float clip_low, clip_high;
  int normalize;
  double constant;
  float *loss, *sequence_entropy, *metrics, *grad_logp, *grad_entropy;
  double* workspace;  // policy_workspace(sequences) values

  // Start of sequence i; whatever cu_seqlens holds, a token or the end of them.
  __device__ int bound(int i) const {
    const int64_t at = cu_seqlens.at(i);
    return at < 0 ? 0 : at < tokens ? static_cast<int>(at) : tokens;
  }
};

// Pieces (count, entropy, policy), sums of the blocks, and weight and beta of each sequence.
inline int64_t policy_workspace(int64_t sequences) {
  return 3 * (sequences + kRanges) + kPolicyBlocks * kSums + sequences;
}

struct Ratio {
  float difference, value, bounded;
  bool high, low;

  __device__ Ratio(const PolicyLoss& p, int t, float advantage) {
    difference = p.logp[t] - p.old_logp[t];
    value = expf(difference);
    high = advantage > 0.f && value > 1.f + p.clip_high;
    low = advantage < 0.f && value < 1.f - p.clip_low;
    bounded = high ? 1.f + p.clip_high : low ? 1.f - p.clip_low : value;
  }
};

// Calls piece(i, start, stop) for the part of every sequence, and gap(start, stop) for the tokens of none, in the
// tokens lo..hi-1. `first` is the first sequence that ends after lo.
template <typename Piece, typename Gap>
__device__ void walk(const PolicyLoss& p, int lo, int hi, int first, Piece&& piece, Gap&& gap) {
  int at = lo;
  for (int i = first; i < p.sequences && at < hi; ++i) {
    const int begin = p.bound(i), end = p.bound(i + 1);
    if (begin >= hi) break;
    const int start = begin > at ? begin : at, stop = end < hi ? end : hi;
    if (start >= stop) continue;
    if (at < start) gap(at, start);
    piece(i, start, stop);
    at = stop;
  }
  if (at < hi) gap(at, hi);
}

// The first sequence that ends after token lo, searched by the 32 lanes of a warp.
__device__ inline int first_sequence(const PolicyLoss& p, int lo) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int begin = 0, end = p.sequences;  // it is one of these and what lies between
  while (begin < end) {
    const int step = (end - begin + 31) / 32;
    const int64_t probe = begin + static_cast<int64_t>(lane + 1) * step - 1;
    const bool before = probe < end && p.bound(static_cast<int>(probe) + 1) <= lo;
    const int64_t passed = begin + static_cast<int64_t>(__popc(__ballot_sync(~0u, before))) * step;
    begin = passed < end ? static_cast<int>(passed) : end;
    if (begin + step - 1 < end) end = begin + step - 1;
  }
  return begin;
}

__device__ inline double warp_sum(double x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// NaN counts as the largest, as it does in the PyTorch backend.
__device__ inline double larger(double a, double b) { return b > a || b != b ? b : a; }

// Adds kValues values (of value kMax it takes the largest) over a block in a fixed order and writes them. A barrier must
// lie between two calls.
template <int kValues, int kMax>
__device__ void block_sums(double (&values)[kValues], double* out) {
  auto* const parts = reinterpret_cast<double(*)[kValues]>(shared_memory());  // [kPolicyWarps]
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    double x = values[v];
    if (v == kMax)
      for (int step = 16; step > 0; step /= 2) x = larger(x, __shfl_xor_sync(~0u, x, step));
    else
      x = warp_sum(x);
    if (lane == 0) parts[warp][v] = x;
  }
  __syncthreads();
  if (threadIdx.x < kValues) {
    const int v = static_cast<int>(threadIdx.x);
    double x = parts[0][v];
    for (int w = 1; w < kPolicyWarps; ++w) x = v == kMax ? larger(x, parts[w][v]) : x + parts[w][v];
    out[v] = x;
  }
}

template <bool kCluster>
__device__ void policy_barrier() {
#ifdef AUTOTOOL_CLUSTERS
  if (kCluster) return cluster_sync();
#endif
  if (!kCluster) grid_sync();
}

template <bool kCluster>
__device__ void policy_phases(const PolicyLoss& p) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int range = static_cast<int>(blockIdx.x * kPolicyWarps + threadIdx.x / 32);
  const int length = static_cast<int>((int64_t{p.tokens} + kRanges * 32 - 1) / (kRanges * 32)) * 32;  // tokens of a range
  const auto clamped = [&](int64_t t) { return t < p.tokens ? static_cast<int>(t) : p.tokens; };
  const int lo = clamped(static_cast<int64_t>(range) * length), hi = clamped(int64_t{lo} + length);
  const int first = first_sequence(p, lo);
  // Sequence i has its piece of range r at i + r: both rise along the tokens, so no two pieces share a place.
  const int64_t places = int64_t{p.sequences} + kRanges;
  double* const pieces = p.workspace;
  double* const sums = pieces + 3 * places;  // [blocks, kSums]
  auto* const weights = reinterpret_cast<float*>(sums + kPolicyBlocks * kSums);
  float* const betas = weights + p.sequences;

  double trained_tokens = 0, kl = 0, ratios = 0;
  float ratio_max = 0;
  int low = 0, high = 0;
  walk(
      p, lo, hi, first,
      [&](int i, int start, int stop) {
        const float advantage = p.advantages[i];
        double count = 0, entropy = 0, policy = 0;
        for (int t = start + lane; t < stop; t += 32) {
          if (!p.mask[t]) continue;
          const Ratio ratio(p, t, advantage);
          count += 1;
          entropy += p.entropy[t];
          if (advantage != 0.f) policy -= ratio.bounded * advantage;
          low += ratio.low;
          high += ratio.high;
          kl += ratio.value - 1.f - ratio.difference;
          ratios += ratio.value;
          ratio_max = max_nan(ratio_max, ratio.value);
        }
        count = warp_sum(count), entropy = warp_sum(entropy), policy = warp_sum(policy);
        if (lane == 0) {
          trained_tokens += count;
          pieces[i + range] = count;
          pieces[places + i + range] = entropy;
          pieces[2 * places + i + range] = policy;
        }
      },
      [](int, int) {});
  double of_tokens[kTokenSums] = {
      static_cast<double>(low), static_cast<double>(high), kl, ratios, ratio_max, trained_tokens};
  block_sums<kTokenSums, kRatioMax>(of_tokens, sums + blockIdx.x * kSums);
  policy_barrier<kCluster>();

  double trained = 0;
  for (int b = 0; b < kPolicyBlocks; ++b) trained += sums[b * kSums + kCount];
  if (trained < 1) trained = 1;
  const bool given = p.gate != nullptr;
  const float target_short = given ? p.gate[0] : p.target_short, target_long = given ? p.gate[1] : p.target_long;
  const float beta_short = given ? p.gate[2] : p.beta_short, beta_long = given ? p.gate[3] : p.beta_long;
  double of_sequences[kSequenceSums] = {};
  const auto add = [&](Sum sum, double x) { of_sequences[sum - kTokenSums] += x; };
  constexpr int kEverybody = kPolicyBlocks * kPolicyThreads;
  for (int64_t i64 = blockIdx.x * kPolicyThreads + threadIdx.x; i64 < p.sequences; i64 += kEverybody) {
    const int i = static_cast<int>(i64), begin = p.bound(i), end = p.bound(i + 1);
    double count = 0, entropy = 0, policy = 0;
    if (begin < end) {
#pragma unroll 4
      for (int r = begin / length; r <= (end - 1) / length; ++r) {
        count += pieces[i + r];
        entropy += pieces[places + i + r];
        policy += pieces[2 * places + i + r];
      }
    }
    const double own = count < 1 ? 1 : count;
    const auto mean = static_cast<float>(entropy / own);
    const int64_t kind = p.is_short.at(i);
    float beta = 0.f;
    if (count > 0 && kind == 0) {
      const bool open = mean <= target_long;
      beta = open ? beta_long : 0.f;
      add(kLong, 1), add(kOpenLong, open), add(kEntropyLong, mean);
    } else if (count > 0 && kind == 1) {
      const bool open = mean <= target_short;
      beta = open ? beta_short : 0.f;
      add(kShort, 1), add(kOpenShort, open), add(kEntropyShort, mean);
    }
    const double divisor = p.normalize == kTokens      ? trained
                           : p.normalize == kSequences ? own * static_cast<double>(p.sequences)
                                                       : p.constant;
    add(kPolicy, policy / divisor);
    add(kBonus, beta * entropy / divisor);
    p.sequence_entropy[i] = mean;
    weights[i] = static_cast<float>(1.0 / divisor);
    betas[i] = beta;
  }
  block_sums<kSequenceSums, -1>(of_sequences, sums + blockIdx.x * kSums + kTokenSums);
  policy_barrier<kCluster>();

  walk(
      p, lo, hi, first,
      [&](int i, int start, int stop) {
        const float advantage = p.advantages[i], weight = weights[i], beta = betas[i];
#pragma unroll 4
        for (int t = start + lane; t < stop; t += 32) {
          float dlogp = 0.f, dentropy = 0.f;
          if (p.mask[t]) {
            dentropy = -beta * weight;
            if (advantage != 0.f) {  // a wild ratio times 0 would be NaN
              const Ratio ratio(p, t, advantage);
              if (!ratio.high && !ratio.low) dlogp = -advantage * ratio.value * weight;
            }
          }
          p.grad_logp[t] = dlogp;
          p.grad_entropy[t] = dentropy;
        }
      },
      [&](int start, int stop) {
        for (int t = start + lane; t < stop; t += 32) p.grad_logp[t] = p.grad_entropy[t] = 0.f;
      });

  if (blockIdx.x != 0 || threadIdx.x >= 32) return;
  // The first warp adds up the blocks, a sum per lane.
  double total = 0;
  if (lane < kSums) {
    total = sums[lane];
    for (int b = 1; b < kPolicyBlocks; ++b) {
      const double other = sums[b * kSums + lane];
      total = lane == kRatioMax ? larger(total, other) : total + other;
    }
  }
  const double bonus = __shfl_sync(~0u, total, kBonus);
  if (lane == kPolicy) *p.loss = static_cast<float>(total - bonus);
  // Means per trained token and per sequence of a kind; the rest are sums.
  const int members = lane < kRatioMax                              ? kCount
                      : lane == kEntropyLong || lane == kOpenLong   ? kLong
                      : lane == kEntropyShort || lane == kOpenShort ? kShort
                                                                    : -1;
  const double count = __shfl_sync(~0u, total, members < 0 ? 0 : members);
  if (members >= 0) total /= count < 1 ? 1 : count;
  if (lane < kSums) p.metrics[(lane + 2) % kSums] = static_cast<float>(total);
}

constexpr int kPolicyShared = kPolicyWarps * kSequenceSums * static_cast<int>(sizeof(double));
static_assert(kTokenSums <= kSequenceSums && kSums <= 32, "");

template <bool kCluster>
__global__ void __launch_bounds__(kPolicyThreads, 1) policy_loss(PolicyLoss p) {
#ifndef AUTOTOOL_CLUSTERS
  if (kCluster) return;
#endif
  policy_phases<kCluster>(p);
}

}  // namespace autotool
