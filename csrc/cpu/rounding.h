// Each dtype: how it is widened to the arithmetic type and rounded back. Rounding to bf16 and to fp16 is
// Format<bf16>::narrow and Format<f16>::narrow in simd_<instruction set>.h, in whose own instructions it is
// written; which NaNs it has to guard is said here.
//
// A pack is two vectors. 16-bit floats can fill it in two orders: f16 lanes stay in memory order
// (the hardware converts whole halves), while bf16 lanes are split into the even elements (a) and
// the odd ones (b): one is a shift, the other a mask, and putting them back is a blend, with no
// shuffle across lanes. Whatever meets a bf16 pack (weights, gradients) enters in the same order.
#pragma once
#include <cstdint>

#include "simd.h"

namespace fused_rmsnorm::cpu {
namespace {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

template <class E>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class E>
using Compute = typename ComputeType<E>::type;

// Which NaNs may meet a rounding to bf16. One whose bits all lie in the upper half stays a NaN by itself:
// so is every NaN that comes from bf16 or from arithmetic. Others could carry into a zero (0x7fffffff,
// from an fp32 weight), and a guard against them is three instructions of eleven.
enum class Nans { any, upper };

// v, and of a NaN one of the upper kind: for numbers that a whole row or call shares.
template <class T>
[[gnu::always_inline]] inline T upper_nan(T v) {
  return v == v ? v : static_cast<T>(__builtin_nan(""));
}

// Formats. f32 and f64 are what the pack holds already.
template <class T>
struct PlainFormat {
  using Raw = Pack<T>;
  static constexpr bool kEvenOdd = false;
  [[gnu::always_inline]] static Raw load(const void* p) {
    Raw v;
    copy<kVecBytes>(&v.a, p);
    copy<kVecBytes>(&v.b, static_cast<const char*>(p) + kVecBytes);
    return v;
  }
  [[gnu::always_inline]] static void store(void* p, Raw v) {
    copy<kVecBytes>(p, &v.a);
    copy<kVecBytes>(static_cast<char*>(p) + kVecBytes, &v.b);
  }
  [[gnu::always_inline]] static void stream(void* p, Raw v) {
    cpu::stream(p, (Vec<float>)v.a);
    cpu::stream(static_cast<char*>(p) + kVecBytes, (Vec<float>)v.b);
  }
  [[gnu::always_inline]] static Pack<T> widen(Raw v) { return v; }
  template <Nans>
  [[gnu::always_inline]] static Raw narrow(Pack<T> v) {
    return v;
  }
};

// 16-bit elements held in one vector of words, element 2i in the low half of word i.
struct PairFormat {
  using Raw = Words;
  static constexpr bool kEvenOdd = true;
  [[gnu::always_inline]] static Raw load(const void* p) {
    Raw v;
    copy<kVecBytes>(&v, p);
    return v;
  }
  [[gnu::always_inline]] static void store(void* p, Raw v) { copy<kVecBytes>(p, &v); }
  [[gnu::always_inline]] static void stream(void* p, Raw v) { cpu::stream(p, (Vec<float>)v); }
};

struct PairBf16 : PairFormat {
  [[gnu::always_inline]] static Pack<float> widen(Raw v) {
    return {(Vec<float>)(v << 16), (Vec<float>)(v & 0xffff0000u)};
  }
};

template <class E>
struct Format;  // float, double, f16, bf16

// Of numbers of X and what is computed from them alone.
template <class X>
[[gnu::always_inline]] inline typename Format<X>::Raw narrow(Pack<Compute<X>> v) {
  return Format<X>::template narrow<Nans::upper>(v);
}
template <class X>
[[gnu::always_inline]] inline Pack<Compute<X>> round_to(Pack<Compute<X>> v) {
  return Format<X>::widen(narrow<X>(v));
}

}  // namespace
}  // namespace fused_rmsnorm::cpu
