// The forward of rows of any alignment, in the three families, for what is not worth a kernel of
// aligned rows of its own, too: fp64, and y wider than x.
// The weight's dtype and the fused add are branches here: fewer kernels, and instructions to spare.
#pragma once
#include "fold.cuh"
#include "forward_rows.cuh"
#include "image.cuh"

namespace fused_rmsnorm::cuda {

// Writes columns c ... of a row of y, as far as they lie in begin ... end - 1.
template <class X, class Y, class T, int V>
__device__ __forceinline__ void finish_any(const Forward& f, Y* row, int c, int begin, int end,
                                           const Vec<X, V>& x, T r) {
  const bool wide = f.w_dtype != f.x_dtype;
  const int n = static_cast<int>(f.n);
  auto y = normalise<Y>(
      f, x, r,
      [&](T(&scale)[V]) {
        load_scale(f.weight, f.weight_offset, scale,
                   [&](T(&w)[V]) { load_either<X>(f.weight, wide, n, c, w); });
      },
      [&](T(&bias)[V]) { load_either<X>(f.bias, wide, n, c, bias); });
  store_within(row, c, begin, end, y);
}

// What is normalised: columns of x, or what sum gets.
template <class X, int V>
struct Summand {
  RunView<X, V> x;
  Reader<X, V> residual;
  bool adds;
  __device__ __forceinline__ Vec<X, V> load(int c) const {
    auto v = x.load(c);
    if (adds) add(v, residual.load(c));
    return v;
  }
};

// Families `registers` and `cluster`. y is written before sum, which may be the residual's memory. Without
// the 1, ptxas holds blocks of 128 to 56 registers on sm_80 and spills.
template <class X, class Y, int kShape, bool kCluster>
__global__ void __launch_bounds__(kBlock<kShape>, 1) forward_rows_any(Forward f, int cluster) {
  if constexpr (kLaunched<kShape, kCluster>) {
    using T = Acc<X>;
    constexpr int V = 16 / sizeof(X), kThreads = kShapes[kShape].threads, kItems = kShapes[kShape].items;
    constexpr int kRows = kBlock<kShape> / kThreads, kFlight = kShapes[kShape].flight;
    using RowImage = Image<X, kShape, V, kCluster>;
    const Runs<kShape, V, kCluster> columns(f.n, cluster);
    constexpr int kRuns = columns.kCount;
    const int n = columns.n, k = static_cast<int>(f.k), row_in_block = threadIdx.x / kThreads;
    const int64_t step = int64_t{kCluster ? clusters_of(gridDim.x, cluster) : gridDim.x} * (kRows * kFlight);
    RowSum<T, kThreads, kCluster> row_sum(cluster);

    for (int64_t base = int64_t{kCluster ? clusters_of(blockIdx.x, cluster) : blockIdx.x} * (kRows * kFlight);
         base < f.rows; base += step) {
      const auto row_number = [&](int q) { return base + row_in_block + q * kRows; };
      const auto image = [&](int q) {
        return RowImage{kScratchBytes + (q * kRows + row_in_block) * RowImage::kBytes};
      };
      const auto summand = [&](int q, int run) {
        const int64_t m = row_number(q);
        const bool adds = f.residual.data;
        return Summand<X, V>{
            image(q).run(columns, f.x, m, run),
            {adds ? row_of<X>(f.residual, m) : nullptr, columns.begin(run), columns.end(run)},
            adds};
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
          for (int run = 0; run < kRuns; ++run) {
            const auto in = summand(q, run);
            int c = columns.begin(run) + static_cast<int>(threadIdx.x) % kThreads * V;
#pragma unroll 1
            for (int i = 0; i < kItems / kRuns && c < n; ++i, c += kThreads * V)
              sum = squares(in.load(c), c, k, sum);
          }
        }
        const T r = rstd_of(f, row_sum(sum));
        if (m < f.rows) {
          if (f.rstd && threadIdx.x % kThreads == 0 && columns.first == 0) static_cast<T*>(f.rstd)[m] = r;
          Y* const y = static_cast<Y*>(f.y) + m * n;
#pragma unroll 1
          for (int run = 0; run < kRuns; ++run) {
            const auto in = summand(q, run);
            const int begin = columns.begin(run), end = columns.end(run);
            by_pieces<kThreads, V>(y, begin, end,
                                   [&](int c) { finish_any(f, y, c, begin, end, in.load(c), r); });
          }
        }
      }
      if (f.sum) {
        __syncthreads();
#pragma unroll 1
        for (int q = 0; q < kFlight; ++q) {
          if (row_number(q) >= f.rows) continue;
          X* const sum = static_cast<X*>(f.sum) + row_number(q) * n;
#pragma unroll 1
          for (int run = 0; run < kRuns; ++run) {
            const auto in = summand(q, run);
            const int begin = columns.begin(run), end = columns.end(run);
            by_pieces<kThreads, V>(sum, begin, end, [&](int c) {
              auto v = in.load(c);
              store_within(sum, c, begin, end, v);
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
  using Row = Reader<X, V>;
  const int n = static_cast<int>(f.n), k = static_cast<int>(f.k);
  const bool adds = f.residual.data;
  RowSum<T, kLongThreads, false> row_sum(1);
  for (int64_t m = blockIdx.x; m < f.rows; m += gridDim.x) {
    Row row(row_of<X>(f.x, m), 0, n);
    const Row residual(adds ? row_of<X>(f.residual, m) : nullptr, 0, n, f.sum == f.residual.data);
    X* const sum_row = static_cast<X*>(f.sum) + m * n;
    const bool on_piece = misaligned(sum_row) == 0;
    Fold<T> sum;
#pragma unroll 1
    for (int c = threadIdx.x * V; c < (adds ? n : k); c += kLongThreads * V) {
      auto x = row.load(c);
      if (adds) {
        add(x, residual.load(c));
        store_within(sum_row, c, 0, n, x, on_piece);
      }
      sum.add(squares(x, c, k, T(0)));
    }
    const T r = rstd_of(f, row_sum(sum.total()));
    if (f.rstd && threadIdx.x == 0) static_cast<T*>(f.rstd)[m] = r;
    if (adds) row = Row(sum_row, 0, n);
    // y over x begins at the same places, and x is read there and nowhere else.
    Y* const y = static_cast<Y*>(f.y) + m * n;
    by_pieces<kLongThreads, V>(y, 0, n, [&](int c) { finish_any(f, y, c, 0, n, row.load(c), r); });
  }
}

}  // namespace fused_rmsnorm::cuda
