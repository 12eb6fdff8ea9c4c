// One thread's sum of very many terms, with an error that does not grow with their number.
#pragma once
#include "vec.cuh"

namespace fused_rmsnorm::cuda {

// 32 terms are added one after the other, then 32 such sums, and so on: of m <= 2^20 terms each goes
// through at most 4 * 32 additions. One running sum would round m times, and stop growing at
// 2^24 terms. The count is the same for all threads of a warp, except at the end.
template <class T>
class Fold {
 public:
  __device__ __forceinline__ void add(T term) {
    level_[0] += term;
    ++count_;
#pragma unroll
    for (int i = 1; i < kLevels; ++i) {
      if (count_ & ((1u << 5 * i) - 1)) break;
      level_[i] += level_[i - 1];
      level_[i - 1] = 0;
    }
  }
  __device__ __forceinline__ T total() const {
    T sum = level_[0];
#pragma unroll
    for (int i = 1; i < kLevels; ++i) sum += level_[i];
    return sum;
  }

 private:
  static constexpr int kLevels = 4;
  T level_[kLevels] = {};
  unsigned count_ = 0;
};

}  // namespace fused_rmsnorm::cuda
