// What the kernels of general calls (forward_general.cuh, backward_general.cuh) share: columns of rows that
// are aligned or are not, and a weight (and a bias) of several rows: which of them a row takes, and which
// rows take one of them.
//
// Row m takes row (m / weight_share) % weight_rows. Seen from the weight, its row w has as many rows as any
// other, which are counted j = 0, 1, ... : row m = (j / share * weight_rows + w) * share + j % share.
#pragma once
#include "access.cuh"
#include "rows.h"

namespace fused_rmsnorm::cuda {

// What is settled of a call when its kernel is compiled. Where all was asked in the kernel, the questions and
// the registers that they kept busy were 25 to 41 % of the instructions of a gate's backward.
enum class Form {
  any,          // nothing
  usual,        // as is_usual() of rows.h says; no gate,
  usual_last,   // or one after the norm,
  usual_first,  // or before
};
template <Form kForm>
using FormType = std::integral_constant<Form, kForm>;
template <Form kForm>
constexpr bool kIsUsual = kForm >= Form::usual;
template <Form kForm>
constexpr bool kIsUsualGate = kForm > Form::usual;
template <Form kForm>
using RowNumber = std::conditional_t<kIsUsual<kForm>, unsigned, int64_t>;
template <Form kForm>
constexpr Gate kGateOf = kForm == Form::usual_last    ? Gate::last
                         : kForm == Form::usual_first ? Gate::first
                                                      : Gate::none;

template <class X>
constexpr bool kMayBeGated = sizeof(X) < 8;
template <class X>
constexpr bool kHasUsual = sizeof(X) < 8;  // fp64 is there to be right

// m / rows.inner, of any number of rows.
__device__ __forceinline__ int64_t quotient(const Rows& rows, int64_t m) {
  if (rows.inner == 1) return m;
  return rows.multiplier ? outer_of(rows, m) : divided(m, rows.inner);
}

struct WeightRows {
  Rows share, rows;  // inner: weight_share, weight_rows. The rest is for divisions by them.

  __device__ __forceinline__ int64_t of(int64_t m) const {
    const int64_t shared = quotient(share, m);
    return shared - quotient(rows, shared) * rows.inner;
  }
  __device__ __forceinline__ int64_t member(int64_t w, int64_t j) const {
    const int64_t turn = quotient(share, j);
    return (turn * rows.inner + w) * share.inner + j - turn * share.inner;
  }
};

// run(form) of a usual call, as a type.
template <class Run>
const char* with_usual_form(Gate gate, Run run) {
  switch (gate) {
    case Gate::none:
      return run(FormType<Form::usual>{});
    case Gate::last:
      return run(FormType<Form::usual_last>{});
    case Gate::first:
      return run(FormType<Form::usual_first>{});
  }
  return "no kernel for this gate";
}

template <class Call>
WeightRows weight_rows_of(const Call& call) {
  return {with_divisor({nullptr, call.weight_share}, call.rows),
          with_divisor({nullptr, call.weight_rows}, call.rows)};
}

// The columns that begin at `at`, of which so many are left: whole vectors where everything in the call is
// aligned, else element by element, zeros beyond the end. Such calls are rare enough for that, and it touches
// nothing but the columns.
template <class E, int V>
__device__ __forceinline__ Vec<E, V> load_columns(const E* at, int left, bool aligned) {
  if (aligned) return load_pieces<E, V>(at);
  return gathered<E, V>([&](int j) { return j < left ? at[j] : E{}; });
}
// The same widened, of those so many after `at`, of a vector of X, or where it is `wide`, of the arithmetic
// type.
template <class X, int V>
__device__ __forceinline__ void load_columns(const void* at, bool wide, int ahead, int left, bool aligned,
                                             Acc<X> (&out)[V]) {
  using T = Acc<X>;
  if constexpr (sizeof(X) != sizeof(T)) {
    if (wide) return widen(load_columns<T, V>(static_cast<const T*>(at) + ahead, left, aligned), out);
  }
  widen(load_columns<X, V>(static_cast<const X*>(at) + ahead, left, aligned), out);
}
template <class E, int V>
__device__ __forceinline__ void store_columns(E* at, int left, Vec<E, V>& from, bool aligned) {
  if (aligned) return store_pieces(at, from);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if (j < left) at[j] = from.element(j);
  }
}

// A row of a weight or bias, which begins after so many elements, or nullptr.
template <class X>
__device__ __forceinline__ const void* weight_row(const void* weight, bool wide, int64_t offset) {
  if (!weight) return nullptr;
  return static_cast<const unsigned char*>(weight) + offset * (wide ? sizeof(Acc<X>) : sizeof(X));
}

}  // namespace fused_rmsnorm::cuda
