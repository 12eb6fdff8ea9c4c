// Packs from memory and to it: whole, past the caches, or the part that ends a row; in the order of the
// rows' dtype.
#pragma once
#include <cstdint>

#include "rounding.h"

namespace fused_rmsnorm::cpu {
namespace {

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

}  // namespace
}  // namespace fused_rmsnorm::cpu
