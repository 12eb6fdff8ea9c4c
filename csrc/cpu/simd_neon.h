// NEON, as every aarch64 machine has it.
#pragma once
#include <arm_neon.h>

namespace fused_rmsnorm::cpu {
namespace {
constexpr int kVecBytes = 16;
constexpr bool kSettleCommonCalls = true;
}  // namespace
}  // namespace fused_rmsnorm::cpu

#include "load_store.h"

namespace fused_rmsnorm::cpu {
namespace {

template <>
struct Native<float> {
  [[gnu::always_inline]] static Vec<float> fma(Vec<float> x, Vec<float> y, Vec<float> z) {
    return (Vec<float>)vfmaq_f32((float32x4_t)z, (float32x4_t)x, (float32x4_t)y);
  }
  [[gnu::always_inline]] static Vec<float> min(Vec<float> x, Vec<float> y) {
    return (Vec<float>)vminq_f32((float32x4_t)x, (float32x4_t)y);
  }
  [[gnu::always_inline]] static Vec<float> max(Vec<float> x, Vec<float> y) {
    return (Vec<float>)vmaxq_f32((float32x4_t)x, (float32x4_t)y);
  }
  [[gnu::always_inline]] static Vec<float> sqrt(Vec<float> x) {
    return (Vec<float>)vsqrtq_f32((float32x4_t)x);
  }
  [[gnu::always_inline]] static float sum(Vec<float> x) { return vaddvq_f32((float32x4_t)x); }
  // Lane i of the result is sum(x[i]): vaddvq_f32 adds neighbours, too.
  [[gnu::always_inline]] static Vec<float> sums(const Vec<float>* x) {
    const auto pairs = [](Vec<float> p, Vec<float> q) {
      return (Vec<float>)vpaddq_f32((float32x4_t)p, (float32x4_t)q);
    };
    return pairs(pairs(x[0], x[1]), pairs(x[2], x[3]));
  }
};

// An ordinary store: NEON's hint for streams (stnp) takes pairs of vectors only.
[[gnu::always_inline]] inline void stream(void* p, Vec<float> v) { copy<kVecBytes>(p, &v); }
[[gnu::always_inline]] inline void fence() {}
[[gnu::always_inline]] inline Pack<float> even_odd(Pack<float> v) {
  const float32x4_t a = (float32x4_t)v.a, b = (float32x4_t)v.b;
  return {(Vec<float>)vuzp1q_f32(a, b), (Vec<float>)vuzp2q_f32(a, b)};
}
[[gnu::always_inline]] inline Pack<float> natural(Pack<float> v) {
  const float32x4_t a = (float32x4_t)v.a, b = (float32x4_t)v.b;
  return {(Vec<float>)vzip1q_f32(a, b), (Vec<float>)vzip2q_f32(a, b)};
}

template <>
struct Native<double> {
  [[gnu::always_inline]] static Vec<double> fma(Vec<double> x, Vec<double> y, Vec<double> z) {
    return (Vec<double>)vfmaq_f64((float64x2_t)z, (float64x2_t)x, (float64x2_t)y);
  }
  [[gnu::always_inline]] static Vec<double> sqrt(Vec<double> x) {
    return (Vec<double>)vsqrtq_f64((float64x2_t)x);
  }
  [[gnu::always_inline]] static double sum(Vec<double> x) { return vaddvq_f64((float64x2_t)x); }
};

template <>
struct Format<float> : PlainFormat<float> {};
template <>
struct Format<double> : PlainFormat<double> {};

template <>
struct Format<bf16> : PairBf16 {
  // As in simd_avx2.h. Shifts that insert and shifts that add make it five instructions a pack.
  template <Nans kNans>
  [[gnu::always_inline]] static Raw narrow(Pack<float> v) {
    const uint32x4_t p = (uint32x4_t)v.a, q = (uint32x4_t)v.b;
    const uint16x8_t high = vreinterpretq_u16_u32(vsriq_n_u32(q, p, 16));
    const uint16x8_t low = vreinterpretq_u16_u32(vsliq_n_u32(p, q, 16));
    uint16x8_t less = vbicq_u16(vdupq_n_u16(1), high);
    if constexpr (kNans == Nans::any) {
      less = vorrq_u16(less, vceqq_u16(vaddq_u16(high, high), vdupq_n_u16(0xfffe)));
    }
    return (Raw)vsraq_n_u16(high, vqsubq_u16(low, less), 15);
  }
};

template <>
struct Format<f16> {
  using Raw = float16x8_t;
  static constexpr bool kEvenOdd = false;
  [[gnu::always_inline]] static Raw load(const void* p) {
    Raw v;
    copy<kVecBytes>(&v, p);
    return v;
  }
  [[gnu::always_inline]] static void store(void* p, Raw v) { copy<kVecBytes>(p, &v); }
  [[gnu::always_inline]] static void stream(void* p, Raw v) { store(p, v); }
  [[gnu::always_inline]] static Pack<float> widen(Raw v) {
    return {(Vec<float>)vcvt_f32_f16(vget_low_f16(v)), (Vec<float>)vcvt_high_f32_f16(v)};
  }
  template <Nans>
  [[gnu::always_inline]] static Raw narrow(Pack<float> v) {
    return vcvt_high_f16_f32(vcvt_f16_f32((float32x4_t)v.a), (float32x4_t)v.b);
  }
};

}  // namespace
}  // namespace fused_rmsnorm::cpu
