// AVX-512 (F, BW, VL, DQ).
#pragma once
#include <immintrin.h>

namespace fused_rmsnorm::cpu {
namespace {
constexpr int kVecBytes = 64;
constexpr bool kSettleCommonCalls = true;
}  // namespace
}  // namespace fused_rmsnorm::cpu

#include "load_store.h"

namespace fused_rmsnorm::cpu {
namespace {

template <>
struct Native<float> {
  [[gnu::always_inline]] static __m512 fma(__m512 x, __m512 y, __m512 z) { return _mm512_fmadd_ps(x, y, z); }
  [[gnu::always_inline]] static __m512 sqrt(__m512 x) { return _mm512_sqrt_ps(x); }
  [[gnu::always_inline]] static __m512 min(__m512 x, __m512 y) { return _mm512_min_ps(x, y); }
  [[gnu::always_inline]] static __m512 max(__m512 x, __m512 y) { return _mm512_max_ps(x, y); }
  [[gnu::always_inline]] static float sum(__m512 x) { return _mm512_reduce_add_ps(x); }
  // As in simd_avx2.h.
  [[gnu::always_inline]] static __m512 sums(const __m512* x) {
    const auto halves = [x](int i, int j) {
      return _mm512_add_ps(_mm512_shuffle_f32x4(x[i], x[j], 0x44), _mm512_shuffle_f32x4(x[i], x[j], 0xee));
    };
    const auto quarters = [halves](int i) {
      const __m512 p = halves(i, i + 4), q = halves(i + 8, i + 12);
      return _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xdd));
    };
    const auto pairs = [](__m512 p, __m512 q) {
      return _mm512_add_ps(_mm512_shuffle_ps(p, q, 0x44), _mm512_shuffle_ps(p, q, 0xee));
    };
    const __m512 p = pairs(quarters(0), quarters(1)), q = pairs(quarters(2), quarters(3));
    return _mm512_add_ps(_mm512_shuffle_ps(p, q, 0x88), _mm512_shuffle_ps(p, q, 0xdd));
  }
};

[[gnu::always_inline]] inline void stream(void* p, Vec<float> v) {
  _mm512_stream_ps(static_cast<float*>(p), v);
}
[[gnu::always_inline]] inline void fence() { _mm_sfence(); }
[[gnu::always_inline]] inline __m512i even() {
  return _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
}
[[gnu::always_inline]] inline Pack<float> even_odd(Pack<float> v) {
  const __m512i odd = _mm512_or_si512(even(), _mm512_set1_epi32(1));
  return {_mm512_permutex2var_ps(v.a, even(), v.b), _mm512_permutex2var_ps(v.a, odd, v.b)};
}
[[gnu::always_inline]] inline Pack<float> natural(Pack<float> v) {
  const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  return {_mm512_permutex2var_ps(v.a, first, v.b), _mm512_permutex2var_ps(v.a, second, v.b)};
}

template <>
struct Native<double> {
  [[gnu::always_inline]] static __m512d fma(__m512d x, __m512d y, __m512d z) {
    return _mm512_fmadd_pd(x, y, z);
  }
  [[gnu::always_inline]] static __m512d sqrt(__m512d x) { return _mm512_sqrt_pd(x); }
  [[gnu::always_inline]] static double sum(__m512d x) { return _mm512_reduce_add_pd(x); }
};

template <>
struct Format<float> : PlainFormat<float> {};
template <>
struct Format<double> : PlainFormat<double> {};

template <>
struct Format<bf16> : PairBf16 {
  // As in simd_avx2.h, with the comparisons in mask registers. Not AVX512_BF16's conversion: it flushes
  // subnormal numbers, and with a test for those it gained 3 % in cache and nothing from memory.
  template <Nans kNans>
  [[gnu::always_inline]] static Raw narrow(Pack<float> v) {
    const __m512i p = _mm512_castps_si512(v.a), q = _mm512_castps_si512(v.b);
    // One shuffle under a mask of bytes moves the words of one half beside those of the other: 5 % faster
    // than a shift and a blend.
    const __mmask64 even = 0x3333333333333333, odd = ~even;
    const __m512i swap = _mm512_set4_epi32(0x0d0c0f0e, 0x09080b0a, 0x05040706, 0x01000302);
    const __m512i high = _mm512_mask_shuffle_epi8(q, even, p, swap);
    const __m512i low = _mm512_mask_shuffle_epi8(p, odd, q, swap);
    const __m512i less = _mm512_andnot_si512(high, _mm512_set1_epi16(1));
    __mmask32 up = _mm512_movepi16_mask(_mm512_subs_epu16(low, less));
    if constexpr (kNans == Nans::any) {
      up &= _mm512_cmpneq_epi16_mask(_mm512_add_epi16(high, high), _mm512_set1_epi16(-2));
    }
    return (Raw)_mm512_mask_add_epi16(high, up, high, _mm512_set1_epi16(1));
  }
};

