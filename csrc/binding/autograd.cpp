// Derivatives. rms_norm_fwd and add_rms_norm_fwd record one RmsNormBackward, whose work is one call
// of rms_norm_bwd; rms_norm_bwd, when it is differentiated itself, records RmsNormBackwardBackward,
// which works in closed form. Forward-mode tangents are computed beside the fused primal: a
// kernel under Autograd that ignores them would silently drop them.
#include "node.h"
#include "ops.h"
#include "registration.h"

namespace fused_rmsnorm {
namespace {

using autograd::isFwGradDefined;
using autograd::variable_list;

// Derivative of the derivative. Edges: grad_output, input, weight, grad_sum.
struct RmsNormBackwardBackward final : NormNode<RmsNormBackwardBackward, 3, 4> {
  enum { kGradOutput, kInput, kWeight };
  static constexpr const char* kName = "RmsNormBackwardBackward";

  static variable_list backward(const Options& options, const variable_list& grads, Unpack unpack,
                                const Wanted&) {
    const Tensor &ddx = grads[0], &ddw = grads[1], &ddb = grads[2];
    if (!ddx.defined() && !ddw.defined() && !ddb.defined()) return variable_list(4);
    auto [grad_dy, grad_x, grad_w] = composite_bwd_bwd(options, ddx, ddw, ddb, unpack(kGradOutput),
                                                       unpack(kInput), optional(unpack(kWeight)));
    return {grad_dy, grad_x, grad_w, ddx};
  }
};

// Edges: input, weight, bias; with a fused add: input, residual, weight, bias. Gradients: of y;
// with a fused add also of sum. What is saved as input is what was normalised, sum in that case.
template <bool kAdd>
struct RmsNormBackward final : NormNode<RmsNormBackward<kAdd>, 3, kAdd ? 4 : 3> {
  using Base = NormNode<RmsNormBackward<kAdd>, 3, kAdd ? 4 : 3>;
  enum { kInput, kWeight, kRstd };
  static constexpr const char* kName = kAdd ? "AddRmsNormBackward" : "RmsNormBackward";

  static variable_list backward(const Options& options, const variable_list& grads,
                                typename Base::Unpack unpack, const typename Base::Wanted& wanted) {
    constexpr size_t kWeightEdge = kAdd ? 2 : 1;
    const Tensor& dy = grads[0];
    const Tensor dsum = kAdd ? grads[1] : Tensor();
    variable_list result(wanted.size());
    Tensor dx = dsum;
    if (dy.defined()) {
      const Mask3 mask{wanted[0] || (kAdd && wanted[1]), wanted[kWeightEdge], wanted[kWeightEdge + 1]};
      std::tie(dx, result[kWeightEdge], result[kWeightEdge + 1]) = call_bwd(
          options, dy, unpack(kInput), optional(unpack(kWeight)), unpack(kRstd), optional(dsum), mask);
    }
    result[0] = dx;
    if constexpr (kAdd) result[1] = dx;
    return result;
  }
};

// Edges: grad_output, input, gate, weight, bias.
struct RmsNormGatedBackwardBackward final : NormNode<RmsNormGatedBackwardBackward, 5, 5, GatedOptions> {
  enum { kGradOutput, kInput, kGate, kWeight, kBias };
  static constexpr const char* kName = "RmsNormGatedBackwardBackward";

  static variable_list backward(const GatedOptions& options, const variable_list& grads, Unpack unpack,
                                const Wanted&) {
    if (std::none_of(grads.begin(), grads.end(), [](const Tensor& t) { return t.defined(); })) {
      return variable_list(5);
    }
    auto [grad_dy, grad_x, grad_gate, grad_w, grad_b] = composite_gated_bwd_bwd(
        options, grads[0], grads[1], grads[2], grads[3], unpack(kGradOutput), unpack(kInput), unpack(kGate),
        optional(unpack(kWeight)), optional(unpack(kBias)));
    return {grad_dy, grad_x, grad_gate, grad_w, grad_b};
  }
};

// Edges: input, gate, weight, bias.
struct RmsNormGatedBackward final : NormNode<RmsNormGatedBackward, 5, 4, GatedOptions> {
  enum { kInput, kGate, kWeight, kBias, kRstd };
  static constexpr const char* kName = "RmsNormGatedBackward";

