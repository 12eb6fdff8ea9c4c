#include "options.h"

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace fused_rmsnorm {

Options parse_options(std::optional<double> eps, std::optional<double> p, double weight_offset,
                      c10::string_view casting_mode) {
  TORCH_CHECK_VALUE(!p || (*p > 0 && *p <= 1), "p must be None or a number in (0, 1], but got ", *p,
                    " (a fraction, not a percentage)");
  TORCH_CHECK_VALUE(std::isfinite(weight_offset), "weight_offset must be finite, but got ", weight_offset);
  const bool llama = casting_mode == "llama";
  TORCH_CHECK_VALUE(llama || casting_mode == "torch",
                    "casting_mode must be \"torch\" or \"llama\", but got \"", casting_mode, "\"");
  return {eps, p, weight_offset, llama};
}

GatedOptions parse_gated_options(c10::string_view activation, bool norm_before_gate, const Options& options) {
  const bool sigmoid = activation == "sigmoid";
  TORCH_CHECK_VALUE(sigmoid || activation == "silu", "activation must be \"silu\" or \"sigmoid\", but got \"",
                    activation, "\"");
  return {options, sigmoid, norm_before_gate};
}

int64_t stat_columns(std::optional<double> p, int64_t n) {
  if (!p || *p == 1 || n == 0) return n;
  const double length = static_cast<double>(n);
  const auto reaches = [&](int64_t k) { return static_cast<double>(k) / length >= *p; };
  // Rounded, the product may have passed the whole number above it, and not the one after that: k - 1 does
  // not reach p for any n below 2^52.
  int64_t k = std::clamp(static_cast<int64_t>(*p * length), int64_t{1}, n);
  while (k < n && !reaches(k)) k++;
  return k;
}

at::ScalarType acc_type(at::ScalarType x) { return x == at::kHalf || x == at::kBFloat16 ? at::kFloat : x; }

double resolve_eps(const Options& options, at::ScalarType x) {
  if (options.eps) return *options.eps;
  return c10::toRealValueType(acc_type(x)) == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                          : std::numeric_limits<float>::epsilon();
}

at::ScalarType output_type(const Options& options, at::ScalarType x,
                           const std::optional<at::Tensor>& weight) {
  return options.llama && present(weight) ? c10::promoteTypes(x, weight->scalar_type()) : x;
}

at::ScalarType output_type(const GatedOptions& options, at::ScalarType x,
                           const std::optional<at::Tensor>& weight) {
  return options.norm_before_gate ? x : output_type(static_cast<const Options&>(options), x, weight);
}

}  // namespace fused_rmsnorm
