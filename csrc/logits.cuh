// Kernels of logits_logp_entropy.
//
// A forward needs one read of the logits either way. `ring_forward` keeps a row in the shared memory of a thread-block
// cluster (a bfloat16 row of 152064 in two blocks) while the copy engine brings in the next one: the maximum is known
// before the first exponential, so nothing is ever rescaled, and no thread waits for memory. `stream_forward` keeps
// running statistics in registers instead: sm_80, rows of another alignment or stride, short rows. The two add up a row
// in different orders, so the number of rows has no say in which one runs. A row is not held over to its backward: the
// upstream gradients depend on the outputs of whole sequences.
#pragma once

#include "common.cuh"

namespace autotool {

struct RowOutputs {
  float *logp, *entropy, *row_max, *log_sum;  // row_max is that of the logits as given

  __device__ void ignored(int64_t row) const { logp[row] = entropy[row] = row_max[row] = log_sum[row] = 0.f; }

  template <typename T>
  __device__ void write(int64_t row, const Stats& all, const Row<const T>& logits, int64_t y, float inverse_t) const {
    const bool valid = y >= 0 && y < logits.size;
    const float label = valid ? to_float(logits.start[y * logits.stride]) : __builtin_nanf("");
    const Outcome out(all, label, inverse_t);
    logp[row] = out.logp;
    entropy[row] = out.entropy;
    row_max[row] = all.m;
    log_sum[row] = out.log_s;
  }
};

template <typename T>
struct LogitsForward {
  const T* logits;
  int64_t rows, vocab, stride_n, stride_v;
  Integers target;
  int64_t ignore_index;
  Scale temperature;
  RowOutputs out;

  __device__ Row<const T> row(int64_t n) const { return {logits + n * stride_n, stride_v, vocab}; }
};

// One block per row. kWide changes the loads, not the sums.
template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads) stream_forward(LogitsForward<T> p) {
  const int64_t n = blockIdx.x, y = p.target.at(n);
  if (y == p.ignore_index) {
    if (threadIdx.x == 0) p.out.ignored(n);
    return;
  }
  const Row<const T> row = p.row(n);
  const float inverse_t = 1.f / p.temperature.at(n), scale = inverse_t * kLog2E;
  constexpr int kFlight = kWide ? 4 : 1;  // loads ahead of their use
  constexpr int64_t kStep = static_cast<int64_t>(kThreads) * kVector<T>;
  Stats mine;
  float e[kVector<T>];
  int64_t j = static_cast<int64_t>(threadIdx.x) * kVector<T>;
  for (; j + (kFlight - 1) * kStep + kVector<T> <= row.size; j += kFlight * kStep) {
    float x[kFlight][kVector<T>];
#pragma unroll
    for (int i = 0; i < kFlight; ++i) row.template load<kWide>(j + i * kStep, x[i]);
#pragma unroll
    for (int i = 0; i < kFlight; ++i) mine.add(x[i], scale, e);
  }
  for (; j < row.size; j += kStep) {
    float x[kVector<T>];
    row.template load<kWide>(j, x);
    mine.add(x, scale, e);
  }
  const Stats all = block_merge(mine, scale, reinterpret_cast<Stats*>(shared_memory()));
  if (threadIdx.x == 0) p.out.write(n, all, row, y, inverse_t);
}

constexpr int kChunkBytes = 16384;
constexpr int kSlots = 13;  // chunks of shared memory: a block's part of the row, and the beginning of the next
constexpr int kPartChunks = 10;  // so much of a row a block takes at most
constexpr int kMaxCluster = 8;
constexpr int64_t kRingBytes = 1 << 16;  // shorter rows are streamed: the ring pays two barriers per row

// Whether rows may take the ring. The stride counts even where there is one row, or a row of a batch would take the
// ring by itself and not among the others.
template <typename T>
inline bool fits_ring(const T* rows, int64_t vocab, int64_t stride_n, int64_t stride_v) {
  const auto whole = [](int64_t bytes) { return bytes % 16 == 0; };
  const int64_t item = static_cast<int64_t>(sizeof(T));
  return vocab * item >= kRingBytes && whole(vocab * item) && whole(stride_n * item) && stride_v == 1 &&
         whole(static_cast<int64_t>(reinterpret_cast<uintptr_t>(rows)));
}

struct RingShared {
  unsigned char slots[kSlots][kChunkBytes];
  uint64_t arrivals[kSlots];
  float maxima[kWarps];
  float sums[kWarps][2];
  Stats parts[2][kMaxCluster];  // of the cluster's blocks, in its first block; rows take turns
};

