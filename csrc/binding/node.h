// What a hand-written torch::autograd::Node needs. Such a Node is what native operators have: it
// is the cheapest route, and the only C++ one that torch.func accepts.
#pragma once
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <memory>
#include <type_traits>

#include "composite.h"

namespace fused_rmsnorm {

namespace autograd = torch::autograd;

// Nodes are held by std::shared_ptr up to torch 2.12 and by c10::intrusive_ptr from 2.13 on.
using NodePtr = decltype(std::declval<autograd::Edge>().function);
constexpr bool kSharedNodes = std::is_same_v<NodePtr, std::shared_ptr<autograd::Node>>;

template <class N>
auto make_node() {
  if constexpr (kSharedNodes) {
    return std::shared_ptr<N>(new N, [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<N>();
  }
}

// The pointer with which an output that a Node saved is unpacked.
template <class N, class Pointer = NodePtr>
Pointer pointer_to(N& node) {
  if constexpr (kSharedNodes) {
    return node.shared_from_this();
  } else {
    return Pointer::reclaim_copy(&node);
  }
}

// A tensor that a Node saved, and whether it was one of the Node's own outputs.
struct Saved {
  autograd::SavedVariable variable;
  bool is_output = false;

  void set(const Tensor& t, bool output = false) {
    variable = autograd::SavedVariable(t, output);
    is_output = output;
  }
  void set(const OptTensor& t) { set(t.value_or(Tensor())); }
};

// Base of the Nodes here: a list of saved tensors, Options, and what the engine and compiled
// autograd ask of a Node. A derived class supplies `backward`.
template <int kSaved>
struct NormNode : autograd::Node {
  std::array<Saved, kSaved> saved;
  Options options;

  virtual autograd::variable_list backward(autograd::variable_list&& grads) = 0;

  autograd::variable_list apply(autograd::variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return backward(std::move(grads));
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& s : saved) s.variable.reset_data();
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (auto& s : saved) args.collect(s.variable, s.is_output);
    args.collect(options.eps);
    args.collect(options.p);
    args.collect(options.weight_offset);
    args.collect(options.llama);
  }

  autograd::variable_list apply_with_saved(const autograd::variable_list& grads,
                                           torch::dynamo::autograd::SwapSavedVariables& swap) override {
    for (auto& s : saved) swap.before(s.variable);
    auto result = apply(autograd::variable_list(grads));
    for (auto& s : saved) swap.after(s.variable);
    return result;
  }

 protected:
  Tensor unpack(int i) {
    return saved[i].is_output ? saved[i].variable.unpack(pointer_to(*this)) : saved[i].variable.unpack();
  }
  OptTensor unpack_optional(int i) {
    Tensor t = unpack(i);
    return t.defined() ? OptTensor(std::move(t)) : std::nullopt;
  }
};

}  // namespace fused_rmsnorm
