// csrc/device.cuh on a CPU: the threads of a block, cluster or cooperative grid are fibers that take turns in a random
// order, so that a missing barrier shows as a wrong number. The first block starts late and first threads dawdle; bulk
// copies arrive at once or late; shared memory starts as NaN; a group in which nobody can go on is reported. Not
// covered: the memory model, PTX, and speed.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <new>
#include <random>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define AUTOTOOL_CLUSTERS

namespace emulator {

inline const char* failure = nullptr;  // of the last launch

struct Index {
  unsigned x = 0;
};

struct Barrier {
  int arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slots[2][32];
};

struct Block {
  Index index;
  int rank = 0;
  Barrier barrier;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
  int delay = 0;  // rounds until it starts
  bool started = false;
};

struct Thread {
  ucontext_t context;
  Block* block = nullptr;
  Index index;
  int exchanges = 0;
  bool done = false;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  uint64_t* arrived;
  int delay;
};

struct Group {
  std::deque<Block> blocks;
  std::deque<Thread> threads;
  std::vector<Copy> copies;
  Barrier barrier;
  Index grid;
  int threads_per_block = 0;
  size_t shared_bytes = 0;
  ucontext_t scheduler;
  Thread* self = nullptr;
  int64_t progress = 0;
  std::mt19937 random;
  std::function<void()> kernel;
};

inline Group* group = nullptr;
inline Thread& self() { return *group->self; }
inline void yield() { swapcontext(&self().context, &group->scheduler); }

// Ends the launch; the thread that calls it does not go on.
inline void fail(const char* what) {
  failure = what;
  for (;;) yield();
}

inline void wait(Barrier& barrier, int count) {
  ++group->progress;
  const int generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    while (barrier.generation == generation) yield();
  }
}

// What every lane of the warp gave, after all have given.
template <typename T>
const uint64_t* exchange(T value) {
  static_assert(sizeof(T) <= 8, "");
  Thread& me = self();
  Warp& warp = me.block->warps[me.index.x / 32];
  uint64_t* const slots = warp.slots[me.exchanges++ % 2];
  std::memcpy(&slots[me.index.x % 32], &value, sizeof(T));
  wait(warp.barrier, 32);
  return slots;
}

template <typename T>
T shuffle(T value, int source) {
  const int lane = static_cast<int>(self().index.x % 32);
  const uint64_t* const slots = exchange(value);
  std::memcpy(&value, &slots[source >= 0 && source < 32 ? source : lane], sizeof(T));
  return value;
}

// After a barrier of the group, the first thread of a block may find that the others are far ahead.
inline void wait_for_group() {
  wait(group->barrier, static_cast<int>(group->threads.size()));
  if (self().index.x != 0 || group->random() % 4 != 0) return;
  for (int i = 0; i < 40; ++i, ++group->progress) yield();
}

inline void start_thread() {
  Block& block = *self().block;
  if (!block.started) std::memset(block.shared, 0xff, group->shared_bytes);
  block.started = true;
  group->kernel();
  self().done = true;
  ++group->progress;
  yield();
}

