// Schemas, and the operators that are compositions of others.
//
// rms_norm, add_rms_norm and rms_norm_composite have a CompositeImplicitAutograd kernel and what
// stands in for it under vmap: a kernel under Autograd beside it would silently never run. Everything
// else (backends, Meta, Autograd, FuncTorchBatched) is registered on the _fwd and _bwd operators.
#include "ops.h"

#include <ATen/ops/broadcast_tensors.h>
#include <ATen/ops/ones_like.h>

#include "checks.h"
#include "registration.h"

namespace fused_rmsnorm {
namespace {

// An operator by name, called with Options or GatedOptions.
template <class Signature>
struct Operator;

template <class Result, class... Args>
struct Operator<Result(Args...)> {
  using Full = Result(Args..., std::optional<double>, std::optional<double>, double, c10::string_view);
  c10::TypedOperatorHandle<Full> op;

  explicit Operator(const char* name)
      : op(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Full>()) {}
  Result operator()(const Options& o, Args... args) const {
    return op.call(args..., o.eps, o.p, o.weight_offset, o.llama ? "llama" : "torch");
  }
};

template <class Signature>
struct GatedOperator;

template <class Result, class... Args>
struct GatedOperator<Result(Args...)> {
  Operator<Result(Args..., c10::string_view, bool)> op;

  explicit GatedOperator(const char* name) : op(name) {}
  Result operator()(const GatedOptions& o, Args... args) const {
    return op(o, args..., o.sigmoid ? "sigmoid" : "silu", o.norm_before_gate);
  }
};

// Weight and bias in one dtype and shape, and no bias without a weight: what the kernels take. All
// conversions are differentiable, and no-ops for every module.
struct Affine {
  OptTensor weight, bias;

