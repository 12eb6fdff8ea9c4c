// The forward of rows of any alignment, in the three families, for what is not worth a kernel of
// aligned rows of its own, too: fp64, and y wider than x.
// The weight's dtype and the fused add are branches here: fewer kernels, and instructions to spare.
#pragma once
#include "fold.cuh"
#include "forward_rows.cuh"
#include "image.cuh"

namespace fused_rmsnorm::cuda {

// Writes columns c ... of y, as far as they lie in begin ... end - 1.
template <class X, class Y, class T, int V>
__device__ __forceinline__ void finish_any(const Forward& f, int64_t m, int c, int begin, int end,
                                           const Vec<X, V>& x, T r) {
  const bool wide = f.w_dtype != f.x_dtype;
  const int n = static_cast<int>(f.n);
  T scale[V];
  if (f.weight) widen_either<X>(f.weight, wide, n, c, scale);
  make_scale(f.weight, f.weight_offset, scale);
  auto y = normalise<Y>(f, x, r, scale, [&](T(&bias)[V]) { widen_either<X>(f.bias, wide, n, c, bias); });
  store<Access::any>(static_cast<Y*>(f.y) + m * n, c, begin, end, y);
}

// Families `registers` and `cluster`. y is written before sum, which may be the residual's memory.
template <class X, class Y, int kShape, bool kCluster>
__global__ void __launch_bounds__(kBlock<kShape>) forward_rows_any(Forward f, int cluster) {
  if constexpr (kLaunched<kShape, kCluster>) {
    using T = Acc<X>;
    constexpr int V = 16 / sizeof(X), kThreads = kShapes[kShape].threads, kItems = kShapes[kShape].items;
    constexpr int kRows = kBlock<kShape> / kThreads, kFlight = kShapes[kShape].flight;
    using RowImage = Image<X, kShape, V, kCluster>;
    const Runs<kShape, V, kCluster> columns(f.n, cluster);
    const int n = columns.n, k = static_cast<int>(f.k), row_in_block = threadIdx.x / kThreads;
    const int64_t step = int64_t{kCluster ? gridDim.x / cluster : gridDim.x} * (kRows * kFlight);
    RowSum<T, kThreads, kCluster> row_sum(cluster);

    for (int64_t base = int64_t{kCluster ? blockIdx.x / cluster : blockIdx.x} * (kRows * kFlight);
         base < f.rows; base += step) {
      const auto row_number = [&](int q) { return base + row_in_block + q * kRows; };
      const auto image = [&](int q) {
        return RowImage{shared_memory() + kScratchBytes + (q * kRows + row_in_block) * RowImage::kBytes};
      };
      // Columns c ... of x, or of what sum gets.
      const auto load = [&](int q, int run, int c) {
        const int64_t m = row_number(q);
        auto x = image(q).load(columns, row_of<X>(f.x, m), run, c);
        if (f.residual.data) {
          const auto residual = row_of<X>(f.residual, m);
          add(x, Reader<X, V, Access::any>{residual, columns.begin(run), columns.end(run)}.load(c));
        }
        return x;
      };
#pragma unroll 1
      for (int q = 0; q < kFlight; ++q) {
        if (row_number(q) < f.rows) image(q).fetch(columns, row_of<X>(f.x, row_number(q)));
      }
      __pipeline_commit();
      __pipeline_wait_prior(0);
      __syncthreads();
#pragma unroll 1
      for (int q = 0; q < kFlight; ++q) {
        const int64_t m = row_number(q);
        T sum = 0;
        if (m < f.rows) {
#pragma unroll 1
          for (int i = 0; i < kItems; ++i) {
            const int run = kCluster ? i : 0;
            const int c = columns.begin(run) + ((kCluster ? 0 : i * kThreads) + threadIdx.x % kThreads) * V;
            if (c < n) sum = squares(load(q, run, c), c, k, sum);
          }
        }
        const T r = rstd_of(f, row_sum(sum));
        if (m < f.rows) {
          if (f.rstd && threadIdx.x % kThreads == 0 && columns.first == 0) static_cast<T*>(f.rstd)[m] = r;
          columns.by_pieces_of(static_cast<const Y*>(f.y) + m * n, [&](int run, int c, int begin, int end) {
            finish_any<X, Y>(f, m, c, begin, end, load(q, run, c), r);
          });
        }
      }
      if (f.sum) {
        __syncthreads();
#pragma unroll 1
        for (int q = 0; q < kFlight; ++q) {
          X* const sum = static_cast<X*>(f.sum) + row_number(q) * n;
          if (row_number(q) < f.rows) {
            columns.by_pieces_of(sum, [&](int run, int c, int begin, int end) {
              auto v = load(q, run, c);
              store<Access::any>(sum, c, begin, end, v);
            });
          }
        }
      }
      if (base + step < f.rows) __syncthreads();  // the images are filled again
    }
  }
}

// Family `two_pass`: a block per row of any length. The barrier of the sum lies between what is
// written to f.sum and what is read back from it.
template <class X, class Y>
__global__ void __launch_bounds__(kLongThreads) forward_long(Forward f) {
  using T = Acc<X>;
  constexpr int V = 16 / sizeof(X);
  using Row = Reader<X, V, Access::any>;
  const int n = static_cast<int>(f.n), k = static_cast<int>(f.k);
  const bool adds = f.residual.data;
  RowSum<T, kLongThreads, false> row_sum(1);
  for (int64_t m = blockIdx.x; m < f.rows; m += gridDim.x) {
    Row row{row_of<X>(f.x, m), 0, n};
    const Row residual{adds ? row_of<X>(f.residual, m) : nullptr, 0, n, f.sum == f.residual.data};
    X* const sum_row = static_cast<X*>(f.sum) + m * n;
    Fold<T> sum;
    for (int c = threadIdx.x * V; c < (adds ? n : k); c += kLongThreads * V) {
      auto x = row.load(c);
      if (adds) {
        add(x, residual.load(c));
        store<Access::any>(sum_row, c, 0, n, x);
      }
      sum.add(squares(x, c, k, T(0)));
    }
    const T r = rstd_of(f, row_sum(sum.total()));
    if (f.rstd && threadIdx.x == 0) static_cast<T*>(f.rstd)[m] = r;
    if (adds) row.row = sum_row;
    // y over x begins at the same places, and is read there and nowhere else.
    const int over = misaligned(static_cast<const Y*>(f.y) + m * n);
    for (int c = static_cast<int>(threadIdx.x) * V - over; c < n; c += kLongThreads * V) {
      finish_any<X, Y>(f, m, c, 0, n, row.load(c), r);
    }
  }
}

}  // namespace fused_rmsnorm::cuda
