// The sum of one number per thread over the threads of a row, in an order that depends on the
// launch plan alone: lanes in pairs, pairs of pairs and so on, then warps one after the other, then blocks of
// the cluster one after the other. Every thread gets the sum.
#pragma once
#include "device.cuh"
#include "plan.h"

#if defined(__CUDACC__)
#include <cub/warp/warp_reduce.cuh>
#endif

namespace fused_rmsnorm::cuda {

// Over each kLanes lanes of a warp. All lanes add the same numbers in the same pairs, so all have the sum's
// bits. (cub::WarpReduce of less than a warp passes a mask of its own lanes, whose check by MATCH and REDUX
// takes longer than the sum.)
template <int kLanes, class T>
__device__ __forceinline__ T lanes_sum(T v) {
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) v += __shfl_xor_sync(0xffffffffu, v, offset, kLanes);
  return v;
}

// Over the warp, in the same pairs, for lane 0 only.
template <class T>
__device__ __forceinline__ T warp_sum(T v) {
#if defined(__CUDACC__)
  using Reduce = cub::WarpReduce<T>;
  typename Reduce::TempStorage none;  // empty: these sums travel by shuffles
  return Reduce(none).Sum(v);
#else
  for (int offset = 1; offset < 32; offset *= 2) v += __shfl_down_sync(0xffffffffu, v, offset, 32);
  return v;
#endif
}

// Scratch in shared memory: two sets of a slot per warp and a slot per block of the cluster, used in
// turn, so that one barrier a row is enough: whoever writes a set again has passed the barrier of
// the other one, which everybody reaches only after reading the first.
template <class T, int kThreads, bool kCluster>
class RowSum {
 public:
  __device__ explicit RowSum(int cluster) : cluster_(cluster) {
    if constexpr (kCluster) Cluster::appear();  // waited for below, with the first row's loads between
  }

  // Called by all threads of the block together.
  __device__ __forceinline__ T operator()(T v) {
    if constexpr (kThreads <= 32) {
      return lanes_sum<kThreads>(v);
    } else {
      constexpr int kWarps = kThreads / 32;
      T* const set = reinterpret_cast<T*>(shared_memory()) + turn_ * (32 + kMaxCluster);
      turn_ ^= 1;
      const int row = threadIdx.x / kThreads;  // of those side by side
      v = warp_sum(v);
      if (threadIdx.x % 32 == 0) set[threadIdx.x / 32] = v;
      __syncthreads();
      v = 0;
      constexpr int kTogether = kWarps % (16 / sizeof(T)) == 0 ? 16 / sizeof(T) : 1;
      struct alignas(sizeof(T) * kTogether) Slots {
        T v[kTogether];
      };
#pragma unroll
      for (int i = 0; i < kWarps; i += kTogether) {
        const Slots s = *reinterpret_cast<const Slots*>(set + row * kWarps + i);
#pragma unroll
        for (int j = 0; j < kTogether; ++j) v += s.v[j];
      }
      if constexpr (kCluster) {
        T* const slots = set + 32;
        if (!met_) Cluster::wait();
        met_ = true;
        if (threadIdx.x < static_cast<unsigned>(cluster_))
          Cluster::peer(slots, threadIdx.x)[Cluster::rank()] = v;
        Cluster::arrive();
        Cluster::wait();
        v = 0;
#pragma unroll
        for (int i = 0; i < kMaxCluster; ++i) {
          if (i < cluster_) v += slots[i];
        }
      }
      return v;
    }
  }

 private:
  int cluster_, turn_ = 0;
  bool met_ = false;
};

}  // namespace fused_rmsnorm::cuda