inline void run_group(Group& g) {
  constexpr size_t kStack = 1 << 16;
  group = &g;
  auto* const stacks = static_cast<char*>(mmap(
      nullptr, g.threads.size() * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (stacks == MAP_FAILED) throw std::bad_alloc();
  std::vector<size_t> order(g.threads.size());
  for (size_t i = 0; i < order.size(); ++i) {
    Thread& t = g.threads[order[i] = i];
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = stacks + i * kStack;
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = nullptr;
    makecontext(&t.context, start_thread, 0);
  }
  for (bool alive = true; alive && failure == nullptr;) {
    alive = false;
    const int64_t before = g.progress;
    std::shuffle(order.begin(), order.end(), g.random);
    for (const size_t i : order) {
      Thread& t = g.threads[i];
      if (t.done) continue;
      alive = true;
      if (t.block->delay > 0) continue;
      g.self = &t;
      swapcontext(&g.scheduler, &t.context);
      if (failure != nullptr) break;
    }
    for (Block& block : g.blocks)
      if (block.delay > 0) --block.delay, ++g.progress;
    for (size_t i = 0; i < g.copies.size();) {
      Copy& copy = g.copies[i];
      ++g.progress;
      if (copy.delay-- > 0) {
        ++i;
        continue;
      }
      std::memcpy(copy.to, copy.from, copy.bytes);
      ++*copy.arrived;
      copy = g.copies.back();
      g.copies.pop_back();
    }
    if (alive && g.progress == before) failure = "nobody can go on";
  }
  munmap(stacks, g.threads.size() * kStack);
}

// Runs `kernel` on `blocks` blocks, `together` of them at a time (a cluster, a cooperative grid, or 1).
inline void launch(int64_t blocks, int threads, size_t shared, int together, const std::function<void()>& kernel) {
  failure = blocks % together == 0 ? nullptr : "the grid is no multiple of the cluster";
  for (int64_t first = 0; first < blocks && failure == nullptr; first += together) {
    Group g;
    g.random.seed(static_cast<unsigned>(first + 1));
    g.grid.x = static_cast<unsigned>(blocks);
    g.threads_per_block = threads;
    g.shared_bytes = shared;
    g.kernel = kernel;
    for (int rank = 0; rank < together; ++rank) {
      Block& b = g.blocks.emplace_back();
      b.index.x = static_cast<unsigned>(first + rank);
      b.rank = rank;
      b.warps.resize(threads / 32);
      b.shared = static_cast<unsigned char*>(std::aligned_alloc(128, (shared + 127) / 128 * 128));
      b.delay = together > 1 && rank == 0 ? static_cast<int>(g.random() % 160) : 0;
      for (int i = 0; i < threads; ++i) {
        Thread& t = g.threads.emplace_back();
        t.block = &b;
        t.index.x = static_cast<unsigned>(i);
      }
    }
    run_group(g);
    for (Block& b : g.blocks) std::free(b.shared);
  }
}

}  // namespace emulator

#define threadIdx (emulator::self().index)
#define blockIdx (emulator::self().block->index)
#define gridDim (emulator::group->grid)

inline void __syncthreads() { emulator::wait(emulator::self().block->barrier, emulator::group->threads_per_block); }

template <typename T>
T __shfl_sync(unsigned, T value, int source) { return emulator::shuffle(value, source); }
template <typename T>
T __shfl_down_sync(unsigned, T value, int step) {
  return emulator::shuffle(value, static_cast<int>(threadIdx.x % 32) + step);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::shuffle(value, static_cast<int>(threadIdx.x % 32) ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  const uint64_t* const slots = emulator::exchange(static_cast<uint64_t>(vote));
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(slots[lane] != 0) << lane;
  return votes;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }

namespace autotool {

inline float exp2_fast(float x) { return exp2f(x); }
inline float log2_fast(float x) { return log2f(x); }
inline float max_nan(float a, float b) { return a != a || b != b ? __builtin_nanf("") : a > b ? a : b; }
inline unsigned char* shared_memory() { return emulator::self().block->shared; }

inline void* aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) emulator::fail("a wide access is not aligned");
  return const_cast<void*>(p);
}
inline uint4 load_16(const void* p) { return *static_cast<const uint4*>(aligned(p)); }
inline void store_16(void* p, uint4 x) { *static_cast<uint4*>(aligned(p)) = x; }

inline int cluster_rank() { return emulator::self().block->rank; }
inline int cluster_blocks() { return static_cast<int>(emulator::group->blocks.size()); }
inline void cluster_sync() { emulator::wait_for_group(); }
inline void grid_sync() { cluster_sync(); }

template <typename T>
T* cluster_peer(T* p, int rank) {
  const auto offset = reinterpret_cast<unsigned char*>(p) - shared_memory();
  return reinterpret_cast<T*>(emulator::group->blocks[rank].shared + offset);
}

struct Arrival {
  uint64_t state;  // completed phases

  void init() { state = 0; }
  void load(void* to, const void* from, uint32_t bytes) {
    if (bytes % 16 != 0) emulator::fail("a bulk copy is not a multiple of 16 bytes");
    const int delay = static_cast<int>(emulator::group->random() % 4);
    if (delay > 0) return emulator::group->copies.push_back({aligned(to), aligned(from), bytes, &state, delay});
    std::memcpy(aligned(to), aligned(from), bytes);
    ++state;
  }
  void wait(uint32_t parity) {
    while (state % 2 == parity) emulator::yield();
  }
};
inline void publish_arrivals() {}

}  // namespace autotool
