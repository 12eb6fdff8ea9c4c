// Which kernel a forward is: by what is asked for, the plan's family and shape, the dtypes and how the rows
// lie.
#pragma once
#include <algorithm>

#include "forward_any.cuh"
#include "forward_general.cuh"
#include "forward_rows.cuh"
#include "rows.h"
#include "shapes.h"

namespace fused_rmsnorm::cuda {

template <class X, int kShape, bool kCluster>
const char* launch_forward_rows(const Forward& f, const Plan& p, void* stream) {
  Launch how{"forward_rows", std::min(ceil_div(f.rows, p.rows_per_block), p.max_grid) * p.cluster,
             kBlock<kShape>, p.shared_bytes, p.cluster};
  if constexpr (sizeof(X) < 8) {
    if (f.y_dtype == f.x_dtype && is_aligned(f, p)) {
      constexpr Shape shape = kShapes[kShape];
      if (shape.threads >= kSlotsFrom) how.shared_bytes += shape.threads * shape.items * 16;
      const auto run = [&](auto types) {
        using Types = decltype(types);
        return f.residual.data
                   ? launch<forward_rows<Types, kShape, true, kCluster>>(how, stream, f, p.cluster)
                   : launch<forward_rows<Types, kShape, false, kCluster>>(how, stream, f, p.cluster);
      };
      if constexpr (sizeof(X) == 2) {
        if (f.w_dtype != f.x_dtype) return run(RowTypes<X, float>{});
      }
      return run(RowTypes<X, X>{});
    }
  }
  how.shared_bytes += p.rows_per_block * Image<X, kShape, 16 / sizeof(X), kCluster>::kBytes;
  if constexpr (sizeof(X) == 2) {
    if (f.y_dtype != f.x_dtype)
      return launch<forward_rows_any<X, float, kShape, kCluster>>(how, stream, f, p.cluster);
  }
  return launch<forward_rows_any<X, X, kShape, kCluster>>(how, stream, f, p.cluster);
}

template <class X>
const char* launch_forward_general(const Forward& f, const Plan& p, void* stream) {
  const WeightRows weights = weight_rows_of(f);
  const bool aligned = is_aligned(f, p);
  if (p.family == Family::two_pass) {
    const Launch how{"forward_general_long", std::min(f.rows, p.max_grid), kGeneralLongThreads,
                     p.shared_bytes, 1};
    return launch<forward_general_long<X>>(how, stream, f, weights, aligned);
  }
  return with_general_shape<X>(p, [&](auto threads, auto items) {
    const Launch how{"forward_general", std::min(ceil_div(f.rows, p.rows_per_block), p.max_grid),
                     p.threads * p.rows_per_block, p.shared_bytes, 1};
    const auto run = [&](auto form) {
      return launch<
          forward_general<X, decltype(form)::value, decltype(threads)::value, decltype(items)::value>>(
          how, stream, f, weights, aligned);
    };
    if constexpr (kHasUsual<X>) {
      if (is_usual(f, p)) return with_usual_form(f.gate, run);
    }
    return run(FormType<Form::any>{});
  });
}

// One translation unit per dtype of x instantiates this.
template <class X>
const char* forward_of(const Forward& f, const Plan& p, void* stream) {
  if (is_general(f)) return launch_forward_general<X>(f, p, stream);
  if (p.family == Family::two_pass) {
    const Launch how{"forward_long", std::min(f.rows, p.max_grid), kLongThreads, p.shared_bytes, 1};
    if constexpr (sizeof(X) == 2) {
      if (f.y_dtype != f.x_dtype) return launch<forward_long<X, float>>(how, stream, f);
    }
    return launch<forward_long<X, X>>(how, stream, f);
  }
  return with_shape<X, kForwardShapes>(p, [&](auto shape, auto cluster) {
    return launch_forward_rows<X, decltype(shape)::value, decltype(cluster)::value>(f, p, stream);
  });
}

}  // namespace fused_rmsnorm::cuda
