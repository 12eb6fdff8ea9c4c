// The non-tensor arguments of every operator, parsed once at the operator's boundary.
#pragma once
#include "../include/fused_rmsnorm/fused_rmsnorm.h"

namespace fused_rmsnorm {

// Raises ValueError for p, weight_offset or casting_mode outside what is accepted. eps is any number, as
// in F.rms_norm: rows whose mean square is below -eps become NaN.
C10_EXPORT Options parse_options(std::optional<double> eps, std::optional<double> p, double weight_offset,
                                 c10::string_view casting_mode);
// In addition ValueError for an activation other than "silu" and "sigmoid".
C10_EXPORT GatedOptions parse_gated_options(c10::string_view activation, bool norm_before_gate,
                                            const Options& options);

// The smallest k with double(k) / double(n) >= p: 0.07 of 100 is 7, although the binary product is a
// little above, and 5.0 / 7 of 7 is 5: what a person means, by a decimal and by a ratio. Without p, n.
int64_t stat_columns(std::optional<double> p, int64_t n);

// fp32 for the half types, else the type itself.
at::ScalarType acc_type(at::ScalarType x);

double resolve_eps(const Options& options, at::ScalarType x);

// x's dtype; in llama mode the promoted dtype when the weight is wider, as in transformers.
at::ScalarType output_type(const Options& options, at::ScalarType x, const std::optional<at::Tensor>& weight);
// Of a norm before its gate, x's dtype, which the product has; of a norm after its gate as above.
at::ScalarType output_type(const GatedOptions& options, at::ScalarType x,
                           const std::optional<at::Tensor>& weight);

inline bool present(const std::optional<at::Tensor>& t) { return t.has_value() && t->defined(); }

}  // namespace fused_rmsnorm
