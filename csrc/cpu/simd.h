// The vocabulary of the CPU kernels: packs of fp32 (or fp64) lanes. What 16-bit numbers are made of them and
// rounded from them is in rounding.h, how they come from memory and go there in load_store.h. One of the
// headers simd_<instruction set>.h is included before the kernel bodies; it sets kVecBytes and
// kSettleCommonCalls, includes these three and fills in Native, Format and (where it has masks) Tail.
//
// Everything here has internal linkage. Each kernels_*.cpp is compiled with its own instruction
// set, and a function with external linkage that two of them share would be kept in one version
// only, perhaps the one that this machine cannot run. For the same reason nothing from the standard
// library is called here.
#pragma once
#include <cstdint>

namespace fused_rmsnorm::cpu {
namespace {

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVecBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;
using Words = Vec<uint32_t>;

// What the instruction set does with vectors of T: fma(x, y, z), sqrt(x), sum(x); for floats also min(x, y)
// and max(x, y), which are y where y is NaN, and where kSettleCommonCalls sums(x): in lane i, sum(x[i]), bit
// for bit.
template <class T>
struct Native;

template <class T>
[[gnu::always_inline]] inline Vec<T> splat(T v) {
  return v - Vec<T>{};
}

template <class T>
struct Pack {
  static constexpr int width = 2 * kVecBytes / sizeof(T);
  Vec<T> a, b;

  [[gnu::always_inline]] friend Pack operator+(Pack x, Pack y) { return {x.a + y.a, x.b + y.b}; }
  [[gnu::always_inline]] friend Pack operator-(Pack x, Pack y) { return {x.a - y.a, x.b - y.b}; }
  [[gnu::always_inline]] friend Pack operator*(Pack x, Pack y) { return {x.a * y.a, x.b * y.b}; }
  [[gnu::always_inline]] friend Pack operator*(Pack x, Vec<T> y) { return {x.a * y, x.b * y}; }
  [[gnu::always_inline]] friend Pack operator/(Pack x, Pack y) { return {x.a / y.a, x.b / y.b}; }
};

// x * y + z, rounded once where the instruction set can (never left to -ffp-contract).
template <class T>
[[gnu::always_inline]] inline Pack<T> fma(Pack<T> x, Pack<T> y, Pack<T> z) {
  return {Native<T>::fma(x.a, y.a, z.a), Native<T>::fma(x.b, y.b, z.b)};
}
template <class T>
[[gnu::always_inline]] inline Pack<T> fma(Pack<T> x, Vec<T> y, Pack<T> z) {
  return {Native<T>::fma(x.a, y, z.a), Native<T>::fma(x.b, y, z.b)};
}
template <class T>
[[gnu::always_inline]] inline T sum(Pack<T> x) {
  return Native<T>::sum(x.a + x.b);
}

// Stores one aligned vector past the caches; fence() orders such stores before what follows.
inline void stream(void* p, Vec<float> v);
inline void fence();
// Elements in memory order to even and odd ones, and back.
inline Pack<float> even_odd(Pack<float> v);
inline Pack<float> natural(Pack<float> v);

// Small fixed-size copies: the compiler turns them into one or two moves.
template <int bytes>
[[gnu::always_inline]] inline void copy(void* to, const void* from) {
  __builtin_memcpy(to, from, bytes);
}
// Up to `limit` bytes by two overlapping moves per size class: shorter than memcpy, and its branches
// depend on the row length alone, so they predict well.
template <int limit>
[[gnu::always_inline]] inline void copy_overlapping(char* to, const char* from, int64_t bytes) {
  if constexpr (limit > 1) {
    constexpr int half = limit / 2;
    if (bytes <= half) return copy_overlapping<half>(to, from, bytes);
    char last[half];
    copy<half>(last, from + bytes - half);
    copy<half>(to, from);
    copy<half>(to + bytes - half, last);
  } else if (bytes == 1) {
    *to = *from;
  }
}
// Out of line: it is called a few times a row, from a great many places.
template <int limit>
[[gnu::noinline]] void copy_some(void* to, const void* from, int64_t bytes) {
  copy_overlapping<limit>(static_cast<char*>(to), static_cast<const char*>(from), bytes);
}

// Into the first or the second level of the caches.
template <int kLevel>
[[gnu::always_inline]] inline void prefetch(const void* p) {
  __builtin_prefetch(p, 0, kLevel == 1 ? 3 : 2);
}

}  // namespace
}  // namespace fused_rmsnorm::cpu
