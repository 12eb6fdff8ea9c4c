// The forward of rows of any alignment, in the three families, for what is not worth a kernel of
// aligned rows of its own, too: fp64, and y wider than x.
// The weight's dtype and the fused add are branches here: fewer kernels, and instructions to spare.
#pragma once
#include "fold.cuh"
#include "forward_rows.cuh"
#include "image.cuh"

namespace fused_rmsnorm::cuda {

// Whether y is the product of x, r and a scale, as in most calls: what is worth vectors. Other calls go
// column by column.
template <class X, class Y>
__device__ __forceinline__ bool by_vectors(const Forward& f) {
  return std::is_same_v<X, Y> && weight_in_pieces(f) && !f.bias && !f.llama;
}
// y of columns c ... in such a call.
template <class Y, class X, class T, int V>
__device__ __forceinline__ void finish_vector(const Forward& f, Y* row, int c, const Vec<X, V>& x, T r) {
  const auto load = [&](T(&scale)[V]) { load_scale_inside<X>(f, c, scale); };
  auto y = normalise<Y, true>(f, x, r, false, load, load);
  store_pieces(row + c, y);
}
// y of one column, in any.
template <class Y, class X>
__device__ __forceinline__ void finish_one(const Forward& f, Y* row, int c, X x, Acc<X> r) {
  using T = Acc<X>;
  T out[1] = {widen(x) * r};
  apply_weight<X>(
      f, f.llama, out, [&](T(&scale)[1]) { load_scale_one<X>(f, c, scale); },
      [&](T(&bias)[1]) { bias[0] = column_of<X>(f.bias, f.w_dtype != f.x_dtype, c); });
  row[c] = narrow<Y>(out[0]);
}

// Families `registers` and `cluster`. Without the 1, ptxas holds blocks of 128 to 56 registers on sm_80 and
// spills.
template <class X, class Y, int kShape, bool kCluster>
__global__ void __launch_bounds__(kBlock<kShape>, 1) forward_rows_any(Forward f, int cluster) {
  if constexpr (kLaunched<kShape, kCluster>) {
    using T = Acc<X>;
    constexpr int V = 16 / sizeof(X), kThreads = kShapes[kShape].threads, kItems = kShapes[kShape].items;
    constexpr int kRows = kBlock<kShape> / kThreads, kFlight = kShapes[kShape].flight;
    using RowImage = Image<X, kShape, V, kCluster>;
    const Runs<kShape, V, kCluster> columns(f.n, cluster);
    constexpr int kRuns = columns.kCount;
    const int n = columns.n, row_in_block = threadIdx.x / kThreads, thread = threadIdx.x % kThreads;
    const int k = f.k < f.n ? static_cast<int>(f.k) : n + V;  // zeros beyond n need no question
    const int64_t step = int64_t{kCluster ? clusters_of(gridDim.x, cluster) : gridDim.x} * (kRows * kFlight);
    const bool vectors = by_vectors<X, Y>(f);
    RowSum<T, kThreads, kCluster> row_sum(cluster);

    for (int64_t base = int64_t{kCluster ? clusters_of(blockIdx.x, cluster) : blockIdx.x} * (kRows * kFlight);
         base < f.rows; base += step) {
      const auto row_number = [&](int q) { return base + row_in_block + q * kRows; };
      const auto image = [&](int q) {
        return RowImage{kScratchBytes + (q * kRows + row_in_block) * RowImage::kBytes};
      };
#pragma unroll 1
      for (int q = 0; q < kFlight; ++q) {
        if (row_number(q) < f.rows) image(q).fetch(columns, row_of<X>(f.x, row_number(q)));
      }
      __pipeline_commit();
      __pipeline_wait_prior(0);
      __syncthreads();
      if (f.residual.data) {  // column by column, for sum may be the residual's memory
#pragma unroll 1
        for (int q = 0; q < kFlight; ++q) {
          const int64_t m = row_number(q);
          if (m >= f.rows) break;
          const X* const residual = row_of<X>(f.residual, m);
          X* const sum = static_cast<X*>(f.sum) + m * n;
#pragma unroll 1
          for (int run = 0; run < kRuns; ++run) {
            const auto in = image(q).row(columns, f.x, m).run(run);
#pragma unroll 1
            for (int c = columns.begin(run) + thread; c < columns.end(run); c += kThreads)
              sum[c] = in.column(c) = narrow<X>(widen(in.column(c)) + widen(residual[c]));
          }
        }
        __syncthreads();
      }
      T r = 0;  // of one of the rows in flight; its sum first
#pragma unroll 1
      for (int q = 0; q < kFlight; ++q) {
        const int64_t m = row_number(q);
        T sum = 0;
        if (m < f.rows) {
#pragma unroll 1
          for (int run = 0; run < kRuns; ++run) {
            const auto in = image(q).row(columns, f.x, m).run(run);
            int c = columns.begin(run) + thread * V;
#pragma unroll 1
            for (int i = 0; i < kItems / kRuns && c < n; ++i, c += kThreads * V)
              sum = squares(in.load(c), c, k, sum);
          }
        }
        sum = row_sum(sum);
        r = static_cast<int>(threadIdx.x) % kFlight == q ? sum : r;
      }
      r = rstd_of(f, r);
#pragma unroll 1
      for (int q = 0; q < kFlight; ++q) {
        const int64_t m = row_number(q);
        const T rstd = kFlight == 1 ? r : __shfl_sync(0xffffffffu, r, q, kThreads);
        if (m >= f.rows) continue;
        if (f.rstd && thread == 0 && columns.first == 0) static_cast<T*>(f.rstd)[m] = rstd;
        Y* const y = static_cast<Y*>(f.y) + m * n;
#pragma unroll 1
        for (int run = 0; run < kRuns; ++run) {
          const auto in = image(q).row(columns, f.x, m).run(run);
          by_pieces<kThreads, V>(
              y, columns.begin(run), columns.end(run), vectors,
              [&](int c) { finish_vector(f, y, c, in.load(c), rstd); },
              [&](int c) { finish_one(f, y, c, in.column(c), rstd); });
        }
      }
      if (base + step < f.rows) __syncthreads();  // the images are filled again
    }
  }
}

// Family `two_pass`: a block per row of any length. The barrier of the sum lies between what is
// written to f.sum and what is read back from it.
template <class X, class Y>
__global__ void __launch_bounds__(kLongThreads, 1) forward_long(Forward f) {
  using T = Acc<X>;
  constexpr int V = 16 / sizeof(X);
  using Row = Reader<X, V>;
  const int n = static_cast<int>(f.n), k = static_cast<int>(f.k);
  const bool adds = f.residual.data, vectors = by_vectors<X, Y>(f);
  RowSum<T, kLongThreads, false> row_sum(1);
  for (int64_t m = blockIdx.x; m < f.rows; m += gridDim.x) {
    Row row(row_of<X>(f.x, m), n);
    const Row residual(adds ? row_of<X>(f.residual, m) : nullptr, n, f.sum == f.residual.data);
    X* const sum_row = static_cast<X*>(f.sum) + m * n;
    const bool on_piece = misaligned(sum_row) == 0;
    Fold<T> sum;
#pragma unroll 1
    for (int c = threadIdx.x * V; c < (adds ? n : k); c += kLongThreads * V) {
      auto x = row.load(c);
      if (adds) {
        add(x, residual.load(c));
        store_within(sum_row, c, n, x, on_piece);
      }
      sum.add(squares(x, c, k, T(0)));
    }
    const T r = rstd_of(f, row_sum(sum.total()));
    if (f.rstd && threadIdx.x == 0) static_cast<T*>(f.rstd)[m] = r;
    if (adds) row = Row(sum_row, n);
    // y over x begins at the same places, and x is read there and nowhere else.
    Y* const y = static_cast<Y*>(f.y) + m * n;
    by_pieces<kLongThreads, V>(
        y, 0, n, vectors, [&](int c) { finish_vector(f, y, c, row.load(c), r); },
        [&](int c) { finish_one(f, y, c, row.column(c), r); });
  }
}

}  // namespace fused_rmsnorm::cuda