  static variable_list backward(const GatedOptions& options, const variable_list& grads, Unpack unpack,
                                const Wanted& wanted) {
    if (!grads[0].defined()) return variable_list(4);
    auto [dx, dgate, dw, db] =
        call_gated_bwd(options, grads[0], unpack(kInput), unpack(kGate), optional(unpack(kWeight)),
                       optional(unpack(kBias)), unpack(kRstd), wanted);
    return {dx, dgate, dw, db};
  }
};

Tensor tangent_of(const OptTensor& t) { return isFwGradDefined(t) ? t->_fw_grad(0) : Tensor(); }
OptTensor primal_of(const OptTensor& t) { return present(t) ? OptTensor(t->_fw_primal(0)) : std::nullopt; }

Two fwd(const Options& options, const Tensor& x, const OptTensor& weight, const OptTensor& bias) {
  Tensor y, rstd;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(y, rstd) = call_fwd(options, x, weight, bias);
  }
  if (autograd::compute_requires_grad(x, weight, bias)) {
    using Node = RmsNormBackward<false>;
    auto node = make_node<Node>();
    node->set_next_edges(autograd::collect_next_edges(x, weight, bias));
    node->options = options;
    node->saved[Node::kInput].set(x);
    node->saved[Node::kWeight].set(weight);
    node->saved[Node::kRstd].set(rstd);
    autograd::set_history(y, node);
  }
  if (isFwGradDefined(x) || isFwGradDefined(weight) || isFwGradDefined(bias)) {
    y._set_fw_grad(composite_tangent(options, x._fw_primal(0), primal_of(weight), tangent_of(x),
                                     tangent_of(weight), tangent_of(bias)),
                   0, false);
  }
  return {y, rstd};
}

Three add_fwd(const Options& options, const Tensor& x, const Tensor& residual, const OptTensor& weight,
              const OptTensor& bias) {
  if (isFwGradDefined(x) || isFwGradDefined(residual) || isFwGradDefined(weight) || isFwGradDefined(bias)) {
    return add_by_parts(options, x, residual, weight, bias);
  }
  Tensor y, sum, rstd;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(y, sum, rstd) = call_add_fwd(options, x, residual, weight, bias);
  }
  if (autograd::compute_requires_grad(x, residual, weight, bias)) {
    using Node = RmsNormBackward<true>;
    auto node = make_node<Node>();
    node->set_next_edges(autograd::collect_next_edges(x, residual, weight, bias));
    node->options = options;
    autograd::set_history(y, node);
    autograd::set_history(sum, node);
    node->saved[Node::kInput].set(sum, /*output=*/true);
    node->saved[Node::kWeight].set(weight);
    node->saved[Node::kRstd].set(rstd);
  }
  return {y, sum, rstd};
}

Three bwd(const Options& options, const Tensor& dy, const Tensor& x, const OptTensor& weight,
          const Tensor& rstd, const OptTensor& grad_sum, Mask3 mask) {
  if (isFwGradDefined(dy) || isFwGradDefined(x) || isFwGradDefined(weight) || isFwGradDefined(grad_sum)) {
    return composite_bwd(options, dy, x, weight, grad_sum, mask);
  }
  Tensor dx, dw, db;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(dx, dw, db) = call_bwd(options, dy, x, weight, rstd, grad_sum, mask);
  }
  if (autograd::compute_requires_grad(dy, x, weight, grad_sum)) {
    auto node = make_node<RmsNormBackwardBackward>();
    node->set_next_edges(autograd::collect_next_edges(dy, x, weight, grad_sum));
    node->options = options;
    node->saved[RmsNormBackwardBackward::kGradOutput].set(dy);
    node->saved[RmsNormBackwardBackward::kInput].set(x);
    node->saved[RmsNormBackwardBackward::kWeight].set(weight);
    autograd::set_history(dx, node);
    autograd::set_history(dw, node);
    autograd::set_history(db, node);
  }
  return {dx, dw, db};
}

