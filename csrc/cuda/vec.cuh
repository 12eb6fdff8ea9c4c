// Vectors: V elements that enter and leave memory in 16-byte pieces, and are numbers of the arithmetic
// type in between.
#pragma once
#include "rounding.cuh"

namespace fused_rmsnorm::cuda {

// Elements of two bytes are kept in words of two: as single ones, a compiler takes the words of a load apart
// and puts them together again where they are used.
template <class T, int V, bool kPairs>
struct alignas(16) Elements {
  T v[V];
  __device__ __forceinline__ T element(int i) const { return v[i]; }
};
template <class T, int V>
struct alignas(16) Elements<T, V, true> {
  unsigned words[V / 2];
  __device__ __forceinline__ T element(int i) const {
    const unsigned short bits = static_cast<unsigned short>(words[i / 2] >> i % 2 * 16);
    return reinterpret_cast<const T&>(bits);
  }
};
template <class T, int V>
struct Vec : Elements<T, V, sizeof(T) == 2> {
  static constexpr int kPieces = sizeof(T) * V / 16;  // of 16 bytes
  static_assert(kPieces >= 1);

  __device__ __forceinline__ uint4& piece(int i) { return reinterpret_cast<uint4*>(this)[i]; }
};

// Elements of two bytes go by pairs, as they lie in a register: of bf16 the lower one is a shift and the
// upper one a mask, where taking an element out of its register first would be an instruction more.
__device__ __forceinline__ void widen_pair(unsigned pair, __nv_bfloat16, float& low, float& high) {
  low = __uint_as_float(pair << 16);
  high = __uint_as_float(pair & 0xffff0000u);
}
__device__ __forceinline__ void widen_pair(unsigned pair, __half, float& low, float& high) {
  const float2 both = __half22float2(reinterpret_cast<const __half2&>(pair));
  low = both.x, high = both.y;
}
__device__ __forceinline__ unsigned narrowed_pair(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const unsigned&>(pair);
}
__device__ __forceinline__ unsigned narrowed_pair(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const unsigned&>(pair);
}

// A vector of the elements that element(j) returns.
template <class E, int V, class Element>
__device__ __forceinline__ Vec<E, V> gathered(Element element) {
  Vec<E, V> to;
  if constexpr (sizeof(E) == 2) {
#pragma unroll
    for (int j = 0; j < V; j += 2) {
      const E low = element(j), high = element(j + 1);
      to.words[j / 2] = reinterpret_cast<const unsigned short&>(low) |
                        unsigned{reinterpret_cast<const unsigned short&>(high)} << 16;
    }
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) to.v[j] = element(j);
  }
  return to;
}

template <class T, class E, int V>
__device__ __forceinline__ void widen(const Vec<E, V>& from, T (&to)[V]) {
  if constexpr (sizeof(E) == 2) {
#pragma unroll
    for (int j = 0; j < V; j += 2) widen_pair(from.words[j / 2], E{}, to[j], to[j + 1]);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) to[j] = widen(from.v[j]);
  }
}
// Rounded to nearest even.
template <class E, class T, int V>
__device__ __forceinline__ Vec<E, V> narrowed(const T (&from)[V]) {
  Vec<E, V> to;
  if constexpr (sizeof(E) == 2) {
#pragma unroll
    for (int j = 0; j < V; j += 2) to.words[j / 2] = narrowed_pair(from[j], from[j + 1], E{});
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) to.v[j] = narrow<E>(from[j]);
  }
  return to;
}

// Rounded to X and back: what a store and a load would do.
template <class X, class T, int V>
__device__ __forceinline__ void round_to(T (&v)[V]) {
  if constexpr (V % 2 == 0) {
    widen(narrowed<X>(v), v);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = widen(narrow<X>(v[j]));
  }
}

// run(std::true_type) or run(std::false_type): what is the same for all rows becomes a constant in code of
// its own, instead of a question at every vector (or predicates there, which take as long as what they leave
// out).
template <class Run>
__device__ __forceinline__ void settled(bool question, Run run) {
  if (question) {
    run(std::true_type{});
  } else {
    run(std::false_type{});
  }
}

}  // namespace fused_rmsnorm::cuda
