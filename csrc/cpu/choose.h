// From what a call says at run time to template arguments, once per call and outside of all loops.
#pragma once
#include "../norm.h"
#include "load_store.h"

namespace fused_rmsnorm::cpu {
namespace {

template <class E>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<bf16> = true;

// The dtypes of x (and dx, sums), weight (and bias, dw, db) and y (and dy).
template <class XType, class WType, class YType, bool kLlamaMode = false>
struct Types {
  using X = XType;
  using W = WType;
  using Y = YType;
  using T = Compute<X>;
  static constexpr bool kLlama = kLlamaMode;
  // What weights and dy can bring.
  static constexpr Nans kNans = sizeof(W) == 2 && sizeof(Y) == 2 ? Nans::upper : Nans::any;
};

// Whether common calls have kernels of their own: in the dtypes that people train and serve in, since
// each takes its time to compile, and those with a gate the longest.
template <class Types, Gate kGate>
constexpr bool kSettled = [] {
  constexpr int x = sizeof(typename Types::X);
  if (!kSettleCommonCalls || x == 8 || sizeof(typename Types::Y) != x) return false;
  if (kIsBf16<typename Types::X>) return true;
  return sizeof(typename Types::W) == x && !Types::kLlama && (kGate == Gate::none || x == 4);
}();

// visit(Types<...>{}) of the combination asked for; norm.h lists them all.
template <class X, class Visit>
void visit_half(bool wide, bool llama, Visit visit) {
  if (wide) {
    llama ? visit(Types<X, float, float, true>{}) : visit(Types<X, float, X>{});
  } else {
    llama ? visit(Types<X, X, X, true>{}) : visit(Types<X, X, X>{});
  }
}
template <class Call, class Visit>
void visit_types(const Call& call, Visit visit) {
  const bool wide = call.w_dtype == Dtype::f32;
  switch (call.x_dtype) {
    case Dtype::f32:
      return visit(Types<float, float, float>{});
    case Dtype::f64:
      return visit(Types<double, double, double>{});
    case Dtype::f16:
      return visit_half<f16>(wide, call.llama, visit);
    case Dtype::bf16:
      return visit_half<bf16>(wide, call.llama, visit);
  }
}

// The same beside a gate, whose kernels look for llama mode themselves: in their steps it costs little,
// and a third fewer of them are compiled.
template <Gate kGate, class X, class Visit>
void visit_gated_half(bool wide, bool llama, Visit visit) {
  if (!wide) return visit(Types<X, X, X>{});
  if constexpr (kGate == Gate::first) {
    if (llama) return visit(Types<X, float, float>{});
  }
  visit(Types<X, float, X>{});
}
template <Gate kGate, class Call, class Visit>
void visit_gated_types(const Call& call, Visit visit) {
  const bool wide = call.w_dtype == Dtype::f32;
  switch (call.x_dtype) {
    case Dtype::f16:
      return visit_gated_half<kGate, f16>(wide, call.llama, visit);
    case Dtype::bf16:
      return visit_gated_half<kGate, bf16>(wide, call.llama, visit);
    case Dtype::f32:
      return visit(Types<float, float, float>{});
    case Dtype::f64:
      return;  // no gate beside it
  }
}

// Whether writing past the caches is settled before the loops, too. Where it is not, half as much is
// compiled; beside a gate the question for each pack is 1 or 2 % of the instructions.
template <class Types, Gate kGate>
constexpr bool kSettleStream = kSettled<Types, kGate> && kGate == Gate::none;

}  // namespace
}  // namespace fused_rmsnorm::cpu
