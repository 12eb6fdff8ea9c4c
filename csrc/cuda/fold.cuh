// One thread's sum of very many terms, with an error that does not grow with their number.
#pragma once
#include "vec.cuh"

namespace fused_rmsnorm::cuda {

// 32 terms are added one after the other, then 32 such sums, and so on: of m <= 2^20 terms each goes
// through at most 4 * 32 additions. One running sum would round m times, and stop growing at
// 2^24 terms. The count is the same for all threads of a warp, except at the end. V sums side by side.
template <class T, int V = 1>
class Fold {
 public:
  __device__ __forceinline__ void add(const T (&terms)[V]) {
    add_to(0, terms);
    ++count_;
#pragma unroll
    for (int i = 1; i < kLevels; ++i) {
      if (count_ & ((1u << 5 * i) - 1)) break;
      add_to(i, level_[i - 1]);
#pragma unroll
      for (int j = 0; j < V; ++j) level_[i - 1][j] = 0;
    }
  }
  __device__ __forceinline__ void add(T term) {
    const T terms[1] = {term};
    add(terms);
  }

  // Leaves the sums in `to`.
  __device__ __forceinline__ void total(T (&to)[V]) {
#pragma unroll
    for (int i = 1; i < kLevels; ++i) add_to(0, level_[i]);
#pragma unroll
    for (int j = 0; j < V; ++j) to[j] = level_[0][j];
  }
  __device__ __forceinline__ T total() {
    T sum[1];
    total(sum);
    return sum[0];
  }

 private:
  __device__ __forceinline__ void add_to(int i, const T (&terms)[V]) {
#pragma unroll
    for (int j = 0; j < V; ++j) level_[i][j] += terms[j];
  }

  static constexpr int kLevels = 4;
  T level_[kLevels][V] = {};
  unsigned count_ = 0;
};

}  // namespace fused_rmsnorm::cuda
