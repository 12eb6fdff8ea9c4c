// The gates' activations, sigmoid(z) and z * sigmoid(z), and their derivatives, in fp32.
#pragma once
#include "../half_exp.h"
#include "load_store.h"

namespace fused_rmsnorm::cpu {
namespace {

// exp(-z) / 2: half_exp.h.
[[gnu::always_inline]] inline Vec<float> half_exp_minus(Vec<float> z) {
  const auto fma = [](Vec<float> x, Vec<float> y, Vec<float> z) { return Native<float>::fma(x, y, z); };
  z = Native<float>::max(splat(half_exp::kLeast), z);  // the second operand where one is NaN
  z = Native<float>::min(splat(half_exp::kMost), z);
  const Vec<float> magic = splat(half_exp::kMagic);
  const Vec<float> t = fma(z, splat(half_exp::kMinusLog2E), magic);
  const Vec<float> n = t - magic;
  const Vec<float> r = fma(n, splat(half_exp::kLn2Low), fma(n, splat(half_exp::kLn2High), z));
  Vec<float> q = fma(splat(half_exp::kQ4), r, splat(half_exp::kQ3));
  q = fma(q, r, splat(half_exp::kQ2));
  q = fma(q, r, splat(half_exp::kQ1));
  q = fma(q, r, splat(half_exp::kQ0));
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

// What the steps of gated norms ask for. Without a gate this is empty: to carry it costs the plain forward
// 9 instructions a row.
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
  const Vec<float> most = splat(half_exp::kMostFactor);
  const Pack<float> finite = {Native<float>::min(most, h.a), Native<float>::min(most, h.b)};
  const Pack<float> sc = (finite * s + finite * s) * s;
  if (sigmoid) return {s, sc};
  return {z * s, s + z * sc};
}

// Keeps what the statistic of a row computed from its gate until the row is written: an exponential costs as
// many instructions as the rest of a step. For rows that do not fit, and for those whose write begins its
// packs elsewhere, row() is null, and it is computed twice.
//
// 64 KiB: a thread's stack has room for them, and so has the second level of its caches.
constexpr int64_t kStashFloats = 16384;

template <int kValues>
class Stash {
 public:
  // The statistic runs `ahead` rows in front of the write.
  Stash(bool usable, int64_t n, int ahead) : stride_(stride(n)), ring_(usable ? ring(n, ahead) : 0) {}
  static bool fits(int64_t n, int ahead) { return ring(n, ahead); }
  // Of each column one value, and a second one kStashPlane floats on.
  float* row(int64_t m) { return ring_ ? data_ + (m & (ring_ - 1)) * stride_ : nullptr; }

 private:
  static constexpr int64_t kLanes = 32;  // of the widest pack
  static int64_t stride(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
  // How many rows are kept: 0 if they do not fit.
  static int64_t ring(int64_t n, int ahead) {
    int64_t rows = 2;
    while (rows <= ahead) rows *= 2;
    return rows * stride(n) > kStashFloats / kValues ? 0 : rows;
  }
  const int64_t stride_, ring_;
  alignas(64) float data_[kStashFloats + kLanes];  // a pack may be read that begins within the last one
};
constexpr int64_t kStashPlane = kStashFloats / 2;

template <>
class Stash<0> {
 public:
  Stash(bool, int64_t, int) {}
  static bool fits(int64_t, int) { return false; }
  float* row(int64_t) { return nullptr; }
};

}  // namespace
}  // namespace fused_rmsnorm::cpu
