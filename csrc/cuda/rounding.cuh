// Single numbers: how each dtype (bf16, f16, f32, f64) becomes a number of the arithmetic type, how that is
// rounded back, and the operations whose rounding a compiler is not to choose.
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
// its own choice in each kernel, and the bits of a row must not depend on the kernel that its alignment
// picks.
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

__device__ __forceinline__ float inverse_sqrt(float v) { return 1.0f / sqrtf(v); }
__device__ __forceinline__ double inverse_sqrt(double v) { return 1.0 / sqrt(v); }

}  // namespace fused_rmsnorm::cuda
