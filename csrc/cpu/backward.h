// The backward body, in the two halves that sweep.h interleaves:
//   statistic   dot = sum(dy * w' * x), and on the way dw += dy * x * r and db += dy   (w' = offset + w)
//   write       dx = r * (dy * w' - [j < k] * x * c) + dsum,   c = r * (r * dot / k)
// dw belongs to the statistic because rstd is known beforehand and its columns must not move, while
// the write starts wherever a line of dx does. c holds r squared only: r cubed leaves fp32's range
// for rows near 1e-13, whose dx is still an ordinary number.
//
// dw and db are summed in fp32 per chunk of rows, each chunk in its own partial in the workspace
// and in the lane order of x's packs; merge adds the partials in chunk order and puts the lanes
// back. Which thread does what changes nothing.
#pragma once
#include <cstdint>

#include "../norm.h"
#include "kernels.h"
#include "sweep.h"

namespace fused_rmsnorm::cpu {
namespace {

template <class X, class W, class D, bool kLlama>
class BackwardKernel {
 public:
  using T = Compute<X>;
  using Out = X;
  using Second = X;
  static constexpr bool kTwoOutputs = false;

  BackwardKernel(const Backward& b, int64_t first_row, T* dw, T* db)
      : b_(b),
        first_row_(first_row),
        dw_(dw),
        db_(db),
        x_distance_(prefetch_distance(b.x, b.n, sizeof(X), kPrefetchBytes)),
        dy_distance_(prefetch_distance(b.dy, b.n, sizeof(D), kPrefetchBytes)) {}

  int64_t stat_columns() const { return b_.n; }
  int64_t columns() const { return b_.n; }
  int block() const { return block_rows(b_.n, sizeof(X)); }
  bool writes() const { return b_.dx != nullptr; }

  struct Weight {
    const W* data;
    Vec<T> offset;
    bool has_offset;

    template <class Lanes>
    [[gnu::always_inline]] Pack<T> operator()(int64_t i, Lanes lanes) const {
      Pack<T> w = load<X>(data + i, lanes);
      if (has_offset) w = w + Pack<T>{offset, offset};
      return w;
    }
  };

  struct Stat {
    const D* dy;
    const X* x;
    Weight weight;
    Vec<T> r;
    T *dw, *db;
    bool dot, fresh;  // fresh: the first row of a chunk, whose partials hold nothing yet
    int64_t x_distance, dy_distance;

    template <class Lanes>
    [[gnu::always_inline]] void step(Pack<T>& sum, int64_t i, Lanes lanes) const {
      const Pack<T> g = load<X>(dy + i, lanes);
      if (dot || dw) {
        const Pack<T> v = load<X>(x + i, lanes);
        const Pack<T> product = g * v;
        if (dot) sum = weight.data ? fma(product, weight(i, lanes), sum) : sum + product;
        if (dw) {
          const Pack<T> before = fresh ? Pack<T>{} : PlainFormat<T>::load(dw + i);
          const Pack<T> after = kLlama ? fma(g, round_to<X>(v * r), before) : fma(product, r, before);
          PlainFormat<T>::store(dw + i, after);
        }
      }
      if (db) PlainFormat<T>::store(db + i, fresh ? g : PlainFormat<T>::load(db + i) + g);
    }
    [[gnu::always_inline]] void prefetch(int64_t i, int count) const {
      for (int j = 0; j < count; j += kLine / static_cast<int>(sizeof(X)))
        cpu::prefetch<1>(x + i + j + x_distance);
      for (int j = 0; j < count; j += kLine / static_cast<int>(sizeof(D))) {
        cpu::prefetch<1>(dy + i + j + dy_distance);
      }
    }
  };

  struct Row {
    const D* dy;
    const X *x, *dsum;
    Weight weight;
    Vec<T> r, minus_c;
    int64_t k;
    X* dx;

    X* out() const { return dx; }
    X* second() const { return nullptr; }

    template <class Lanes, class Dest>
    [[gnu::always_inline]] void step(int64_t i, Lanes lanes, Dest dest, X* to, X*) const {
      Pack<T> g = load<X>(dy + i, lanes);
      if (weight.data) g = g * weight(i, lanes);
      if (i < k) {
        const Pack<T> t = fma(load<X>(x + i, lanes), minus_c, g);
        g = i + Pack<T>::width <= k ? t : choose_first<X>(k - i, t, g);
      }
      g = dsum ? fma(g, r, load<X>(dsum + i, lanes)) : g * r;
      store<X>(to, g, dest);
    }
  };

  Stat stat_of(int64_t m) const {
    return {row_at<D>(b_.dy, m), row_at<X>(b_.x, m), weight(),    splat(rstd(m)), dw_, db_, writes(),
            m == first_row_,     x_distance_,        dy_distance_};
  }
  Row row_of(int64_t m, int slot) const {
    return {row_at<D>(b_.dy, m),
            row_at<X>(b_.x, m),
            b_.dsum.data ? row_at<X>(b_.dsum, m) : nullptr,
            weight(),
            splat(rstd(m)),
            splat(-c_[slot]),
            b_.k,
            static_cast<X*>(b_.dx) + m * b_.n};
  }

