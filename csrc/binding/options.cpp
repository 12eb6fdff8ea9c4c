#include "options.h"

#include <c10/core/ScalarType.h>

#include <charconv>
#include <cmath>
#include <limits>

namespace fused_rmsnorm {

Options parse_options(std::optional<double> eps, std::optional<double> p, double weight_offset,
                      c10::string_view casting_mode) {
  TORCH_CHECK_VALUE(!eps || *eps >= 0, "eps must be None or a number >= 0, but got ", *eps);
  TORCH_CHECK_VALUE(!p || (*p > 0 && *p <= 1), "p must be None or a number in (0, 1], but got ", *p,
                    " (a fraction, not a percentage)");
  TORCH_CHECK_VALUE(std::isfinite(weight_offset), "weight_offset must be finite, but got ", weight_offset);
  const bool llama = casting_mode == "llama";
  TORCH_CHECK_VALUE(llama || casting_mode == "torch",
                    "casting_mode must be \"torch\" or \"llama\", but got \"", casting_mode, "\"");
  return {eps, p, weight_offset, llama};
}

int64_t stat_columns(std::optional<double> p, int64_t n) {
  if (!p) return n;
  // Shortest decimal that reads back as p: up to 17 digits and an exponent, p = digits * 10^exponent.
  char text[32];
  const auto [end, error] = std::to_chars(text, text + sizeof text, *p, std::chars_format::scientific);
  TORCH_INTERNAL_ASSERT(error == std::errc());
  __int128 digits = 0;
  int exponent = 0;
  bool fraction = false;
  for (const char* c = text; c != end; c++) {
    if (*c == '.') {
      fraction = true;
    } else if (*c == 'e') {
      int e = 0;
      std::from_chars(c + (c[1] == '+' ? 2 : 1), end, e);
      exponent += e;
      break;
    } else {
      digits = digits * 10 + (*c - '0');
      exponent -= fraction;
    }
  }
  // p <= 1, so exponent <= 0. digits * n < 10^17 * 2^63 < 10^36: below that p * n < 1.
  if (exponent < -36) return n > 0 ? 1 : 0;
  __int128 scale = 1;
  for (; exponent < 0; exponent++) scale *= 10;
  return static_cast<int64_t>((digits * n + scale - 1) / scale);
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

}  // namespace fused_rmsnorm
