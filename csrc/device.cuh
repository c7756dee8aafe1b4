// What the kernels ask of the device beyond CUDA C++: approximate exp2 and log2, thread-block clusters, bulk copies.
// tests/cuda_emulator.h offers the same names on a CPU, so that the kernels run in tests without a GPU.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace autotool {

// Error 2^-22, relative (log2: absolute near 1); subnormal results and arguments count as 0.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The larger one; NaN if either is, unlike fmaxf.
__device__ inline float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// 16 bytes that will not be read again soon.
__device__ inline uint4 load_16(const void* p) { return __ldcs(static_cast<const uint4*>(p)); }
__device__ inline void store_16(void* p, uint4 x) { __stcs(static_cast<uint4*>(p), x); }

__device__ inline void grid_sync() { cooperative_groups::this_grid().sync(); }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define AUTOTOOL_CLUSTERS
__device__ inline int cluster_rank() { return static_cast<int>(__clusterRelativeBlockRank()); }
__device__ inline int cluster_blocks() { return static_cast<int>(__clusterSizeInBlocks()); }

// All threads of the cluster; orders shared and global memory among them.
__device__ inline void cluster_sync() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}

// Where block `rank` of the cluster has what this block has at p in shared memory.
template <typename T>
__device__ T* cluster_peer(T* p, int rank) {
  return static_cast<T*>(__cluster_map_shared_rank(p, static_cast<unsigned>(rank)));
}

// Completes a phase when the bytes it was armed for have arrived.
struct Arrival {
  uint64_t state;

  __device__ uint32_t address() const { return static_cast<uint32_t>(__cvta_generic_to_shared(&state)); }

  __device__ void init() { asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address()) : "memory"); }

  // Starts a copy of `bytes` (a multiple of 16, both ends aligned to 16) into shared memory.
  __device__ void load(void* to, const void* from, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            static_cast<uint32_t>(__cvta_generic_to_shared(to))),
        "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(address())
        : "memory");
  }

  // Returns when the phase of this parity (0 for the first load, then alternating) is complete.
  __device__ void wait(uint32_t parity) {
    uint32_t done = 0;
    while (!done) {
      asm volatile(
          "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(address()), "r"(parity)
          : "memory");
    }
  }
};

// Makes `init` visible to the copy engine; a barrier must follow for the other threads.
__device__ inline void publish_arrivals() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
#endif

}  // namespace autotool
