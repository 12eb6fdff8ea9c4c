// AVX2 + FMA + F16C.
#pragma once
#include <immintrin.h>

namespace fused_rmsnorm::cpu {
namespace {
constexpr int kVecBytes = 32;
constexpr bool kSettleCommonCalls = true;
}  // namespace
}  // namespace fused_rmsnorm::cpu

#include "load_store.h"

namespace fused_rmsnorm::cpu {
namespace {

template <>
struct Native<float> {
  [[gnu::always_inline]] static __m256 fma(__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }
  [[gnu::always_inline]] static __m256 sqrt(__m256 x) { return _mm256_sqrt_ps(x); }
  [[gnu::always_inline]] static __m256 min(__m256 x, __m256 y) { return _mm256_min_ps(x, y); }
  [[gnu::always_inline]] static __m256 max(__m256 x, __m256 y) { return _mm256_max_ps(x, y); }
  [[gnu::always_inline]] static float sum(__m256 x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  // Lane i of the result is sum(x[i]): lanes meet as they do there, those of several vectors in one addition.
  [[gnu::always_inline]] static __m256 sums(const __m256* x) {
    const auto halves = [](__m256 p, __m256 q) {
      return _mm256_add_ps(_mm256_permute2f128_ps(p, q, 0x20), _mm256_permute2f128_ps(p, q, 0x31));
    };
    const auto quarters = [](__m256 p, __m256 q) {
      return _mm256_add_ps(_mm256_shuffle_ps(p, q, 0x44), _mm256_shuffle_ps(p, q, 0xee));
    };
    const __m256 p = quarters(halves(x[0], x[4]), halves(x[1], x[5]));
    const __m256 q = quarters(halves(x[2], x[6]), halves(x[3], x[7]));
    return _mm256_add_ps(_mm256_shuffle_ps(p, q, 0x88), _mm256_shuffle_ps(p, q, 0xdd));
  }
};

[[gnu::always_inline]] inline void stream(void* p, Vec<float> v) {
  _mm256_stream_ps(static_cast<float*>(p), v);
}
[[gnu::always_inline]] inline void fence() { _mm_sfence(); }
[[gnu::always_inline]] inline Pack<float> even_odd(Pack<float> v) {
  const __m256 p = _mm256_permute2f128_ps(v.a, v.b, 0x20), q = _mm256_permute2f128_ps(v.a, v.b, 0x31);
  return {_mm256_shuffle_ps(p, q, 0x88), _mm256_shuffle_ps(p, q, 0xdd)};
}
[[gnu::always_inline]] inline Pack<float> natural(Pack<float> v) {
  const __m256 p = _mm256_unpacklo_ps(v.a, v.b), q = _mm256_unpackhi_ps(v.a, v.b);
  return {_mm256_permute2f128_ps(p, q, 0x20), _mm256_permute2f128_ps(p, q, 0x31)};
}

template <>
struct Native<double> {
  [[gnu::always_inline]] static __m256d fma(__m256d x, __m256d y, __m256d z) {
    return _mm256_fmadd_pd(x, y, z);
  }
  [[gnu::always_inline]] static __m256d sqrt(__m256d x) { return _mm256_sqrt_pd(x); }
  [[gnu::always_inline]] static double sum(__m256d x) { return (x[0] + x[2]) + (x[1] + x[3]); }
};

template <>
struct Format<float> : PlainFormat<float> {};
template <>
struct Format<double> : PlainFormat<double> {};

template <>
struct Format<bf16> : PairBf16 {
  // Nearest even on the pair at once, in 16-bit lanes: the upper half grows by one where the lower
  // half exceeds 0x8000, or equals it and the upper half is odd. An upper half of all ones, which a NaN
  // may have, must not grow into a zero.
  template <Nans kNans>
  [[gnu::always_inline]] static Raw narrow(Pack<float> v) {
    const __m256i p = _mm256_castps_si256(v.a), q = _mm256_castps_si256(v.b);
    const __m256i high = _mm256_blend_epi16(_mm256_srli_epi32(p, 16), q, 0xaa);
    const __m256i low = _mm256_blend_epi16(p, _mm256_slli_epi32(q, 16), 0xaa);
    __m256i less = _mm256_andnot_si256(high, _mm256_set1_epi16(1));
    if constexpr (kNans == Nans::any) {
      const __m256i ones = _mm256_cmpeq_epi16(_mm256_add_epi16(high, high), _mm256_set1_epi16(-2));
      less = _mm256_or_si256(less, ones);
    }
    const __m256i up = _mm256_srai_epi16(_mm256_subs_epu16(low, less), 15);
    return (Raw)_mm256_sub_epi16(high, up);
  }
};

template <>
struct Format<f16> {
  struct Raw {
    __m128i lo, hi;
  };
  static constexpr bool kEvenOdd = false;
  [[gnu::always_inline]] static Raw load(const void* p) {
    const auto* q = static_cast<const __m128i*>(p);
    return {_mm_loadu_si128(q), _mm_loadu_si128(q + 1)};
  }
  [[gnu::always_inline]] static void store(void* p, Raw v) {
    auto* q = static_cast<__m128i*>(p);
    _mm_storeu_si128(q, v.lo);
    _mm_storeu_si128(q + 1, v.hi);
  }
  [[gnu::always_inline]] static void stream(void* p, Raw v) {
    _mm256_stream_si256(static_cast<__m256i*>(p), _mm256_set_m128i(v.hi, v.lo));
  }
  [[gnu::always_inline]] static Pack<float> widen(Raw v) {
    return {_mm256_cvtph_ps(v.lo), _mm256_cvtph_ps(v.hi)};
  }
  template <Nans>
  [[gnu::always_inline]] static Raw narrow(Pack<float> v) {
    return {_mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT)};
  }
};

// Masked loads end a row without a copy. The first `count` of 16 words of 32 bits, in two halves.
alignas(64) constexpr int32_t kMasks[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
[[gnu::always_inline]] inline __m256i first(int count, int half) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMasks + 16 - count + 8 * half));
}