// Columns per block, a multiple of a vector, when `blocks` share a row.
inline int64_t ring_part(int64_t vocab, int blocks, int vector) {
  return ((vocab + blocks - 1) / blocks + vector - 1) / vector * vector;
}

#ifdef AUTOTOOL_CLUSTERS
// A persistent cluster per row at a time; block `rank` has columns rank * part .. (rank + 1) * part, whole vectors and
// at least one.
template <typename T>
__device__ void ring_rows(const LogitsForward<T>& p, int64_t part) {
  RingShared& shared = *reinterpret_cast<RingShared*>(shared_memory());
  Arrival* const arrivals = reinterpret_cast<Arrival*>(shared.arrivals);
  const int tid = static_cast<int>(threadIdx.x), rank = cluster_rank(), blocks = cluster_blocks();
  const int64_t cluster = blockIdx.x / blocks, clusters = gridDim.x / blocks;
  const int64_t first = rank * part, columns = (first + part < p.vocab ? first + part : p.vocab) - first;
  const int64_t vectors = columns / kVector<T>;
  constexpr int kChunkVectors = kChunkBytes / 16;
  const int chunks = static_cast<int>((vectors + kChunkVectors - 1) / kChunkVectors);
  const auto chunk_vectors = [&](int chunk) {
    const int64_t left = vectors - static_cast<int64_t>(chunk) * kChunkVectors;
    return static_cast<int>(left < kChunkVectors ? left : kChunkVectors);
  };

  // Thread 0 runs ahead of everybody through the chunks of the rows that are not ignored.
  int64_t load_row = cluster;
  int load_chunk = 0, load_slot = 0;
  const auto load_next = [&] {
    while (load_row < p.rows && p.target.at(load_row) == p.ignore_index) load_row += clusters;
    if (load_row >= p.rows) return;
    const T* from = p.row(load_row).start + first + static_cast<int64_t>(load_chunk) * kChunkVectors * kVector<T>;
    arrivals[load_slot].load(shared.slots[load_slot], from, static_cast<uint32_t>(chunk_vectors(load_chunk)) * 16);
    if (++load_slot == kSlots) load_slot = 0;
    if (++load_chunk == chunks) load_chunk = 0, load_row += clusters;
  };
  if (tid == 0) {
    for (int i = 0; i < kSlots; ++i) arrivals[i].init();
    publish_arrivals();
  }
  cluster_sync();  // also: every block of the cluster has started, so its shared memory may be written to
  if (tid == 0)
    for (int i = 0; i < kSlots; ++i) load_next();

  int slot = 0;
  uint32_t parity = 0;
  int turn = 0;
  for (int64_t n = cluster; n < p.rows; n += clusters) {
    const int64_t y = p.target.at(n);
    if (y == p.ignore_index) {
      if (rank == 0 && tid == 0) p.out.ignored(n);
      continue;
    }
    const Row<const T> row = p.row(n);
    const float inverse_t = 1.f / p.temperature.at(n), scale = inverse_t * kLog2E;

    Stats mine;
    int at = slot;
    uint32_t phase = parity;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      arrivals[at].wait(phase);
      const uint4* const data = reinterpret_cast<const uint4*>(shared.slots[at]);
      for (int v = tid; v < chunk_vectors(chunk); v += kThreads) {
        float x[kVector<T>];
        unpack<T>(data[v], x);
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) mine.m = fmaxf(mine.m, x[i]);
      }
      if (++at == kSlots) at = 0, phase ^= 1;
    }
    for (int step = 16; step > 0; step /= 2) mine.m = fmaxf(mine.m, __shfl_down_sync(~0u, mine.m, step));
    if (tid % 32 == 0) shared.maxima[tid / 32] = mine.m;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) mine.m = w == 0 ? shared.maxima[0] : fmaxf(mine.m, shared.maxima[w]);

    const float base = Stats::base_of(mine.m);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const uint4* const data = reinterpret_cast<const uint4*>(shared.slots[slot]);
      for (int v = tid; v < chunk_vectors(chunk); v += kThreads) {
        float x[kVector<T>];
        unpack<T>(data[v], x);
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) mine.add(x[i], base, scale);
      }
      __syncthreads();  // the slot is free
      if (tid == 0) load_next();
      if (++slot == kSlots) slot = 0, parity ^= 1;
    }
    for (int step = 16; step > 0; step /= 2) {
      mine.s += __shfl_down_sync(~0u, mine.s, step);
      mine.u += __shfl_down_sync(~0u, mine.u, step);
    }
    if (tid % 32 == 0) shared.sums[tid / 32][0] = mine.s, shared.sums[tid / 32][1] = mine.u;
    __syncthreads();
    if (tid == 0) {
      for (int w = 1; w < kWarps; ++w) mine.s += shared.sums[w][0], mine.u += shared.sums[w][1];
      *cluster_peer(&shared.parts[turn][rank], 0) = mine;
    }
    cluster_sync();
    if (rank == 0 && tid == 0) {
      Stats all = shared.parts[turn][0];
      for (int r = 1; r < blocks; ++r) all.merge(shared.parts[turn][r], scale);
      p.out.write(n, all, row, y, inverse_t);
    }
    turn ^= 1;  // the next row's parts arrive while these are read; those after it only past the next barrier
  }
}
#endif

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) ring_forward(LogitsForward<T> p, int64_t part) {
#ifdef AUTOTOOL_CLUSTERS
  ring_rows(p, part);
#endif
}

