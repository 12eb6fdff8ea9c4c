// The gates' activations, sigmoid(z) and z * sigmoid(z), and their derivatives, in fp32.
#pragma once
#include "simd.h"

namespace fused_rmsnorm::cpu {
namespace {

// exp(-z) / 2, half of it so that no z is large enough for it to overflow while sigmoid(z) is a number:
// sigmoid(z) = 0.5 / (0.5 + exp(-z) / 2). 2^n exp(-r) / 2 with n = round(-z / ln 2), r = z + n ln 2, of
// which n times the first part of ln 2 is exact, and 2^n made of exponent bits. exp(-r) is 1 - r + r^2 q(r).
//
// Within 0.982 units in the last place of every z from -89 to 86.64 (all tried). Further down it is
// infinite, further up 0 or nearly so, beside the 1/2 it is added to; NaN stays NaN. Products and sums
// are rounded apart, so that an instruction set without a fused multiply-add has the same bits.
[[gnu::always_inline]] inline Vec<float> half_exp_minus(Vec<float> z) {
  const Vec<float> low = splat(-89.4f), high = splat(87.5f);
  z = z < low ? low : z;                     // n = 129: infinity's exponent
  z = high < z ? high : z;                   // n = -126: zero's
  constexpr float kMagic = 0x1.8p23f + 126;  // a sum with it has n - 1 + 127 in its last bits
  const Vec<float> t = z * -0x1.715476p+0f + kMagic;
  const Vec<float> n = t - kMagic;
  const Vec<float> r = (z + n * 0x1.63p-1f) + n * -0x1.bd0106p-13f;
  const Vec<float> q =
      (((0x1.6a208ap-10f * r - 0x1.123b9ap-7f) * r + 0x1.5558fcp-5f) * r - 0x1.55549p-3f) * r +
      0x1.fffffcp-2f;
  return (1.0f - (r - r * r * q)) * (Vec<float>)((Words)t << 23);
}
[[gnu::always_inline]] inline Pack<float> half_exp_minus(Pack<float> z) {
  return {half_exp_minus(z.a), half_exp_minus(z.b)};
}

[[gnu::always_inline]] inline Pack<float> splat_pack(float v) { return {splat(v), splat(v)}; }

[[gnu::always_inline]] inline Pack<float> activate(Pack<float> z, bool sigmoid) {
  const Pack<float> half = splat_pack(0.5f);
  return (sigmoid ? half : z * half) / (half + half_exp_minus(z));
}

// What the steps beside a gate look for; without one there is nothing to carry, or short rows pay for it
// (9 instructions a row of the plain forward).
template <bool kGated>
struct GateOptions {
  bool sigmoid, llama;
};
template <>
struct GateOptions<false> {
  static constexpr bool sigmoid = false, llama = false;
  GateOptions(bool, bool) {}
};

struct Activation {
  Pack<float> value, slope;
};
// With s = sigmoid(z) and c = 1 - s = exp(-z) s, which does not cancel: the slope of s is s c, that of z s
// is s + z s c. Where exp(-z) leaves fp32, s is 0 or as good as 0, and so is the slope for any finite c.
[[gnu::always_inline]] inline Activation activate_with_slope(Pack<float> z, bool sigmoid) {
  const Pack<float> half = splat_pack(0.5f), h = half_exp_minus(z), s = half / (half + h);
  const Vec<float> most = splat(0x1p126f);
  const Pack<float> finite = {most < h.a ? most : h.a, most < h.b ? most : h.b};
  const Pack<float> sc = (finite * s + finite * s) * s;
  if (sigmoid) return {s, sc};
  return {z * s, s + z * sc};
}

}  // namespace
}  // namespace fused_rmsnorm::cpu