template <>
struct Format<f16> {
  struct Raw {
    __m256i lo, hi;
  };
  static constexpr bool kEvenOdd = false;
  [[gnu::always_inline]] static Raw load(const void* p) {
    const auto* q = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
  }
  [[gnu::always_inline]] static void store(void* p, Raw v) {
    auto* q = static_cast<__m256i*>(p);
    _mm256_storeu_si256(q, v.lo);
    _mm256_storeu_si256(q + 1, v.hi);
  }
  [[gnu::always_inline]] static void stream(void* p, Raw v) {
    _mm512_stream_si512(static_cast<__m512i*>(p), _mm512_inserti64x4(_mm512_castsi256_si512(v.lo), v.hi, 1));
  }
  [[gnu::always_inline]] static Pack<float> widen(Raw v) {
    return {_mm512_cvtph_ps(v.lo), _mm512_cvtph_ps(v.hi)};
  }
  template <Nans>
  [[gnu::always_inline]] static Raw narrow(Pack<float> v) {
    return {_mm512_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT), _mm512_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT)};
  }
};

// Masks end a row without a copy. The lower `count` bits of a 32-bit mask, 0 <= count < 32.
[[gnu::always_inline]] inline uint32_t first(int count) { return (1u << count) - 1; }

template <>
struct Tail<float> {
  [[gnu::always_inline]] static Pack<float> load(const float* p, int count) {
    const uint32_t m = first(count);
    return {_mm512_maskz_loadu_ps(m, p), _mm512_maskz_loadu_ps(m >> 16, p + 16)};
  }
  [[gnu::always_inline]] static void store(float* p, Pack<float> v, int count) {
    const uint32_t m = first(count);
    _mm512_mask_storeu_ps(p, m, v.a);
    _mm512_mask_storeu_ps(p + 16, m >> 16, v.b);
  }
};

template <>
struct Tail<double> {
  [[gnu::always_inline]] static Pack<double> load(const double* p, int count) {
    const uint32_t m = first(count);
    return {_mm512_maskz_loadu_pd(m, p), _mm512_maskz_loadu_pd(m >> 8, p + 8)};
  }
  [[gnu::always_inline]] static void store(double* p, Pack<double> v, int count) {
    const uint32_t m = first(count);
    _mm512_mask_storeu_pd(p, m, v.a);
    _mm512_mask_storeu_pd(p + 8, m >> 8, v.b);
  }
};

template <>
struct Tail<bf16> {
  [[gnu::always_inline]] static Words load(const bf16* p, int count) {
    return (Words)_mm512_maskz_loadu_epi16(first(count), p);
  }
  [[gnu::always_inline]] static void store(bf16* p, Words v, int count) {
    _mm512_mask_storeu_epi16(p, first(count), (__m512i)v);
  }
};

template <>
struct Tail<f16> {
  using Raw = Format<f16>::Raw;
  [[gnu::always_inline]] static Raw load(const f16* p, int count) {
    const uint32_t m = first(count);
    return {_mm256_maskz_loadu_epi16(m, p), _mm256_maskz_loadu_epi16(m >> 16, p + 16)};
  }
  [[gnu::always_inline]] static void store(f16* p, Raw v, int count) {
    const uint32_t m = first(count);
    _mm256_mask_storeu_epi16(p, m, v.lo);
    _mm256_mask_storeu_epi16(p + 16, m >> 16, v.hi);
  }
};

}  // namespace
}  // namespace fused_rmsnorm::cpu
