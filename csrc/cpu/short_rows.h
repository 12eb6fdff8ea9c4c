// The forward of short rows, whose columns take no longer than what a sweep does once per row. A block of
// rows goes through three loops: the lanes of their statistics; the sums across lanes and their 1 / sqrt, of
// as many rows at once as a vector has lanes; the writes. Of the weight, what every row needs is kept. Half
// the instructions of a sweep at 64 columns, and the same bits: the same columns are in each lane, and lanes
// meet in the same order.
#pragma once
#include <cstdint>

#include "../norm.h"
#include "sweep.h"

namespace fused_rmsnorm::cpu {
namespace {

// From here on a sweep is as fast.
constexpr int64_t kShortBytes = 2048;
static_assert(kShortBytes / 2 <= kFoldColumns);  // nothing is folded

// Whether these loops take `rows` rows of a call, under one row of weight or none. To keep the weight costs
// as much as half a row, which fewer rows do not save.
inline bool has_short_rows(const Forward& f, int64_t rows) {
  return f.n * size_of(f.x_dtype) <= kShortBytes && f.weight_rows == 1 && !f.bias && rows >= 4;
}

// From row to row without a division, which row_at takes where a row has two strides.
template <class E>
class Walk {
 public:
  Walk(const Rows& rows, int64_t row)
      : at(row_at<E>(rows, row)),
        stride_(rows.inner == 1 ? rows.outer_stride : rows.inner_stride),
        inner_(rows.inner == 1 ? INT64_MAX : rows.inner),
        turn_(rows.inner == 1 ? 0 : rows.outer_stride - rows.inner * rows.inner_stride),
        left_(rows.inner == 1 ? INT64_MAX : rows.inner - row % rows.inner) {}
  [[gnu::always_inline]] void next() {
    at += stride_;
    if (__builtin_expect(--left_ == 0, false)) at += turn_, left_ = inner_;
  }
  const E* at;

 private:
  const int64_t stride_, inner_, turn_;
  int64_t left_;
};

// K: the kernel of a plain forward without a gate. Calls with an offset or without a weight come here, too:
// what is kept of the weight has the one, and is 1 without the other. kColumns: n and k where they are known,
// else 0.
template <class K, int kColumns>
class ShortRows {
  using T = typename K::T;
  using X = typename K::X;
  using W = typename K::W;
  using Y = typename K::Y;
  using Input = typename K::Input;
  static constexpr int kWidth = Pack<T>::width, kLanes = kVecBytes / sizeof(T);
  // A block of fp32 has as many rows as one of 16-bit numbers: 6 % faster than half as many where there is
  // one input and one output, 10 % slower where there are two of each.
  static constexpr int kBlockSize = K::kAdd ? sizeof(X) : 2;
  // The statistics of a block are taken before the previous block is written, which hides the latency of
  // its square roots: 16-bit numbers 5 to 25 % faster. fp32 is up to 10 % faster so in the second level of
  // the caches, and 10 to 15 % slower in the third.
  static constexpr bool kAhead = sizeof(X) == 2;

