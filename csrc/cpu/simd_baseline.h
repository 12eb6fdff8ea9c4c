// What every machine has: 16-byte vectors, which the compiler maps to SSE2 on x86-64. Conversions of
// 16-bit floats are integer arithmetic; f16 uses the even and odd order of bf16 here. Common calls take
// the general path: it is the conversions that cost.
#pragma once
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fused_rmsnorm::cpu {
namespace {
constexpr int kVecBytes = 16;
constexpr bool kSettleCommonCalls = false;
}  // namespace
}  // namespace fused_rmsnorm::cpu

#include "load_store.h"

namespace fused_rmsnorm::cpu {
namespace {

// aarch64 has a fused multiply-add in every core, SSE2 does not.
template <class T>
struct NativeBase {
  [[gnu::always_inline]] static Vec<T> fma(Vec<T> x, Vec<T> y, Vec<T> z) {
#if defined(__FP_FAST_FMAF) && defined(__FP_FAST_FMA)
    Vec<T> r = z;
    for (unsigned i = 0; i < kVecBytes / sizeof(T); ++i) {
      r[i] = sizeof(T) == 4 ? __builtin_fmaf(x[i], y[i], z[i]) : __builtin_fma(x[i], y[i], z[i]);
    }
    return r;
#else
    return x * y + z;
#endif
  }
  [[gnu::always_inline]] static Vec<T> min(Vec<T> x, Vec<T> y) { return x < y ? x : y; }
  [[gnu::always_inline]] static Vec<T> max(Vec<T> x, Vec<T> y) { return x > y ? x : y; }
  [[gnu::always_inline]] static Vec<T> sqrt(Vec<T> x) {
    for (unsigned i = 0; i < kVecBytes / sizeof(T); ++i) {
      x[i] = sizeof(T) == 4 ? __builtin_sqrtf(x[i]) : __builtin_sqrt(x[i]);
    }
    return x;
  }
};

template <>
struct Native<float> : NativeBase<float> {
  [[gnu::always_inline]] static float sum(Vec<float> x) { return (x[0] + x[2]) + (x[1] + x[3]); }
};

[[gnu::always_inline]] inline void stream(void* p, Vec<float> v) {
#if defined(__SSE2__)
  _mm_stream_ps(static_cast<float*>(p), v);
#else
  copy<kVecBytes>(p, &v);
#endif
}
[[gnu::always_inline]] inline void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
// These lanes of a (0 to 3) and b (4 to 7).
template <unsigned... lanes>
[[gnu::always_inline]] inline Vec<float> pick(Vec<float> a, Vec<float> b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, lanes...);
#else  // g++ 11
  return __builtin_shuffle(a, b, Words{lanes...});
#endif
}
[[gnu::always_inline]] inline Pack<float> even_odd(Pack<float> v) {
  return {pick<0, 2, 4, 6>(v.a, v.b), pick<1, 3, 5, 7>(v.a, v.b)};
}
[[gnu::always_inline]] inline Pack<float> natural(Pack<float> v) {
  return {pick<0, 4, 1, 5>(v.a, v.b), pick<2, 6, 3, 7>(v.a, v.b)};
}

template <>
struct Native<double> : NativeBase<double> {
  [[gnu::always_inline]] static double sum(Vec<double> x) { return x[0] + x[1]; }
};

template <>
struct Format<float> : PlainFormat<float> {};
template <>
struct Format<double> : PlainFormat<double> {};

[[gnu::always_inline]] inline Words choose(Words mask, Words yes, Words no) {
  return (mask & yes) | (~mask & no);
}

template <>
struct Format<bf16> : PairBf16 {
  // Nearest even; a NaN keeps its upper half and is made quiet, lest rounding carry it into a zero.
  [[gnu::always_inline]] static Words round(Words v) {
    const Words nan = (Words)((v & 0x7fffffffu) > 0x7f800000u);
    return choose(nan, v | 0x00400000u, v + 0x7fffu + ((v >> 16) & 1u));
  }
  template <Nans>
  [[gnu::always_inline]] static Raw narrow(Pack<float> v) {
    return (round((Words)v.a) >> 16) | (round((Words)v.b) & 0xffff0000u);
  }
};

template <>
struct Format<f16> : PairFormat {
  // The exponent is rebiased by a multiplication, which also normalises denormals exactly.
  [[gnu::always_inline]] static Vec<float> expand(Words half) {
    const Words magnitude = half & 0x7fffu;
    const Words special = (Words)(magnitude > 0x7bffu) & 0x7f800000u;
    const Vec<float> value = (Vec<float>)(magnitude << 13) * 0x1p112f;
    return (Vec<float>)((Words)value | special | ((half & 0x8000u) << 16));
  }
  [[gnu::always_inline]] static Pack<float> widen(Raw v) { return {expand(v & 0xffffu), expand(v >> 16)}; }
  // Below the smallest normal half, adding 0.5 leaves the rounded half in the low bits of the sum.
  [[gnu::always_inline]] static Words round(Words v) {
    const Words magnitude = v & 0x7fffffffu;
    const Words normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const Words tiny = (Words)((Vec<float>)magnitude + 0.5f) - 0x3f000000u;
    Words half = choose((Words)(magnitude < 0x38800000u), tiny, normal);
    half = choose((Words)(magnitude > 0x477fffffu), Words{} + 0x7c00u, half);
    half = choose((Words)(magnitude > 0x7f800000u), (magnitude >> 13 & 0x3ffu) | 0x7e00u, half);
    return half | (v >> 16 & 0x8000u);
  }
  template <Nans>
  [[gnu::always_inline]] static Raw narrow(Pack<float> v) {
    return round((Words)v.a) | (round((Words)v.b) << 16);
  }
};

}  // namespace
}  // namespace fused_rmsnorm::cpu
