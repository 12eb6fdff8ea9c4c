// Which kernels a backward is: by what is asked for, the plan's family and shape, the dtypes, how the rows
// lie, and whether db is wanted, whose sums take registers.
#pragma once
#include <algorithm>

#include "backward_any.cuh"
#include "backward_general.cuh"
#include "backward_rows.cuh"
#include "finalize.cuh"
#include "rows.h"
#include "shapes.h"

namespace fused_rmsnorm::cuda {

template <class X, int kShape, bool kCluster>
const char* launch_backward_rows(const Backward& b, const Plan& p, void* stream) {
  const Launch how{"backward_rows", partials_of(p, b.rows) * p.cluster, kBlock<kShape>, p.shared_bytes,
                   p.cluster};
  const bool ahead = p.stages > 1;
  if constexpr (sizeof(X) < 8) {
    if (b.dy_dtype == b.x_dtype && is_aligned(b, p)) {
      const auto run = [&](auto types) {
        using Types = decltype(types);
        return b.db ? launch<backward_rows<Types, kShape, true, kCluster>>(how, stream, b, p.cluster, ahead)
                    : launch<backward_rows<Types, kShape, false, kCluster>>(how, stream, b, p.cluster, ahead);
      };
      if constexpr (sizeof(X) == 2) {
        if (b.w_dtype != b.x_dtype) return run(RowTypes<X, float>{});
      }
      return run(RowTypes<X, X>{});
    }
  }
  if constexpr (sizeof(X) == 2) {
    if (b.dy_dtype != b.x_dtype)
      return launch<backward_rows_any<X, float, kShape, kCluster>>(how, stream, b, p.cluster, ahead);
  }
  return launch<backward_rows_any<X, X, kShape, kCluster>>(how, stream, b, p.cluster, ahead);
}

template <class X, class D>
const char* launch_two_pass(const Backward& b, const Plan& p, void* stream) {
  if (b.dw || b.db) {  // first: dx may overwrite x or dy
    const int partials = static_cast<int>(partials_of(p, b.rows));
    const Launch columns{"backward_columns", ceil_div(b.n, kColumnThreads * p.vector) * partials,
                         kColumnThreads, 0, 1};
    if (const char* error = launch<backward_columns<X, D>>(columns, stream, b, partials)) return error;
  }
  if (!b.dx) return nullptr;
  const Launch rows{"backward_long", std::min(b.rows, kMaxBlocks), kLongThreads, p.shared_bytes, 1};
  return launch<backward_long<X, D>>(rows, stream, b);
}

template <class X>
const char* launch_general_two_pass(const Backward& b, const Plan& p, int parts, void* stream) {
  const WeightRows weights = weight_rows_of(b);
  if (b.dw || b.db) {  // first: dx may overwrite x or dy
    const Launch columns{"backward_general_columns",
                         ceil_div(b.n, kColumnThreads * p.vector) * parts * b.weight_rows, kColumnThreads, 0,
                         1};
    if (const char* error =
            launch<backward_general_columns<X>>(columns, stream, b, weights, parts, is_aligned(b, p)))
      return error;
  }
  if (!b.dx) return nullptr;
  const Launch rows{"backward_general_long", std::min(b.rows, kMaxBlocks), kGeneralLongThreads,
                    p.shared_bytes, 1};
  return launch<backward_general_long<X>>(rows, stream, b, weights, is_aligned(b, p));
}

template <class X>
const char* launch_general(const Backward& b, const Plan& p, void* stream) {
  const int parts = static_cast<int>(partials_of(p, b.rows, b.weight_rows));
  if (p.family == Family::two_pass) return launch_general_two_pass<X>(b, p, parts, stream);
  return with_general_shape<X>(p, [&](auto threads, auto items) {
    const Launch how{"backward_general", parts * b.weight_rows, p.threads * p.rows_per_block, p.shared_bytes,
                     1};
    constexpr int kThreads = decltype(threads)::value, kItems = decltype(items)::value;
    const auto run = [&](auto form) {
      return launch<backward_general<X, decltype(form)::value, kThreads, kItems>>(
          how, stream, b, weight_rows_of(b), parts, is_aligned(b, p));
    };
    if constexpr (kHasUsual<X>) {
      if (is_usual(b, p)) return with_usual_form(b.gate, run);
    }
    return run(FormType<Form::any>{});
  });
}

template <class X>
const char* launch_rows(const Backward& b, const Plan& p, void* stream) {
  if (is_general(b)) return launch_general<X>(b, p, stream);
  if (p.family == Family::two_pass) {
    if constexpr (sizeof(X) == 2) {
      if (b.dy_dtype != b.x_dtype) return launch_two_pass<X, float>(b, p, stream);
    }
    return launch_two_pass<X, X>(b, p, stream);
  }
  return with_shape<X, kBackwardShapes>(p, [&](auto shape, auto cluster) {
    return launch_backward_rows<X, decltype(shape)::value, decltype(cluster)::value>(b, p, stream);
  });
}

// One translation unit per dtype of x instantiates this.
template <class X>
const char* backward_of(const Backward& b, const Plan& p, void* stream) {
  if (b.rows) {
    if (const char* error = launch_rows<X>(b, p, stream)) return error;
  }
  const int partials = static_cast<int>(partials_of(p, b.rows, b.weight_rows));
  if constexpr (sizeof(X) == 2) {
    if (b.w_dtype != b.x_dtype) return launch_finalize<float, float>(b, partials, stream);
  }
  return launch_finalize<X, Acc<X>>(b, partials, stream);
}

}  // namespace fused_rmsnorm::cuda
