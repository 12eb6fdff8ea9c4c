// Weight and bias of the columns that a thread works on.
#pragma once
#include "access.cuh"

namespace fused_rmsnorm::cuda {

// The columns of a vector of n elements, in the arithmetic type.
template <class W, Access kAccess, class T, int V>
__device__ __forceinline__ void widen_from(const void* vector, int n, int c, T (&out)[V]) {
  const auto v = Reader<W, V, kAccess>{static_cast<const W*>(vector), 0, n}.load(c);
#pragma unroll
  for (int j = 0; j < V; ++j) out[j] = widen(v.v[j]);
}

// The same, of x's dtype or of the arithmetic type: one kernel of unaligned rows serves both.
template <class X, class T, int V>
__device__ __forceinline__ void widen_either(const void* vector, bool wide, int n, int c, T (&out)[V]) {
  if constexpr (sizeof(X) != sizeof(T)) {
    if (wide) return widen_from<T, Access::any>(vector, n, c, out);
  }
  widen_from<X, Access::any>(vector, n, c, out);
}

// What x * r is multiplied by: offset + w, of which scale holds the w, or 1 without a weight.
template <class T, int V>
__device__ __forceinline__ void make_scale(bool weight, double offset, T (&scale)[V]) {
#pragma unroll
  for (int j = 0; j < V; ++j) scale[j] = weight ? scale[j] + static_cast<T>(offset) : 1;
}

// The scale of a thread's columns of aligned rows. Where so many bytes of registers hold it, it is made
// before the first row and serves them all; otherwise it is read where it is used.
template <class W, class T, int V, int kItems, int kBytes>
class Scale {
 public:
  static constexpr bool kHeld = V * kItems * sizeof(T) <= kBytes;

  __device__ Scale(const void* weight, double offset) : weight_(weight), offset_(offset) {}

  __device__ __forceinline__ void load(int i, int c) {
    if constexpr (kHeld) make(c, held_[i]);
  }
  // Of the first blocks, the weight comes from device memory; so that it does not start on its way only
  // after the sum, a word of each 32 bytes is asked for, and not waited for. Later blocks find it in L1.
  __device__ __forceinline__ void ask(int c) const {
    constexpr int kStep = 32 / sizeof(W);
    if (kHeld || !weight_ || blockIdx.x >= kFirstBlocks) return;
#pragma unroll
    for (int j = 0; j < V; j += kStep) {
      touch(static_cast<const W*>(weight_) + c + j);
    }
  }
  __device__ __forceinline__ void get(int i, int c, T (&scale)[V]) const {
    if constexpr (kHeld) {
#pragma unroll
      for (int j = 0; j < V; ++j) scale[j] = held_[i][j];
    } else {
      make(c, scale);
    }
  }

 private:
  static constexpr unsigned kFirstBlocks = 2048;  // more than are resident at once

  __device__ __forceinline__ void make(int c, T (&scale)[V]) const {
    if (weight_) widen_from<W, Access::aligned>(weight_, 0, c, scale);
    make_scale(weight_, offset_, scale);
  }

  const void* weight_;
  double offset_;
  T held_[kHeld ? kItems : 1][V];
};

}  // namespace fused_rmsnorm::cuda