template <typename T>
struct LogitsBackward {
  const T* logits;
  int64_t rows, vocab, stride_n, stride_v;
  Integers target;
  int64_t ignore_index;
  Scale temperature, grad_logp, grad_entropy;
  const float *entropy, *row_max, *log_sum;
  T* out;  // may be the logits
  int64_t out_stride_n, out_stride_v;
};

constexpr int kBackwardThreads = 256;
constexpr int kBackwardColumns = 16384;  // per block

__host__ __device__ inline int64_t backward_blocks(int64_t vocab) { return (vocab + kBackwardColumns - 1) / kBackwardColumns; }

// dL/dlogits = (g (1[j=y] - p) - h p (log p + entropy)) / T, element by element; of whole vectors where kWide.
template <typename T, bool kWide>
__global__ void __launch_bounds__(kBackwardThreads) backward(LogitsBackward<T> p) {
  const int64_t splits = backward_blocks(p.vocab), n = blockIdx.x / splits;
  const int64_t first = blockIdx.x % splits * kBackwardColumns;
  const int tid = static_cast<int>(threadIdx.x);
  const int columns = static_cast<int>(p.vocab - first < kBackwardColumns ? p.vocab - first : kBackwardColumns);
  const int whole = kWide ? columns / kVector<T> * kVector<T> : 0;
  const T* const from = p.logits + n * p.stride_n + first * p.stride_v;
  T* const to = p.out + n * p.out_stride_n + first * p.out_stride_v;

  const int64_t y = p.target.at(n);
  const float g = y == p.ignore_index ? 0.f : p.grad_logp.at(n);
  const float h = y == p.ignore_index ? 0.f : p.grad_entropy.at(n);
  if (g == 0.f && h == 0.f) {  // not read, but written: in place, the row still holds its logits
    for (int j = tid * kVector<T>; j < whole; j += kBackwardThreads * kVector<T>)
      store_16(to + j, make_uint4(0u, 0u, 0u, 0u));
    for (int j = whole + tid; j < columns; j += kBackwardThreads) to[j * p.out_stride_v] = from_float<T>(0.f);
    return;
  }
  const float inverse_t = 1.f / p.temperature.at(n), m = p.row_max[n], log_s = p.log_sum[n], mean = p.entropy[n];
  const int label = y >= first && y - first < columns ? static_cast<int>(y - first) : -1;
  const auto dz = [&](float x, int j) {
    // Clamped: p = 0 for a -inf logit, whose log p times 0 would be NaN.
    const float log_p = max_nan((x - m) * inverse_t - log_s, -1e4f);
    return ((j == label ? g : 0.f) - exp2_fast(log_p * kLog2E) * (g + h * (log_p + mean))) * inverse_t;
  };
  if (kWide) {
    constexpr int kStep = kBackwardThreads * kVector<T>;
    int j = tid * kVector<T>;
    uint4 ahead = j < whole ? load_16(from + j) : uint4();  // a step before its use
    for (; j < whole; j += kStep) {
      float x[kVector<T>];
      unpack<T>(ahead, x);
      if (j + kStep < whole) ahead = load_16(from + j + kStep);
      T values[kVector<T>];
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) values[i] = from_float<T>(dz(x[i], j + i));
      uint4 packed;
      memcpy(&packed, values, 16);
      store_16(to + j, packed);
    }
  }
  for (int j = whole + tid; j < columns; j += kBackwardThreads)
    to[j * p.out_stride_v] = from_float<T>(dz(to_float(from[j * p.stride_v]), j));
}

}  // namespace autotool
