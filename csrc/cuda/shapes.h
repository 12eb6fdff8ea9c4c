// From the number of a shape in a plan to the template that is instantiated for it.
#pragma once
#include <type_traits>

#include "plan.h"

namespace fused_rmsnorm::cuda {

// run(shape, cluster), both as types with a `value`, for the plan's shape among the first kCount.
template <class X, int kCount, int kShape = 0, class Run>
const char* with_shape(const Plan& p, Run run) {
  if constexpr (kShape < kCount) {
    if (p.shape != kShape) return with_shape<X, kCount, kShape + 1>(p, run);
    using Number = std::integral_constant<int, kShape>;
    if constexpr (serves(kShape, sizeof(X), true)) {
      if (p.family == Family::cluster) return run(Number{}, std::true_type{});
    }
    if constexpr (serves(kShape, sizeof(X), false)) return run(Number{}, std::false_type{});
  }
  return "no kernel for this launch plan";
}

// run(threads, items), as types, for the plan of a general call.
template <class X, class Run>
const char* with_general_shape(const Plan& p, Run run) {
  return with_shape<X, kGeneralCount>(p, [&](auto number, auto) {
    constexpr GeneralShape s = kGeneralShapes[decltype(number)::value];
    return run(std::integral_constant<int, s.threads>{}, std::integral_constant<int, s.items>{});
  });
}

}  // namespace fused_rmsnorm::cuda
