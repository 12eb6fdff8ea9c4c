// Vectors: V elements that enter and leave memory in 16-byte pieces, and are numbers of the arithmetic
// type in between.
#pragma once
#include "rounding.cuh"

namespace fused_rmsnorm::cuda {

template <class T, int V>
struct alignas(16) Vec {
  static constexpr int kPieces = sizeof(T) * V / 16;  // of 16 bytes
  static_assert(kPieces >= 1);
  T v[V];

  __device__ __forceinline__ uint4& piece(int i) { return reinterpret_cast<uint4*>(v)[i]; }
};

template <class T, class E, int V>
__device__ __forceinline__ void widen(const Vec<E, V>& from, T (&to)[V]) {
#pragma unroll
  for (int j = 0; j < V; ++j) to[j] = widen(from.v[j]);
}
template <class E, class T, int V>
__device__ __forceinline__ Vec<E, V> narrowed(const T (&from)[V]) {
  Vec<E, V> to;
#pragma unroll
  for (int j = 0; j < V; ++j) to.v[j] = narrow<E>(from[j]);
  return to;
}

}  // namespace fused_rmsnorm::cuda
