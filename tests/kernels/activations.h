// How exact the activations of the gates have to be, over numbers of every exponent.
#pragma once
#include "problem.h"

namespace fused_rmsnorm::test {

constexpr double kLeast = -89;  // below, sigmoid(z) is 0 or as good as that
constexpr double kFirst = 17,
                 kLast = 86.6;  // where exp(-z) shows, and does not lie below fp32's normal numbers

inline void check_activation(Checker& check, double z, double value, double slope, bool sigmoid,
                             const char* kernels) {
  const auto where = [&](const char* what) {
    return [=] { return std::string(kernels) + ": " + what + " of " + std::to_string(z); };
  };
  if (std::isnan(z)) {
    return check.that(std::isnan(value) && std::isnan(slope), where("activation of NaN"));
  }
  if (std::isinf(z)) return sigmoid ? check.near(value, z > 0, 0, where("sigmoid")) : void();
  const Activation want = activation(z, sigmoid);
  const double u = 0x1p-24, tiny = 0x1p-149 * (1 + std::fabs(z));
  if (z < kLeast) {
    check.near(value, 0, 4e-37, where("value"));
    return check.near(slope, 0, 4e-37, where("slope"));
  }
  // An exponential off by 2 u (one unit in the last place at most), a sum, a quotient.
  check.near(value, want.value, 4.5 * u * std::fabs(want.value) + tiny, where("value"));
  const double near_limit = z < -87 ? 4e-37 : 0;  // exp(-z) squared leaves fp32 there
  check.near(slope, want.slope, (kActivationError + 2) * u * want.slope_size + tiny + near_limit + 0x1p-125,
             where("slope"));
  if (sigmoid && z >= kFirst && z <= kLast) {
    const double exact = std::exp(-z);
    check.near(slope, exact, spacing(Dtype::f32, exact), where("exp(-z), within a unit in the last place"));
  }
}

}  // namespace fused_rmsnorm::test