  void finish(int64_t m, int count, const T* sums) {
    for (int i = 0; i < count; ++i) {
      const T r = rstd(m + i);
      c_[i] = r * (r * sums[i] / static_cast<T>(b_.k));
    }
  }

 private:
  T rstd(int64_t m) const { return static_cast<const T*>(b_.rstd)[m]; }
  Weight weight() const {
    return {static_cast<const W*>(b_.weight), splat(static_cast<T>(b_.weight_offset)), b_.weight_offset != 0};
  }

  const Backward& b_;
  const int64_t first_row_;
  T *const dw_, *const db_;
  const int64_t x_distance_, dy_distance_;
  T c_[kMaxBlock] = {};
};

// Partial sums of one column, in chunk order.
template <class X>
[[gnu::always_inline]] inline Pack<Compute<X>> add_partials(const Compute<X>* first, const Chunks& chunks) {
  Pack<Compute<X>> sum = PlainFormat<Compute<X>>::load(first);
  for (int64_t c = 1; c < chunks.count; ++c) {
    sum = sum + PlainFormat<Compute<X>>::load(first + c * chunks.per_chunk);
  }
  return sum;
}

// Columns [begin, end) of one gradient. A pack that two callers share is computed by both, and each
// writes its own elements of it.
template <class X, class W>
void merge_columns(W* out, const Compute<X>* partials, const Chunks& chunks, int64_t begin, int64_t end) {
  constexpr int width = Pack<Compute<X>>::width;
  for (int64_t i = begin - begin % width; i < end; i += width) {
    const auto sum = add_partials<X>(partials + i, chunks);
    if (i >= begin && i + width <= end) {
      store<X>(out + i, sum, Full{});
    } else {
      W whole[width];
      store<X>(whole, sum, Full{});
      for (int j = 0; j < width; ++j) {
        if (i + j >= begin && i + j < end) out[i + j] = whole[j];
      }
    }
  }
}

template <class X, class W, class D, bool kLlama>
struct BackwardAs {
  using T = Compute<X>;

  static void chunks(const Backward& b, const Chunks& plan, int64_t begin, int64_t end, bool stream) {
    for (int64_t c = begin; c < end; ++c) {
      T* const partial = static_cast<T*>(b.workspace) + c * plan.per_chunk;
      T* const dw = b.dw ? partial : nullptr;
      T* const db = b.db ? partial + (b.dw ? plan.stride : 0) : nullptr;
      const int64_t first = c * plan.rows_per_chunk;
      const int64_t last = first + plan.rows_per_chunk < b.rows ? first + plan.rows_per_chunk : b.rows;
      BackwardKernel<X, W, D, kLlama> kernel(b, first, dw, db);
      if (stream) {
        sweep_rows<true>(kernel, first, last);
      } else {
        sweep_rows<false>(kernel, first, last);
      }
    }
  }

  static void merge(const Backward& b, const Chunks& plan, int64_t begin, int64_t end) {
    const T* const partials = static_cast<const T*>(b.workspace);
    if (b.dw) merge_columns<X>(static_cast<W*>(b.dw), partials, plan, begin, end);
    if (b.db) {
      merge_columns<X>(static_cast<W*>(b.db), partials + (b.dw ? plan.stride : 0), plan, begin, end);
    }
  }
};

// Calls visit with the BackwardAs of the dtypes asked for.
template <class X, class Visit>
void visit_half(const Backward& b, Visit visit) {
  if (b.w_dtype == Dtype::f32) {
    b.llama ? visit(BackwardAs<X, float, float, true>{}) : visit(BackwardAs<X, float, X, false>{});
  } else {
    b.llama ? visit(BackwardAs<X, X, X, true>{}) : visit(BackwardAs<X, X, X, false>{});
  }
}
template <class Visit>
void visit_dtypes(const Backward& b, Visit visit) {
  switch (b.x_dtype) {
    case Dtype::f32:
      return visit(BackwardAs<float, float, float, false>{});
    case Dtype::f64:
      return visit(BackwardAs<double, double, double, false>{});
    case Dtype::f16:
      return visit_half<f16>(b, visit);
    case Dtype::bf16:
      return visit_half<bf16>(b, visit);
  }
}

void backward(const Backward& b, const Chunks& plan, int64_t begin, int64_t end, bool stream) {
  visit_dtypes(b, [&](auto kernels) { kernels.chunks(b, plan, begin, end, stream); });
}
void merge(const Backward& b, const Chunks& plan, int64_t begin, int64_t end) {
  visit_dtypes(b, [&](auto kernels) { kernels.merge(b, plan, begin, end); });
}

}  // namespace
}  // namespace fused_rmsnorm::cpu