 public:
  [[gnu::noinline]] static void rows(const Forward& f, int64_t begin, int64_t end) {
    const int64_t n = kColumns ? kColumns : f.n, k = kColumns ? kColumns : f.k;
    const int block = block_rows(n, kBlockSize);
    alignas(kVecBytes) T weight[kColumns ? kColumns : kShortBytes / sizeof(X)];
    keep_weight(f, n, weight);
    Places stat(f, begin), to_write(f, begin);
    Vec<T> lanes[kMaxBlock] = {};
    alignas(kVecBytes) T rstd[2][kMaxBlock];
    T* out = f.rstd ? static_cast<T*>(f.rstd) + begin : nullptr;
    Y* y = static_cast<Y*>(f.y) + begin * n;
    X* sum = K::kAdd ? static_cast<X*>(f.sum) + begin * n : nullptr;
    int64_t left = end - begin;  // rows whose statistic is not taken

    const auto take_statistics = [&](T* r) __attribute__((always_inline)) {
      const int count = static_cast<int>(left < block ? left : block);
      left -= count;
      for (int i = 0; i < count; ++i, stat.next()) lanes[i] = lanes_of(stat.row(), k);
      for (int i = 0; i < count; i += kLanes) {
        const Vec<T> v = K::rstd_of(f, Native<T>::sums(lanes + i));
        copy<kVecBytes>(r + i, &v);
      }
      if (out) copy_some<sizeof(rstd[0])>(out, r, count * sizeof(T)), out += count;
      return count;
    };
    const auto write = [&](const T* r, int count) __attribute__((always_inline)) {
      for (int i = 0; i < count; ++i, to_write.next(), y += n) {
        const Input row = to_write.row();
        const Vec<T> factor = splat(r[i]);
        each_pack(n, [&](int64_t j, auto part) __attribute__((always_inline)) {
          const auto raw = row.raw(j, part);
          const Pack<T> v = K::scaled(raw, factor, PlainFormat<T>::load(weight + j));
          K::Row::store({raw, v}, part, y + j, sum + j);
        });
        if constexpr (K::kAdd) sum += n;
      }
    };
    int count = take_statistics(rstd[0]);
    if constexpr (kAhead) {
      for (int now = 0; count; now ^= 1) {
        const int next = take_statistics(rstd[now ^ 1]);
        write(rstd[now], count);
        count = next;
      }
    } else {
      for (; count; count = take_statistics(rstd[0])) write(rstd[0], count);
    }
  }

 private:
  struct Places {
    Walk<X> x, other;
    Places(const Forward& f, int64_t row) : x(f.x, row), other(K::kAdd ? f.residual : f.x, row) {}
    [[gnu::always_inline]] Input row() const { return {x.at, other.at, {false, false, nullptr}}; }
    [[gnu::always_inline]] void next() {
      x.next();
      if constexpr (K::kAdd) other.next();
    }
  };

  template <class Step>
  [[gnu::always_inline]] static void each_pack(int64_t n, Step step) {
    const int64_t whole = n & -kWidth;
#pragma GCC unroll kUnroll
    for (int64_t i = 0; i != whole; i += kWidth) step(i, Full{});
    if (whole != n) step(whole, Part{static_cast<int>(n - whole)});
  }

  // What every row is multiplied by. 1 where there is no weight: that changes no bit.
  [[gnu::always_inline]] static void keep_weight(const Forward& f, int64_t n, T* to) {
    const Vec<T> one = splat<T>(1), offset = splat(upper_nan(static_cast<T>(f.weight_offset)));
    each_pack(n, [&](int64_t i, auto part) __attribute__((always_inline)) {
      Pack<T> w = {one, one};
      if (f.weight) w = load<X>(static_cast<const W*>(f.weight) + i, part);
      if (f.weight && f.weight_offset != 0) w = w + Pack<T>{offset, offset};
      PlainFormat<T>::store(to + i, w);
    });
  }

  // What a sweep sums up: packs in turn in two sums, so that one addition need not wait for the last.
  [[gnu::always_inline]] static Vec<T> lanes_of(const Input& row, int64_t k) {
    Pack<T> even = {}, odd = {};
    const auto step = [&row](Pack<T>& sum, int64_t i, auto part) __attribute__((always_inline)) {
      const Pack<T> v = Format<X>::widen(row.raw(i, part));
      sum = fma(v, v, sum);
    };
    const int64_t pairs = k & (-2 * kWidth);
    int64_t i = 0;
#pragma GCC unroll kUnroll
    for (; i != pairs; i += 2 * kWidth) step(even, i, Full{}), step(odd, i + kWidth, Full{});
    const int rest = static_cast<int>(k - i);
    if (rest >= kWidth) {
      step(even, i, Full{});
      if (rest > kWidth) step(odd, i + kWidth, Part{rest - kWidth});
    } else if (rest) {
      step(even, i, Part{rest});
    }
    return (even.a + odd.a) + (even.b + odd.b);
  }
};

template <class K>
void short_rows(const Forward& f, int64_t begin, int64_t end) {
  // Of heads of 64 and 128, whose columns are then known: up to 10 % faster.
  if (f.n == 64 && f.k == 64) return ShortRows<K, 64>::rows(f, begin, end);
  if (f.n == 128 && f.k == 128) return ShortRows<K, 128>::rows(f, begin, end);
  ShortRows<K, 0>::rows(f, begin, end);
}

}  // namespace
}  // namespace fused_rmsnorm::cpu
