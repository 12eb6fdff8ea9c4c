// The backward of rows of any alignment, in the three families, for what is not worth a kernel of
// aligned rows of its own, too: fp64, and dy wider than x. The weight's dtype and what is wanted are
// branches here: fewer kernels, and instructions to spare.
#pragma once
#include "backward_rows.cuh"
#include "fold.cuh"
#include "image.cuh"

namespace fused_rmsnorm::cuda {

// What x * r was multiplied by, of columns c ..., which may reach beyond the end; c is a multiple of V.
// plain: as most calls have it, a weight in pieces and nothing else.
template <class X, int V>
__device__ __forceinline__ void scale_any(const Backward& b, bool plain, int c, Acc<X> (&scale)[V]) {
  using T = Acc<X>;
  const bool inside = c + V <= static_cast<int>(b.n);
  if (plain && inside) return load_aligned<X>(b.weight, c, scale);
  load_scale(b.weight, b.weight_offset, scale, [&](T(&w)[V]) {
    const bool wide = b.w_dtype != b.x_dtype;
    if (inside && weight_in_pieces(b)) {
      return wide ? load_aligned<T>(b.weight, c, w) : load_aligned<X>(b.weight, c, w);
    }
#pragma unroll
    for (int j = 0; j < V; ++j)
      w[j] = c + j < static_cast<int>(b.n) ? column_of<X>(b.weight, wide, c + j) : T(0);
  });
}

// dx of columns c ... of row m, where the weight is in pieces; x and dy as Reader and RowView have them.
// kPlain: there is that weight and nothing else. In an order that takes few registers.
template <bool kPlain = false, class X, class XRow, class DyRow, class T>
__device__ __forceinline__ void finish_vector(const Backward& b, int64_t m, X* row, int c, const XRow& x,
                                              const DyRow& dy, T r, T coefficient) {
  constexpr int V = 16 / sizeof(X);
  T wide[V], out[V], scale[V];
  widen(dy.load(c), out);
  if constexpr (kPlain) {
    widen(load_inside<X, V>(static_cast<const X*>(b.weight), c), scale);
  } else {
    load_scale_inside<X>(b, c, scale);
  }
  widen(x.load(c), wide);
  dx_in(b, c, wide, out, scale, r, coefficient);
  if (!kPlain && b.dsum.data)
    add_to_dx(Reader<X, V>(row_of<X>(b.dsum, m), static_cast<int>(b.n)).load(c), out);
  auto dx = narrowed<X>(out);
  store_pieces(row + c, dx);
}
// dx of one column of row m, in any call.
template <class X, class XRow, class DyRow, class T>
__device__ __forceinline__ void finish_one(const Backward& b, int64_t m, X* row, int c, const XRow& x,
                                           const DyRow& dy, T r, T coefficient) {
  const T wide[1] = {widen(x.column(c))};
  T out[1] = {widen(dy.column(c))}, scale[1];
  load_scale_one<X>(b, c, scale);
  dx_in(b, c, wide, out, scale, r, coefficient);
  if (b.dsum.data) out[0] += widen(row_of<X>(b.dsum, m)[c]);
  row[c] = narrow<X>(out[0]);
}

// Families `registers` and `cluster`.
template <class X, class D, int kShape, bool kCluster>
__global__ void __launch_bounds__(kBlock<kShape>, kResident<kShape>)
    backward_rows_any(Backward b, int cluster, bool ahead) {
  if constexpr (kLaunched<kShape, kCluster>) {
    using T = Acc<X>;
    constexpr int V = 16 / sizeof(X), kThreads = kShapes[kShape].threads, kItems = kShapes[kShape].items;
    constexpr int kRows = kBlock<kShape> / kThreads, kStages = kShapes[kShape].stages;
    using ImageX = Image<X, kShape, V, kCluster>;
    using ImageD = Image<D, kShape, V, kCluster>;
    const Runs<kShape, V, kCluster> columns(b.n, cluster);
    constexpr int kRuns = columns.kCount;
    const int n = columns.n, row_in_block = threadIdx.x / kThreads;
    const int width = kCluster ? kThreads * cluster : kThreads;
    const int thread = threadIdx.x % kThreads + (kCluster ? Cluster::rank() * kThreads : 0);
    const int64_t step = (kCluster ? clusters_of(gridDim.x, cluster) : gridDim.x) * kRows;
    const int64_t place = kCluster ? clusters_of(blockIdx.x, cluster) : blockIdx.x;
    const bool vectors = weight_in_pieces(b), plain = vectors && is_weight_alone(b);
    RowSum<T, kThreads, kCluster> row_sum(cluster);
    const auto image_x = [&](int stage) {
      return ImageX{kScratchBytes + (stage * kRows + row_in_block) * (ImageX::kBytes + ImageD::kBytes)};
    };
    const auto image_dy = [&](int stage) { return ImageD{image_x(stage).offset + ImageX::kBytes}; };

    for (int64_t from = place * kRows; from < b.rows; from += step * kSpan) {
      const int64_t last = from + step * kSpan < b.rows ? from + step * kSpan : b.rows;
      T dw[kItems][V] = {}, db[kItems][V] = {};
      const auto fetch = [&](int64_t m, int stage) {
        if (m < last) {
          image_x(stage).fetch(columns, row_of<X>(b.x, m));
          image_dy(stage).fetch(columns, row_of<D>(b.dy, m));
        }
        __pipeline_commit();
      };

      // As for aligned rows; but all threads have to be done with a row before its place is filled.
      constexpr int kAhead = kStages - 1;
      const int64_t distance = ahead ? kAhead * step : 0;
      int filled = 0, stage = 0;
#pragma unroll 1
      for (int64_t base = from - distance; base < last; base += step) {
        const int64_t m = base + row_in_block;
        if constexpr (kAhead > 0) __pipeline_wait_prior(kAhead - 1);
        __syncthreads();
        fetch(m + distance, filled);
        if (ahead) filled = filled == kAhead ? 0 : filled + 1;
        if (base < from) continue;
        if (!ahead) {
          __pipeline_wait_prior(0);
          __syncthreads();
        }
        const bool live = m < last;
        const T r = live ? static_cast<const T*>(b.rstd)[m] : T(0);
        const auto x = image_x(stage).row(columns, b.x, m);
        const auto dy = image_dy(stage).row(columns, b.dy, m);
        T dot = 0;
        if (live) {
#pragma unroll
          for (int i = 0; i < kItems; ++i) {
            const int c = (i * width + thread) * V;
            if (c < n) {
              T a[V], g[V], scale[V];  // in an order that takes few registers
              widen(dy.run(kCluster ? i : 0).load(c), g);
              if (b.db) {
#pragma unroll
                for (int j = 0; j < V; ++j) db[i][j] += g[j];
              }
              scale_any<X>(b, plain, c, scale);
              widen(x.run(kCluster ? i : 0).load(c), a);
              dot = dot_of(a, g, scale, dot);
              if (b.dw) add_to_dw<X>(b, a, g, r, dw[i]);
            }
          }
        }
        dot = row_sum(dot);
        if (live && b.dx) {
          const T coefficient = coefficient_of(b, r, dot);
          X* const dx_row = static_cast<X*>(b.dx) + m * n;
#pragma unroll 1
          for (int run = 0; run < kRuns; ++run) {
            const auto x_run = x.run(run);
            const auto dy_run = dy.run(run);
            settled(plain && !b.dsum.data, [&](auto is_plain) {
              by_pieces<kThreads, V>(
                  dx_row, columns.begin(run), columns.end(run), vectors,
                  [&](int c) {
                    finish_vector<decltype(is_plain)::value>(b, m, dx_row, c, x_run, dy_run, r, coefficient);
                  },
                  [&](int c) { finish_one(b, m, dx_row, c, x_run, dy_run, r, coefficient); });
            });
          }
        }
        if (ahead) stage = stage == kAhead ? 0 : stage + 1;
      }
      __pipeline_wait_prior(0);
      if (!b.dw && !b.db) continue;  // nor a workspace
      T* partials = pinned(static_cast<T*>(b.workspace) + place * partial_step(b));
      T* const buffer = reinterpret_cast<T*>(shared_memory() + kScratchBytes);
      const bool more = from != place * kRows;
      if (b.dw) {
        put_partial<kThreads>(dw, partials, more, buffer, n, width, thread);
        partials += step / kRows * partial_step(b);
      }
      if (b.db) put_partial<kThreads>(db, partials, more, buffer, n, width, thread);
    }
  }
}

// Family `two_pass`: dx of rows of any length, a block per row. dx over x, dy or dsum begins at the same
// places, and they are read there and nowhere else once it is written.
template <class X, class D>
__global__ void __launch_bounds__(kLongThreads, 1) backward_long(Backward b) {
  using T = Acc<X>;
  constexpr int V = 16 / sizeof(X);
  const int n = static_cast<int>(b.n);
  const bool vectors = weight_in_pieces(b), plain = vectors && is_weight_alone(b);
  RowSum<T, kLongThreads, false> row_sum(1);
  for (int64_t m = blockIdx.x; m < b.rows; m += gridDim.x) {
    const Reader<X, V> x(row_of<X>(b.x, m), n);
    const Reader<D, V> dy(row_of<D>(b.dy, m), n);
    const T r = static_cast<const T*>(b.rstd)[m];
    Fold<T> dot;
#pragma unroll 1
    for (int c = threadIdx.x * V; c < n; c += kLongThreads * V) {
      const auto x_columns = x.load(c);
      const auto dy_columns = dy.load(c);
      T a[V], g[V], scale[V];
      scale_any<X>(b, plain, c, scale);
      widen(x_columns, a), widen(dy_columns, g);
      dot.add(dot_of(a, g, scale, T(0)));
    }
    const T coefficient = coefficient_of(b, r, row_sum(dot.total()));
    X* const dx_row = static_cast<X*>(b.dx) + m * n;
    settled(plain && !b.dsum.data, [&](auto is_plain) {
      by_pieces<kLongThreads, V>(
          dx_row, 0, n, vectors,
          [&](int c) { finish_vector<decltype(is_plain)::value>(b, m, dx_row, c, x, dy, r, coefficient); },
          [&](int c) { finish_one(b, m, dx_row, c, x, dy, r, coefficient); });
    });
  }
}

// Writes what a thread has summed for columns c ... of its partials of dw and, so many further on, of db.
template <class T, int V>
__device__ __forceinline__ void put_columns(const Backward& b, int64_t part, int64_t parts, int c,
                                            Fold<T, V>& dw, Fold<T, V>& db) {
  T* out = static_cast<T*>(b.workspace) + part * partial_step(b) + c;
  Vec<T, V> sums;
  if (b.dw) {
    dw.total(sums.v);
    store_pieces(out, sums);
    out += parts * partial_step(b);
  }
  if (!b.db) return;
  db.total(sums.v);
  store_pieces(out, sums);
}

// Family `two_pass`: dw and db, a thread per vector of columns of every partials-th row.
template <class X, class D>
__global__ void __launch_bounds__(kColumnThreads) backward_columns(Backward b, int partials) {
  using T = Acc<X>;
  constexpr int V = 16 / sizeof(X);
  const int n = static_cast<int>(b.n);
  const unsigned tiles = (n + kColumnThreads * V - 1) / (kColumnThreads * V);
  const unsigned part = blockIdx.x / tiles;
  const int c = static_cast<int>((blockIdx.x - part * tiles) * kColumnThreads + threadIdx.x) * V;
  if (c >= n) return;
  Fold<T, V> dw, db;
#pragma unroll 1
  for (int64_t m = part; m < b.rows; m += partials) {
    T x[V], g[V], terms[V] = {};
    widen(Reader<X, V>(row_of<X>(b.x, m), n).load(c), x);
    widen(Reader<D, V>(row_of<D>(b.dy, m), n).load(c), g);
    const T r = static_cast<const T*>(b.rstd)[m];
    add_to_dw<X>(b, x, g, r, terms);
    dw.add(terms), db.add(g);
  }
  put_columns(b, part, partials, c, dw, db);
}

}  // namespace fused_rmsnorm::cuda
