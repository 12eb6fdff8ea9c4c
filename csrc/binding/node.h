// What a hand-written torch::autograd::Node needs. Such a Node is what native operators have: it
// is the cheapest route, and the only C++ one that torch.func accepts.
#pragma once
#include <c10/util/CallOnce.h>
#include <c10/util/FunctionRef.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <algorithm>
#include <memory>
#include <type_traits>

#include "composite_gated.h"
#include "registration.h"

namespace fused_rmsnorm {

namespace autograd = torch::autograd;
namespace compiled = torch::dynamo::autograd;

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
template <class N, class Pointer = NodePtr>  // a parameter, so that torch need not have both kinds
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

// What compiled autograd carries options in.
template <class... T>
std::vector<at::TypePtr> types_of(T...) {
  return {compiled::IValuePacker<T>::packed_type()...};
}

inline auto members(Options& o) { return std::tie(o.eps, o.p, o.weight_offset, o.llama); }
inline auto members(GatedOptions& o) {
  return std::tuple_cat(members(static_cast<Options&>(o)), std::tie(o.sigmoid, o.norm_before_gate));
}

// Base of the Nodes here: saved tensors, options, and what the engine and compiled autograd ask of a
// Node with kEdges inputs in the forward. A derived class supplies its name and its work:
//   static constexpr const char* kName;
//   static variable_list backward(const Options&, const variable_list& grads, Unpack, const Wanted&);
// The work is a function of its arguments and not a method: compiled autograd calls it without
// the Node: what it traces are tensors of no known shape, so it records a call of `backward` with
// everything that the Node holds, and the compiler runs that on the right shapes later.
template <class Derived, int kSaved, int kEdges, class Options = Options>
struct NormNode : autograd::Node {
  using Wanted = std::array<bool, kEdges>;        // which gradients are asked for
  using Unpack = c10::function_ref<Tensor(int)>;  // a saved tensor; may raise, so only when it is needed

  std::array<Saved, kSaved> saved;
  Options options;

  std::string name() const override { return Derived::kName; }

  autograd::variable_list apply(autograd::variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto unpack = [this](int i) {
      return saved[i].is_output ? saved[i].variable.unpack(pointer_to(*this)) : saved[i].variable.unpack();
    };
    return Derived::backward(options, grads, unpack, wanted());
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& s : saved) s.variable.reset_data();
  }

  // What a compiled graph of this Node is specialised on; saved tensors become its inputs.
  void compiled_args(compiled::CompiledNodeArgs& args) const override {
    for (auto& s : saved) args.collect(s.variable, s.is_output);
    Options copy = options;
    std::apply([&](auto&... member) { (args.collect(std::as_const(member)), ...); }, members(copy));
  }

  autograd::variable_list apply_with_saved(const autograd::variable_list& grads,
                                           compiled::SwapSavedVariables& swap) override {
    static c10::once_flag bound;
    const auto& compiler = compiled::getPyCompilerInterface();
    const std::string function = std::string(FUSED_RMSNORM_NAMESPACE "_") + Derived::kName;
    c10::call_once(bound, [&] {
      compiler->bind_function(swap.get_py_compiler(), function, apply_packed, packed_types());
    });
    for (auto& s : saved) swap.before(s.variable);
    compiled::PackedArgs args;
    std::apply([&](auto&... member) { (args.pack(member), ...); }, members(options));
    for (auto& s : saved) args.pack(s.variable.unpack());
    const Wanted asked = wanted();
    args.pack(std::vector<bool>(asked.begin(), asked.end()));
    const auto metadata = compiled::IValuePacker<std::vector<std::optional<autograd::InputMetadata>>>::pack(
        compiled::get_input_metadata(next_edges()));
    auto result = compiler->call_function(swap.get_py_compiler(), "apply_functional", function, grads,
                                          args.vec(), metadata);
    for (auto& s : saved) swap.after(s.variable);
    return result;
  }

 private:
  Wanted wanted() const {
    Wanted result;
    for (int i = 0; i < kEdges; i++) result[i] = task_should_compute_output(i);
    return result;
  }

  static std::vector<at::TypePtr> packed_types() {
    Options any;
    auto types = std::apply([](auto&... member) { return types_of(member...); }, members(any));
    types.insert(types.end(), kSaved, compiled::IValuePacker<Tensor>::packed_type());
    types.push_back(compiled::IValuePacker<std::vector<bool>>::packed_type());
    return types;
  }

  static autograd::variable_list apply_packed(const autograd::variable_list& grads,
                                              const std::vector<at::IValue>& packed) {
    compiled::PackedArgs args(packed);
    Options options;
    std::apply(
        [&](auto&... member) { ((member = args.unpack<std::remove_reference_t<decltype(member)>>()), ...); },
        members(options));
    std::array<Tensor, kSaved> tensors;
    for (auto& t : tensors) t = args.unpack<Tensor>();
    const auto asked = args.unpack<std::vector<bool>>();
    Wanted wanted;
    std::copy_n(asked.begin(), kEdges, wanted.begin());
    return Derived::backward(options, grads, [&](int i) { return tensors[i]; }, wanted);
  }
};

// A saved tensor that may have been absent.
inline OptTensor optional(Tensor t) { return t.defined() ? OptTensor(std::move(t)) : std::nullopt; }

}  // namespace fused_rmsnorm
