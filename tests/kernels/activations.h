// How exact the activations of the gates have to be, over numbers of every exponent.
#pragma once
#include "problem.h"

namespace fused_rmsnorm::test {

constexpr double kLeast = -89;         // below, sigmoid(z) is 0 or as good as that
constexpr double kQuickLeast = -87.3;  // of approximations
constexpr double kFirst = 17,
                 kLast = 86.6;  // where exp(-z) shows, and does not lie below fp32's normal numbers

inline void check_activation(Checker& check, double z, double value, double slope, bool sigmoid,
                             const char* kernels, bool quick = false) {
  const auto where = [&](const char* what) {
    return [=] { return std::string(kernels) + ": " + what + " of " + std::to_string(z); };
  };
  if (std::isnan(z)) {
    return check.that(std::isnan(value) && std::isnan(slope), where("activation of NaN"));
  }
  if (std::isinf(z))
    return sigmoid ? check.near(value, z > 0, quick ? 0x1p-24 : 0, where("sigmoid")) : void();
  const Activation want = activation(z, sigmoid);
  const double u = 0x1p-24, tiny = 0x1p-149 * (1 + std::fabs(z));
  if (z < (quick ? kQuickLeast : kLeast)) {
    const double nothing = quick ? 1.1e-36 : 4e-37;
    check.near(value, 0, nothing, where("value"));
    return check.near(slope, 0, nothing, where("slope"));
  }
  const double more = quick ? quick_error(z) : 0;
  // An exponential off by 2 u (one unit in the last place at most), a sum, a quotient. more: of
  // approximations.
  check.near(value, want.value, (4.5 + more) * u * std::fabs(want.value) + tiny, where("value"));
  const double near_limit = z < -87 ? 4e-37 : 0;  // exp(-z) squared leaves fp32 there
  check.near(slope, want.slope,
             (kActivationError + 2 + more) * u * want.slope_size + tiny + near_limit + 0x1p-125,
             where("slope"));
  if (!quick && sigmoid && z >= kFirst && z <= kLast) {
    const double exact = std::exp(-z);
    check.near(slope, exact, spacing(Dtype::f32, exact), where("exp(-z), within a unit in the last place"));
  }
}

}  // namespace fused_rmsnorm::test
