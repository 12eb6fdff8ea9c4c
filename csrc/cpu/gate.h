// The gates' activations, sigmoid(z) and z * sigmoid(z), and their derivatives, in fp32.
#pragma once
#include "simd.h"

namespace fused_rmsnorm::cpu {
namespace {

// exp(-z) / 2, half of it so that no z is large enough for it to overflow while sigmoid(z) is a number:
// sigmoid(z) = 0.5 / (0.5 + exp(-z) / 2). 2^n exp(-r) / 2 with n = round(-z / ln 2), r = z + n ln 2, of
// which n times the first part of ln 2 is exact, and 2^n made of exponent bits. exp(-r) is 1 - r + r^2 q(r).
//
// Within 0.991 units in the last place of every z from -89 to 86.64 (all tried), with fused multiply-adds
// or without. Further down it is infinite, further up 0 or nearly so, beside the 1/2 it is added to; NaN
// stays NaN.
[[gnu::always_inline]] inline Vec<float> half_exp_minus(Vec<float> z) {
  const auto fma = [](Vec<float> x, Vec<float> y, Vec<float> z) { return Native<float>::fma(x, y, z); };
  z = Native<float>::max(splat(-89.4f), z);         // n = 129: infinity's exponent
  z = Native<float>::min(splat(87.5f), z);          // n = -126: zero's
  const Vec<float> magic = splat(0x1.8p23f + 126);  // a sum with it has n - 1 + 127 in its last bits
  const Vec<float> t = fma(z, splat(-0x1.715476p+0f), magic);
  const Vec<float> n = t - magic;
  const Vec<float> r = fma(n, splat(-0x1.bd0106p-13f), fma(n, splat(0x1.63p-1f), z));
  Vec<float> q = fma(splat(0x1.6a2714p-10f), r, splat(-0x1.123c8p-7f));
  q = fma(q, r, splat(0x1.5557cep-5f));
  q = fma(q, r, splat(-0x1.55548ep-3f));
  q = fma(q, r, splat(0.5f));
  return (1.0f - fma(-(r * r), q, r)) * (Vec<float>)((Words)t << 23);
}
[[gnu::always_inline]] inline Pack<float> half_exp_minus(Pack<float> z) {
  return {half_exp_minus(z.a), half_exp_minus(z.b)};
}

[[gnu::always_inline]] inline Pack<float> splat_pack(float v) { return {splat(v), splat(v)}; }

[[gnu::always_inline]] inline Pack<float> activate(Pack<float> z, bool sigmoid) {
  const Pack<float> half = splat_pack(0.5f), s = half / (half + half_exp_minus(z));
  return sigmoid ? s : z * s;
}

// What the steps beside a gate look for; without one there is nothing to carry, or short rows pay for it
// (9 instructions a row of the plain forward).
template <bool kGated>
struct GateOptions {
  bool sigmoid, llama;
  float* stash;  // of the row: see Stash
};
template <>
struct GateOptions<false> {
  static constexpr bool sigmoid = false, llama = false;
  GateOptions(bool, bool, float*) {}
};

struct Activation {
  Pack<float> value, slope;  // value: the bits of activate()
};
// With s = sigmoid(z) and c = 1 - s = exp(-z) s, which does not cancel: the slope of s is s c, that of z s
// is s + z s c. Where exp(-z) leaves fp32, s is 0 or as good as 0, and so is the slope for any finite c.
[[gnu::always_inline]] inline Activation activate_with_slope(Pack<float> z, bool sigmoid) {
  const Pack<float> half = splat_pack(0.5f), h = half_exp_minus(z), s = half / (half + h);
  const Vec<float> most = splat(0x1p126f);
  const Pack<float> finite = {Native<float>::min(most, h.a), Native<float>::min(most, h.b)};
  const Pack<float> sc = (finite * s + finite * s) * s;
  if (sigmoid) return {s, sc};
  return {z * s, s + z * sc};
}

// What the statistic of a row computed of its gate, for the write of the row: an exponential costs as many
// instructions as the rest of a step. Rows that do not fit, or whose packs the write cuts elsewhere, have it
// computed twice: row() is null.
//
// 64 KiB, which a thread's stack has and the second level of its caches.
constexpr int64_t kStashFloats = 16384;

template <int kValues>
class Stash {
 public:
  // The statistic runs `ahead` rows in front of the write.
  Stash(bool usable, int64_t n, int ahead) : stride_((n + kLanes - 1) / kLanes * kLanes) {
    while (ring_ <= ahead) ring_ *= 2;
    if (!usable || ring_ * stride_ > kStashFloats / kValues) ring_ = 0;
  }
  // Of each column one value, and a second one kStashPlane floats on.
  float* row(int64_t m) { return ring_ ? data_ + (m & (ring_ - 1)) * stride_ : nullptr; }

 private:
  static constexpr int64_t kLanes = 32;  // of the widest pack
  const int64_t stride_;
  int64_t ring_ = 2;
  alignas(64) float data_[kStashFloats + kLanes];  // a pack may be read that begins within the last one
};
constexpr int64_t kStashPlane = kStashFloats / 2;

template <>
class Stash<0> {
 public:
  Stash(bool, int64_t, int) {}
  float* row(int64_t) { return nullptr; }
};

}  // namespace
}  // namespace fused_rmsnorm::cpu