  Affine(const Tensor& x, const OptTensor& w, const OptTensor& b) : weight(w), bias(b) {
    if (!present(b)) return;
    if (!present(w)) {
      weight = at::ones_like(*b);
      return;
    }
    auto type = c10::promoteTypes(w->scalar_type(), b->scalar_type());
    const bool same_shape = (w->dim() == 1 && b->dim() == 1) || w->sym_sizes() == b->sym_sizes();
    // What is broadcast here has a gradient that is summed here: not in a half type.
    if (!same_shape) type = c10::promoteTypes(type, acc_type(x.scalar_type()));
    weight = w->to(type);
    bias = b->to(type);
    if (same_shape) return;
    const auto both = at::broadcast_tensors({*weight, *bias});
    weight = both[0];
    bias = both[1];
  }
};

Tensor rms_norm_op(const Options& options, const Tensor& x, const OptTensor& weight, const OptTensor& bias) {
  return rms_norm(x, weight, bias, options);
}

Tensor rms_norm_composite_op(const Options& options, const Tensor& x, const OptTensor& weight,
                             const OptTensor& bias) {
  return rms_norm_composite(x, weight, bias, options);
}

Tensor rms_norm_gated_op(const GatedOptions& options, const Tensor& x, const Tensor& gate,
                         const OptTensor& weight, const OptTensor& bias) {
  return rms_norm_gated(x, gate, weight, bias, options);
}

Tensor rms_norm_gated_composite_op(const GatedOptions& options, const Tensor& x, const Tensor& gate,
                                   const OptTensor& weight, const OptTensor& bias) {
  return rms_norm_gated_composite(x, gate, weight, bias, options);
}

Two add_rms_norm_op(const Options& options, const Tensor& x, const Tensor& residual, const OptTensor& weight,
                    const OptTensor& bias) {
  return add_rms_norm(x, residual, weight, bias, options);
}

}  // namespace

Tensor rms_norm_composite(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                          const Options& options) {
  check_norm(options, x, weight, bias);
  return std::get<0>(composite_fwd(options, x, weight, bias)).contiguous();
}

Tensor rms_norm(const Tensor& x, const OptTensor& weight, const OptTensor& bias, const Options& options) {
  check_norm(options, x, weight, bias);
  if (x.is_complex()) {
    return std::get<0>(composite_fwd(options, x, weight, bias)).contiguous();
  }
  const Affine affine(x, weight, bias);
  // A bias wider than the weight widens the arithmetic, not the result.
  return std::get<0>(call_fwd(options, x, affine.weight, affine.bias))
      .to(output_type(options, x.scalar_type(), weight));
}

Two add_rms_norm(const Tensor& x, const Tensor& residual, const OptTensor& weight, const OptTensor& bias,
                 const Options& options) {
  check_norm(options, x, weight, bias);
  check_residual(x, residual);
  if (x.is_complex()) {
    const Tensor sum = (x + residual).contiguous();
    return {std::get<0>(composite_fwd(options, sum, weight, bias)), sum};
  }
  const Affine affine(x, weight, bias);
  const auto [y, sum, rstd] = call_add_fwd(options, x, residual, affine.weight, affine.bias);
  return {y.to(output_type(options, x.scalar_type(), weight)), sum};
}

Tensor rms_norm_gated(const Tensor& x, const Tensor& gate, const OptTensor& weight, const OptTensor& bias,
                      const GatedOptions& options) {
  check_gated(options, x, gate, weight, bias);
  const Affine affine(x, weight, bias);
  return std::get<0>(call_gated_fwd(options, x, gate, affine.weight, affine.bias))
      .to(output_type(options, x.scalar_type(), weight));
}

Tensor rms_norm_gated_composite(const Tensor& x, const Tensor& gate, const OptTensor& weight,
                                const OptTensor& bias, const GatedOptions& options) {
  check_gated(options, x, gate, weight, bias);
  return std::get<0>(composite_gated_fwd(options, x, gate, weight, bias)).contiguous();
}

void add_rms_norm_(Tensor& x, Tensor& residual, const OptTensor& weight, const OptTensor& bias,
                   const Options& options) {
  check_norm(options, x, weight, bias);
  check_residual(x, residual);
  call_add_inplace(options, x, residual, weight, bias);
}

Two call_fwd(const Options& options, const Tensor& x, const OptTensor& weight, const OptTensor& bias) {
  static const Operator<Two(const Tensor&, const OptTensor&, const OptTensor&)> op(FUSED_RMSNORM_NAMESPACE
                                                                                   "::rms_norm_fwd");
  return op(options, x, weight, bias);
}

Three call_add_fwd(const Options& options, const Tensor& x, const Tensor& residual, const OptTensor& weight,
                   const OptTensor& bias) {
  static const Operator<Three(const Tensor&, const Tensor&, const OptTensor&, const OptTensor&)> op(
      FUSED_RMSNORM_NAMESPACE "::add_rms_norm_fwd");
  return op(options, x, residual, weight, bias);
}

void call_add_inplace(const Options& options, Tensor& x, Tensor& residual, const OptTensor& weight,
                      const OptTensor& bias) {
  static const Operator<void(Tensor&, Tensor&, const OptTensor&, const OptTensor&)> op(FUSED_RMSNORM_NAMESPACE
                                                                                       "::add_rms_norm_");
  op(options, x, residual, weight, bias);
}

Three call_bwd(const Options& options, const Tensor& dy, const Tensor& x, const OptTensor& weight,
               const Tensor& rstd, const OptTensor& grad_sum, Mask3 mask) {
  static const Operator<Three(const Tensor&, const Tensor&, const OptTensor&, const Tensor&, const OptTensor&,
                              Mask3)>
      op(FUSED_RMSNORM_NAMESPACE "::rms_norm_bwd");
  return op(options, dy, x, weight, rstd, grad_sum, mask);
}

Two call_gated_fwd(const GatedOptions& options, const Tensor& x, const Tensor& gate, const OptTensor& weight,
                   const OptTensor& bias) {
  static const GatedOperator<Two(const Tensor&, const Tensor&, const OptTensor&, const OptTensor&)> op(
      FUSED_RMSNORM_NAMESPACE "::rms_norm_gated_fwd");
  return op(options, x, gate, weight, bias);
}

Four call_gated_bwd(const GatedOptions& options, const Tensor& dy, const Tensor& x, const Tensor& gate,
                    const OptTensor& weight, const OptTensor& bias, const Tensor& rstd, Mask4 mask) {
  static const GatedOperator<Four(const Tensor&, const Tensor&, const Tensor&, const OptTensor&,
                                  const OptTensor&, const Tensor&, Mask4)>
      op(FUSED_RMSNORM_NAMESPACE "::rms_norm_gated_bwd");
  return op(options, dy, x, gate, weight, bias, rstd, mask);
}

Three add_by_parts(const Options& options, const Tensor& x, const Tensor& residual, const OptTensor& weight,
                   const OptTensor& bias) {
  const Tensor sum = (x + residual).contiguous();
  auto [y, rstd] = call_fwd(options, sum, weight, bias);
  return {y.to(output_type(options, x.scalar_type(), weight)), sum, rstd};
}

FUSED_RMSNORM_LIBRARY(m) {
  const auto def = [&](const std::string& schema) { m.def(schema.c_str(), {at::Tag::pt2_compliant_tag}); };
  const std::string affine = "Tensor? weight=None, Tensor? bias=None, ";
  const std::string options =
      "float? eps=None, float? p=None, float weight_offset=0.0, str casting_mode=\"torch\"";
  def("rms_norm(Tensor input, " + affine + options + ") -> Tensor");
  def("rms_norm_composite(Tensor input, " + affine + options + ") -> Tensor");
  def("rms_norm_fwd(Tensor input, " + affine + options + ") -> (Tensor y, Tensor rstd)");
  def("rms_norm_bwd(Tensor grad_output, Tensor input, Tensor? weight, Tensor rstd, Tensor? grad_sum, "
      "bool[3] output_mask, " +
      options + ") -> (Tensor dx, Tensor dw, Tensor db)");
  def("add_rms_norm(Tensor input, Tensor residual, " + affine + options + ") -> (Tensor y, Tensor sum)");
  def("add_rms_norm_fwd(Tensor input, Tensor residual, " + affine + options +
      ") -> (Tensor y, Tensor sum, Tensor rstd)");
  const std::string gated = "str activation=\"silu\", bool norm_before_gate=True, " + options;
  def("rms_norm_gated(Tensor input, Tensor gate, " + affine + gated + ") -> Tensor");
  def("rms_norm_gated_composite(Tensor input, Tensor gate, " + affine + gated + ") -> Tensor");
  def("rms_norm_gated_fwd(Tensor input, Tensor gate, " + affine + gated + ") -> (Tensor y, Tensor rstd)");
  def("rms_norm_gated_bwd(Tensor grad_output, Tensor input, Tensor gate, Tensor? weight, Tensor? bias, "
      "Tensor rstd, bool[4] output_mask, " +
      gated + ") -> (Tensor dx, Tensor dgate, Tensor dw, Tensor db)");
  def("add_rms_norm_(Tensor(a!) input, Tensor(b!) residual, " + affine + options + ") -> ()");
}

namespace {

void register_compositions(torch::Library& m) {
  m.impl("rms_norm", kernel<rms_norm_op>);
  m.impl("rms_norm_composite", kernel<rms_norm_composite_op>);
  m.impl("add_rms_norm", kernel<add_rms_norm_op>);
  m.impl("rms_norm_gated", kernel<rms_norm_gated_op>);
  m.impl("rms_norm_gated_composite", kernel<rms_norm_gated_composite_op>);
}

}  // namespace

FUSED_RMSNORM_LIBRARY_IMPL(CompositeImplicitAutograd, m) { register_compositions(m); }
// The same under vmap, which would otherwise call each of them once per sample.
FUSED_RMSNORM_LIBRARY_IMPL(FuncTorchBatchedDecomposition, m) { register_compositions(m); }

}  // namespace fused_rmsnorm
