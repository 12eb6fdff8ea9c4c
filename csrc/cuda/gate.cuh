// The gates' activations, sigmoid(z) and z * sigmoid(z), and their slopes. Of fp32 by the formula of
// half_exp.h: the bits are those of the CPU's kernels. Of bf16 and fp16 by the processor's own
// approximations: a quarter of the instructions, and an error of at most a thirtieth of fp16's rounding, or a
// 250th of bf16's.
#pragma once
#include "../half_exp.h"
#include "vec.cuh"

namespace fused_rmsnorm::cuda {

// exp(-z), times what the magic number makes of it, of a z from kLeast to kMost.
__device__ __forceinline__ float exp_minus(float z, float magic) {
  const float t = fmaf(z, half_exp::kMinusLog2E, magic), n = t - magic;
  const float r = fmaf(n, half_exp::kLn2Low, fmaf(n, half_exp::kLn2High, z));
  float q = fmaf(half_exp::kQ4, r, half_exp::kQ3);
  q = fmaf(q, r, half_exp::kQ2);
  q = fmaf(q, r, half_exp::kQ1);
  q = fmaf(q, r, half_exp::kQ0);
  return (1.0f - fmaf(-(r * r), q, r)) * __uint_as_float(__float_as_uint(t) << 23);
}

// 1 / d rounded to nearest, for d from 1 to 2^125. These are the instructions that 1.0f / d becomes (on
// sm_80 to sm_120), without those that ask whether d is in the range where they are enough.
__device__ __forceinline__ float inverse(float d) {
  const float r = nearly_inverse(d);
  return fmaf(r, fmaf(-d, r, 1.0f), r);
}

struct Activation {
  float value, slope;
};
// From s = sigmoid(z) and its slope.
__device__ __forceinline__ Activation made_of(float z, float s, float sc, bool sigmoid) {
  return sigmoid ? Activation{s, sc} : Activation{z * s, s + z * sc};
}
// With s = sigmoid(z) and c = 1 - s = exp(-z) s, which does not cancel: the slope of s is s c, that of z s
// is s + z s c. Where exp(-z) leaves fp32, s is 0 or as good as 0, and so is the slope for any finite c.
// kNear: |z| is at most half_exp::kUsual.
template <bool kNear>
__device__ __forceinline__ Activation activation(float z, bool sigmoid) {
  float s, sc;
  if constexpr (kNear) {
    const float e = exp_minus(z, half_exp::kMagic + 1);
    s = inverse(1.0f + e);
    sc = e * s * s;
  } else {
    float limited = z < half_exp::kLeast ? half_exp::kLeast : z;  // fminf would take the number for a NaN
    limited = limited > half_exp::kMost ? half_exp::kMost : limited;
    const float h = exp_minus(limited, half_exp::kMagic);
    const float finite = h > half_exp::kMostFactor ? half_exp::kMostFactor : h;
    s = 0.5f / (0.5f + h);
    sc = (finite * s + finite * s) * s;
  }
  return made_of(z, s, sc, sigmoid);
}
// The same within (10 + 1.25 |z|) 2^-24 of the terms that are added, and 0 below -87.3.
__device__ __forceinline__ Activation quick_activation(float z, bool sigmoid) {
  const float e = nearly_exp2(z * half_exp::kMinusLog2E), s = nearly_inverse(1.0f + e);
  const float finite = e > half_exp::kMostFactor ? half_exp::kMostFactor : e;  // NaN stays NaN
  return made_of(z, s, finite * s * s, sigmoid);
}

// Of V numbers of X. Of fp32 there is one question for all of them, whether each is near 0, in place of those
// that a division and the limits ask of each: a third of the instructions of a gate.
template <class X, int V>
__device__ __forceinline__ void activate(const float (&z)[V], bool sigmoid, float (&value)[V],
                                         float (&slope)[V]) {
  const auto make = [&](auto of) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const Activation a = of(z[j]);
      value[j] = a.value, slope[j] = a.slope;
    }
  };
  if constexpr (sizeof(X) == 2) {
    make([&](float v) { return quick_activation(v, sigmoid); });
  } else {
    bool near = true;
#pragma unroll
    for (int j = 0; j < V; ++j) near &= fabsf(z[j]) <= half_exp::kUsual;  // not so of NaN
    settled(near, [&](auto is_near) {
      make([&](float v) { return activation<decltype(is_near)::value>(v, sigmoid); });
    });
  }
}
template <class X, int V>
__device__ __forceinline__ void activate(const float (&z)[V], bool sigmoid, float (&value)[V]) {
  float slope[V];
  activate<X>(z, sigmoid, value, slope);
}

}  // namespace fused_rmsnorm::cuda