template <>
struct Tail<float> : StoreTail<float> {
  [[gnu::always_inline]] static Pack<float> load(const float* p, int count) {
    return {_mm256_maskload_ps(p, first(count, 0)), _mm256_maskload_ps(p + 8, first(count, 1))};
  }
};

template <>
struct Tail<double> : StoreTail<double> {
  [[gnu::always_inline]] static Pack<double> load(const double* p, int count) {
    return {_mm256_maskload_pd(p, first(2 * count, 0)), _mm256_maskload_pd(p + 4, first(2 * count, 1))};
  }
};

// Pairs of 16-bit elements by mask, and an odd last one beside them.
[[gnu::always_inline]] inline __m256i load_pairs(const void* p, int count) {
  const int pairs = count / 2;
  const __m256i whole = _mm256_maskload_epi32(static_cast<const int*>(p), first(pairs, 0));
  if (count % 2 == 0) return whole;
  const uint16_t last = static_cast<const uint16_t*>(p)[count - 1];
  const __m256i at = _mm256_andnot_si256(first(pairs, 0), first(pairs + 1, 0));
  return _mm256_or_si256(whole, _mm256_and_si256(_mm256_set1_epi32(last), at));
}

template <>
struct Tail<bf16> : StoreTail<bf16> {
  [[gnu::always_inline]] static Words load(const bf16* p, int count) { return (Words)load_pairs(p, count); }
};

template <>
struct Tail<f16> : StoreTail<f16> {
  [[gnu::always_inline]] static Format<f16>::Raw load(const f16* p, int count) {
    const __m256i v = load_pairs(p, count);
    return {_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)};
  }
};

}  // namespace
}  // namespace fused_rmsnorm::cpu
