// The vocabulary of the CPU kernels: packs of fp32 (or fp64) lanes and how each dtype enters and
// leaves them. One of the headers simd_<instruction set>.h is included before the kernel bodies; it
// sets kVecBytes and kSettleCommonCalls, includes this file and fills in Native, Format and (where it has
// masks) Tail.
//
// Everything here has internal linkage. Each kernels_*.cpp is compiled with its own instruction
// set, and a function with external linkage that two of them share would be kept in one version
// only, perhaps the one that this machine cannot run. For the same reason nothing from the standard
// library is called here.
//
// A pack is two vectors. 16-bit floats can fill it in two orders: f16 lanes stay in memory order
// (the hardware converts whole halves), while bf16 lanes are split into the even elements (a) and
// the odd ones (b): one is a shift, the other a mask, and putting them back is a blend, with no
// shuffle across lanes. Whatever meets a bf16 pack (weights, gradients) enters in the same order.
#pragma once
#include <cstdint>

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

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVecBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;
using Words = Vec<uint32_t>;

// What the instruction set does with vectors of T: fma(x, y, z), sqrt(x), sum(x); for floats also min(x, y)
// and max(x, y), which are y where y is NaN.
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

// The first `count` elements of a pack that may end a row: nothing beyond them is touched.
template <class E>
struct StoreTail {
  using F = Format<E>;
  static constexpr int kBytes = Pack<Compute<E>>::width * sizeof(E);
  [[gnu::always_inline]] static void store(E* p, typename F::Raw v, int count) {
    alignas(kVecBytes) char whole[kBytes];
    F::store(whole, v);
    copy_some<kBytes>(p, whole, count * sizeof(E));
  }
};
template <class E>
struct Tail : StoreTail<E> {
  using F = Format<E>;
  [[gnu::always_inline]] static typename F::Raw load(const E* p, int count) {
    alignas(kVecBytes) char padded[Tail::kBytes] = {};
    copy_some<Tail::kBytes>(padded, p, count * sizeof(E));
    return F::load(padded);
  }
};

// Which elements of a pack a step reads or writes, and how.
struct Full {};
template <class Stream>
struct Maybe {  // a full pack; where stream.value, vector-aligned and past the caches
  [[no_unique_address]] Stream stream;
};
struct Part {
  int count;  // 1 <= count < width; the other lanes read as zero and are not written
};

template <class E>
[[gnu::always_inline]] inline typename Format<E>::Raw load_raw(const E* p, Full) {
  return Format<E>::load(p);
}
template <class E>
[[gnu::always_inline]] inline typename Format<E>::Raw load_raw(const E* p, Part part) {
  return Tail<E>::load(p, part.count);
}
template <class E>
[[gnu::always_inline]] inline void store_raw(E* p, typename Format<E>::Raw v, Full) {
  Format<E>::store(p, v);
}
template <class E, class Stream>
[[gnu::always_inline]] inline void store_raw(E* p, typename Format<E>::Raw v, Maybe<Stream> to) {
  if (to.stream.value) {
    Format<E>::stream(p, v);
  } else {
    Format<E>::store(p, v);
  }
}
template <class E>
[[gnu::always_inline]] inline void store_raw(E* p, typename Format<E>::Raw v, Part part) {
  Tail<E>::store(p, v, part.count);
}

// Elements of E to and from packs in the order of X, the dtype of the rows.
template <class X, class E>
constexpr bool reordered = Format<X>::kEvenOdd != Format<E>::kEvenOdd;

template <class X, class E, class Lanes>
[[gnu::always_inline]] inline Pack<Compute<E>> load(const E* p, Lanes lanes) {
  auto v = Format<E>::widen(load_raw(p, lanes));
  if constexpr (reordered<X, E>) v = cpu::even_odd(v);
  return v;
}
template <class X, Nans kNans, class E, class Lanes>
[[gnu::always_inline]] inline void store(E* p, Pack<Compute<E>> v, Lanes lanes) {
  if constexpr (reordered<X, E>) v = cpu::natural(v);
  store_raw(p, Format<E>::template narrow<kNans>(v), lanes);
}
// Of numbers of X and what is computed from them alone.
template <class X>
[[gnu::always_inline]] inline typename Format<X>::Raw narrow(Pack<Compute<X>> v) {
  return Format<X>::template narrow<Nans::upper>(v);
}
template <class X>
[[gnu::always_inline]] inline Pack<Compute<X>> round_to(Pack<Compute<X>> v) {
  return Format<X>::widen(narrow<X>(v));
}

// yes where the element's index within the pack is below count, else no.
template <class X>
[[gnu::always_inline]] inline Pack<Compute<X>> choose_first(int64_t count, Pack<Compute<X>> yes,
                                                            Pack<Compute<X>> no) {
  using T = Compute<X>;
  using Mask = decltype(yes.a < yes.a);
  constexpr int lanes = Pack<T>::width / 2;
  Mask a{}, b{}, limit{};
  for (int i = 0; i < lanes; ++i) {
    a[i] = Format<X>::kEvenOdd ? 2 * i : i;
    b[i] = Format<X>::kEvenOdd ? 2 * i + 1 : lanes + i;
    limit[i] = count;
  }
  return {a < limit ? yes.a : no.a, b < limit ? yes.b : no.b};
}

// Into the first or the second level of the caches.
template <int kLevel>
[[gnu::always_inline]] inline void prefetch(const void* p) {
  __builtin_prefetch(p, 0, kLevel == 1 ? 3 : 2);
}

}  // namespace
}  // namespace fused_rmsnorm::cpu
