// The gates' activations, sigmoid(z) and z * sigmoid(z), and their slopes: the formula of half_exp.h, so
// the bits are those of the CPU's kernels.
#pragma once
#include "../half_exp.h"
#include "vec.cuh"

namespace fused_rmsnorm::cuda {

__device__ __forceinline__ float half_exp_minus(float z) {
  z = z < half_exp::kLeast ? half_exp::kLeast : z;  // not fminf, which would take the number where one is NaN
  z = z > half_exp::kMost ? half_exp::kMost : z;
  const float t = fmaf(z, half_exp::kMinusLog2E, half_exp::kMagic), n = t - half_exp::kMagic;
  const float r = fmaf(n, half_exp::kLn2Low, fmaf(n, half_exp::kLn2High, z));
  float q = fmaf(half_exp::kQ4, r, half_exp::kQ3);
  q = fmaf(q, r, half_exp::kQ2);
  q = fmaf(q, r, half_exp::kQ1);
  q = fmaf(q, r, half_exp::kQ0);
  return (1.0f - fmaf(-(r * r), q, r)) * __uint_as_float(__float_as_uint(t) << 23);
}

__device__ __forceinline__ float activate(float z, bool sigmoid) {
  const float s = 0.5f / (0.5f + half_exp_minus(z));
  return sigmoid ? s : z * s;
}

struct Activation {
  float value, slope;  // value: the bits of activate()
};
// With s = sigmoid(z) and c = 1 - s = exp(-z) s, which does not cancel: the slope of s is s c, that of z s
// is s + z s c. Where exp(-z) leaves fp32, s is 0 or as good as 0, and so is the slope for any finite c.
__device__ __forceinline__ Activation activate_with_slope(float z, bool sigmoid) {
  const float h = half_exp_minus(z), s = 0.5f / (0.5f + h);
  const float finite = h > half_exp::kMostFactor ? half_exp::kMostFactor : h;
  const float sc = (finite * s + finite * s) * s;
  if (sigmoid) return {s, sc};
  return {z * s, s + z * sc};
}

}  // namespace fused_rmsnorm::cuda
