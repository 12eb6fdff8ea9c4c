// Vectors: V elements that enter and leave memory in 16-byte pieces, and are numbers of the arithmetic
// type in between.
#pragma once
#include <type_traits>

#include "../norm.h"
#include "device.cuh"

namespace fused_rmsnorm::cuda {

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

// Rounded to nearest even.
template <class T>
__device__ __forceinline__ T narrow(Acc<T> v) {
  if constexpr (sizeof(T) > 2) {
    return v;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else {
    return __float2bfloat16_rn(v);
  }
}

// a * b + c with one rounding. Compiled without -fmad: which products and sums a compiler would fuse is
// its own choice in each kernel, and the bits of a row must not hang on the kernel that its alignment picks.
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

__device__ __forceinline__ float inverse_sqrt(float v) { return 1.0f / sqrtf(v); }
__device__ __forceinline__ double inverse_sqrt(double v) { return 1.0 / sqrt(v); }

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
