// The backward of rows of any alignment, in the three families, for what is not worth a kernel of
// aligned rows of its own, too: fp64, and dy wider than x. The weight's dtype and what is wanted are
// branches here: fewer kernels, and instructions to spare.
#pragma once
#include "backward_rows.cuh"
#include "fold.cuh"
#include "image.cuh"

namespace fused_rmsnorm::cuda {

template <class X, class T, int V>
__device__ __forceinline__ void scale_any(const Backward& b, int c, T (&scale)[V]) {
  load_scale(b.weight, b.weight_offset, scale, [&](T(&w)[V]) {
    load_either<X>(b.weight, b.w_dtype != b.x_dtype, static_cast<int>(b.n), c, w);
  });
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
        auto x = image_x(stage).run(columns, b.x, m, 0);
        auto dy = image_dy(stage).run(columns, b.dy, m, 0);
        const auto to_run = [&](int run) {
          if constexpr (kCluster) {
            x = image_x(stage).run(columns, b.x, m, run), dy = image_dy(stage).run(columns, b.dy, m, run);
          }
        };
        T dot = 0;
        if (live) {
#pragma unroll
          for (int i = 0; i < kItems; ++i) {
            const int c = (i * width + thread) * V;
            if (c < n) {
              to_run(i);
              T a[V], g[V], scale[V];
              widen(x.load(c), a);
              widen(dy.load(c), g);
              scale_any<X>(b, c, scale);
              dot = dot_of(a, g, scale, dot);
              if (b.dw) add_to_dw<X>(b, a, g, r, dw[i]);
              if (b.db) {
#pragma unroll
                for (int j = 0; j < V; ++j) db[i][j] += g[j];
              }
            }
          }
        }
        dot = row_sum(dot);
        if (live && b.dx) {
          const T coefficient = coefficient_of(b, r, dot);
          X* const dx_row = static_cast<X*>(b.dx) + m * n;
#pragma unroll 1
          for (int run = 0; run < kRuns; ++run) {
            to_run(run);
            const int begin = columns.begin(run), end = columns.end(run);
            const Reader<X, V> dsum(b.dsum.data ? row_of<X>(b.dsum, m) : nullptr, begin, end);
            by_pieces<kThreads, V>(dx_row, begin, end, [&](int c) {
              T scale[V];
              scale_any<X>(b, c, scale);
              auto dx = dx_of(b, c, x.load(c), dy.load(c), scale, r, coefficient, [&](T(&out)[V]) {
                if (b.dsum.data) add_to_dx(dsum.load(c), out);
              });
              store_within(dx_row, c, begin, end, dx);
            });
          }
        }
        if (ahead) stage = stage == kAhead ? 0 : stage + 1;
      }
      __pipeline_wait_prior(0);
      T* partials = static_cast<T*>(b.workspace) + place * partial_step(b);
      T* const buffer = reinterpret_cast<T*>(shared_memory() + kScratchBytes);
      const bool more = from != place * kRows;
      if (b.dw) {
        put_partial<kThreads>(dw, partials, more, buffer, n, width, thread);
        partials += step / kRows * partial_step(b);
      }
      if (b.db) put_partial<kThreads>(db, partials, more, buffer, n, width, thread);
      if (last < b.rows) __syncthreads();
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
  RowSum<T, kLongThreads, false> row_sum(1);
  for (int64_t m = blockIdx.x; m < b.rows; m += gridDim.x) {
    const Reader<X, V> x(row_of<X>(b.x, m), 0, n);
    const Reader<D, V> dy(row_of<D>(b.dy, m), 0, n);
    const Reader<X, V> dsum(b.dsum.data ? row_of<X>(b.dsum, m) : nullptr, 0, n);
    const T r = static_cast<const T*>(b.rstd)[m];
    Fold<T> dot;
#pragma unroll 1
    for (int c = threadIdx.x * V; c < n; c += kLongThreads * V) {
      T a[V], g[V], scale[V];
      scale_any<X>(b, c, scale);
      widen(x.load(c), a);
      widen(dy.load(c), g);
      dot.add(dot_of(a, g, scale, T(0)));
    }
    const T coefficient = coefficient_of(b, r, row_sum(dot.total()));
    X* const dx_row = static_cast<X*>(b.dx) + m * n;
    by_pieces<kLongThreads, V>(dx_row, 0, n, [&](int c) {
      T scale[V];
      scale_any<X>(b, c, scale);
      auto dx = dx_of(b, c, x.load(c), dy.load(c), scale, r, coefficient, [&](T(&out)[V]) {
        if (b.dsum.data) add_to_dx(dsum.load(c), out);
      });
      store_within(dx_row, c, 0, n, dx);
    });
  }
}

// Family `two_pass`: dw and db, a thread per column of every partials-th row.
template <class X, class D>
__global__ void __launch_bounds__(kColumnThreads) backward_columns(Backward b, int partials) {
  using T = Acc<X>;
  const int64_t tiles = (b.n + kColumnThreads - 1) / kColumnThreads;
  const int64_t c = blockIdx.x % tiles * kColumnThreads + threadIdx.x, part = blockIdx.x / tiles;
  if (c >= b.n) return;
  Fold<T> dw, db;
  for (int64_t m = part; m < b.rows; m += partials) {
    const T g = widen(row_of<D>(b.dy, m)[c]);
    T normalised = widen(row_of<X>(b.x, m)[c]) * static_cast<const T*>(b.rstd)[m];
    if (sizeof(X) < sizeof(T) && b.llama) normalised = widen(narrow<X>(normalised));
    dw.add(g * normalised);
    db.add(g);
  }
  T* out = static_cast<T*>(b.workspace) + part * partial_step(b) + c;
  if (b.dw) {
    *out = dw.total();
    out += partials * partial_step(b);
  }
  if (b.db) *out = db.total();
}

}  // namespace fused_rmsnorm::cuda