Two gated_fwd(const GatedOptions& options, const Tensor& x, const Tensor& gate, const OptTensor& weight,
              const OptTensor& bias) {
  Tensor y, rstd;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(y, rstd) = call_gated_fwd(options, x, gate, weight, bias);
  }
  if (autograd::compute_requires_grad(x, gate, weight, bias)) {
    using Node = RmsNormGatedBackward;
    auto node = make_node<Node>();
    node->set_next_edges(autograd::collect_next_edges(x, gate, weight, bias));
    node->options = options;
    node->saved[Node::kInput].set(x);
    node->saved[Node::kGate].set(gate);
    node->saved[Node::kWeight].set(weight);
    node->saved[Node::kBias].set(bias);
    node->saved[Node::kRstd].set(rstd);
    autograd::set_history(y, node);
  }
  if (isFwGradDefined(x) || isFwGradDefined(gate) || isFwGradDefined(weight) || isFwGradDefined(bias)) {
    // The composite's value, with other last bits, is made beside its tangent and dropped.
    const Tensor dual = std::get<0>(composite_gated_fwd(options, x, gate, weight, bias));
    y._set_fw_grad(dual._fw_grad(0), 0, false);
  }
  return {y, rstd};
}

Four gated_bwd(const GatedOptions& options, const Tensor& dy, const Tensor& x, const Tensor& gate,
               const OptTensor& weight, const OptTensor& bias, const Tensor& rstd, Mask4 mask) {
  if (isFwGradDefined(dy) || isFwGradDefined(x) || isFwGradDefined(gate) || isFwGradDefined(weight) ||
      isFwGradDefined(bias)) {
    return composite_gated_bwd(options, dy, x, gate, weight, bias, mask);
  }
  Four result;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    result = call_gated_bwd(options, dy, x, gate, weight, bias, rstd, mask);
  }
  if (autograd::compute_requires_grad(dy, x, gate, weight, bias)) {
    using Node = RmsNormGatedBackwardBackward;
    auto node = make_node<Node>();
    node->set_next_edges(autograd::collect_next_edges(dy, x, gate, weight, bias));
    node->options = options;
    node->saved[Node::kGradOutput].set(dy);
    node->saved[Node::kInput].set(x);
    node->saved[Node::kGate].set(gate);
    node->saved[Node::kWeight].set(weight);
    node->saved[Node::kBias].set(bias);
    std::apply([&](auto&... grad) { (autograd::set_history(grad, node), ...); }, result);
  }
  return result;
}

void add_inplace(const Options& options, Tensor& x, Tensor& residual, const OptTensor& weight,
                 const OptTensor& bias) {
  const auto refuse = [](const char* name, const auto& t) {
    TORCH_CHECK(
        !autograd::compute_requires_grad(t), name,
        " requires grad, but add_rms_norm_ works in place and has no derivative: call add_rms_norm, or "
        "use torch.no_grad()");
    TORCH_CHECK(!isFwGradDefined(t), name,
                " has a tangent, but add_rms_norm_ works in place and has no derivative: call add_rms_norm");
  };
  refuse("input", x);
  refuse("residual", residual);
  refuse("weight", weight);
  refuse("bias", bias);
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    call_add_inplace(options, x, residual, weight, bias);
  }
  for (const Tensor& t : {x, residual}) {
    if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace

FUSED_RMSNORM_LIBRARY_IMPL(Autograd, m) {
  m.impl("rms_norm_fwd", kernel<fwd>);
  m.impl("add_rms_norm_fwd", kernel<add_fwd>);
  m.impl("add_rms_norm_", kernel<add_inplace>);
  m.impl("rms_norm_bwd", kernel<bwd>);
  m.impl("rms_norm_gated_fwd", kernel<gated_fwd>);
  m.impl("rms_norm_gated_bwd", kernel<gated_bwd>);
}

}  // namespace fused_rmsnorm
