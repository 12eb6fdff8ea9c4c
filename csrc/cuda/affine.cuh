// The types of a kernel of aligned rows; weight and bias of the columns that a thread works on.
#pragma once
#include "access.cuh"

namespace fused_rmsnorm::cuda {

// Of a kernel of aligned rows, in either direction.
template <class X_, class W_>
struct RowTypes {
  using X = X_;  // and of y and dy
  using W = W_;
  using T = Acc<X>;
  static constexpr int V = 16 / sizeof(X);
};

// Column c of a weight (or bias) of x's dtype, or where it is `wide`, of the arithmetic type: one kernel of
// unaligned rows serves both.
template <class X>
__device__ __forceinline__ Acc<X> column_of(const void* weight, bool wide, int c) {
  if constexpr (sizeof(X) != sizeof(Acc<X>)) {
    if (wide) return static_cast<const Acc<X>*>(weight)[c];
  }
  return widen(static_cast<const X*>(weight)[c]);
}
template <class W, class T, int V>
__device__ __forceinline__ void load_aligned(const void* vector, int c, T (&out)[V]) {
  widen(load_pieces<W, V>(static_cast<const W*>(vector) + c), out);
}

// What x * r is multiplied by: offset + w, or 1 without a weight; load(w) reads the weight.
template <class T, int V, class Load>
__device__ __forceinline__ void load_scale(const void* weight, double offset, T (&scale)[V], Load load) {
  if (weight) {
    load(scale);
#pragma unroll
    for (int j = 0; j < V; ++j) scale[j] += static_cast<T>(offset);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) scale[j] = 1;
  }
}

// The same of one column, of a weight of either dtype.
template <class X, class Call>
__device__ __forceinline__ void load_scale_one(const Call& call, int c, Acc<X> (&scale)[1]) {
  load_scale(call.weight, call.weight_offset, scale,
             [&](Acc<X>(&w)[1]) { w[0] = column_of<X>(call.weight, call.w_dtype != call.x_dtype, c); });
}

// Whether a call's weight, if it has one, can be read in pieces of 16 bytes, whatever its dtype.
template <class Call>
__device__ __forceinline__ bool weight_in_pieces(const Call& call) {
  return !call.weight || starts_piece(call.weight);
}
// Whether its scale is a weight of x's dtype and nothing else, as in most calls.
template <class Call>
__device__ __forceinline__ bool is_weight_alone(const Call& call) {
  return call.weight && call.w_dtype == call.x_dtype && call.weight_offset == 0;
}
// The scale of columns c ... of such a call, whose weight goes on beyond them to the end of a piece.
template <class X, class Call, class T, int V>
__device__ __forceinline__ void load_scale_inside(const Call& call, int c, T (&scale)[V]) {
  if (is_weight_alone(call)) return widen(load_inside<X, V>(static_cast<const X*>(call.weight), c), scale);
  load_scale(call.weight, call.weight_offset, scale, [&](T(&w)[V]) {
    if constexpr (sizeof(X) != sizeof(T)) {
      if (call.w_dtype != call.x_dtype) {
        return widen(load_inside<T, V>(static_cast<const T*>(call.weight), c), w);
      }
    }
    widen(load_inside<X, V>(static_cast<const X*>(call.weight), c), w);
  });
}

// The norm of columns of which `out` holds x * r; load_scale and load_bias fill their argument. For the
// forward's y, and for the backward of a gate that multiplies it. kAlone: there is no bias, and without
// a weight load_scale gives 1.
template <class X, bool kAlone = false, class Call, class T, int V, class LoadScale, class LoadBias>
__device__ __forceinline__ void apply_weight(const Call& call, bool llama, T (&out)[V], LoadScale load_scale,
                                             LoadBias load_bias) {
  if (sizeof(X) < sizeof(T) && llama) round_to<X>(out);
  if (kAlone || call.weight) {
    T scale[V];
    load_scale(scale);
    if (!kAlone && call.bias) {
      T bias[V];
      load_bias(bias);
#pragma unroll
      for (int j = 0; j < V; ++j) out[j] = multiply_add(out[j], scale[j], bias[j]);
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) out[j] *= scale[j];
    }
  }
}

// Of the first blocks, the weight comes from device memory. So that it is not only after the sum that it
// starts on its way, a word of each 128 bytes is asked for, and not waited for.
template <class W>
__device__ __forceinline__ void ask_for(const void* weight, int n, int thread, int width) {
  constexpr unsigned kFirstBlocks = 1024;  // as many as an H100 holds at once
  constexpr int kStep = 128 / sizeof(W);
  if (!weight || blockIdx.x >= kFirstBlocks) return;
#pragma unroll 1
  for (int c = thread * kStep; c < n; c += width * kStep) touch(static_cast<const W*>(weight) + c);
}

// The scale of a thread's columns of aligned rows. Where so many bytes of registers hold it, it is made
// before the rows are summed, and serves all of them that are in flight, or that follow. Where kPacked do,
// the weight is read then, as it lies in memory; otherwise where it is used.
template <class W, class T, int V, int kItems, int kBytes, int kPacked>
class Scale {
 public:
  static constexpr bool kHeld = V * kItems * sizeof(T) <= kBytes;
  static constexpr bool kEarly = kHeld || V * kItems * sizeof(W) <= kPacked;  // load() is to be called

  __device__ Scale(const void* weight, double offset) : weight_(weight), offset_(offset) {}

  // Whether the scale is what is held, or the weight alone: get<true>() asks nothing more.
  __device__ __forceinline__ bool is_plain() const { return kHeld || (weight_ && offset_ == 0); }

  __device__ __forceinline__ void load(int i, int c) {
    if constexpr (kHeld) {
      load_scale(weight_, offset_, held_[i], [&](T(&w)[V]) { load_aligned<W>(weight_, c, w); });
    } else if (kEarly && weight_) {
      packed_[i] = load_pieces<W, V>(static_cast<const W*>(weight_) + c);
    }
  }
  template <bool kPlain>
  __device__ __forceinline__ void get(int i, int c, T (&scale)[V]) const {
    if constexpr (kHeld) {
#pragma unroll
      for (int j = 0; j < V; ++j) scale[j] = held_[i][j];
    } else if constexpr (kPlain) {
      read(i, c, scale);
    } else {
      load_scale(weight_, offset_, scale, [&](T(&w)[V]) { read(i, c, w); });
    }
  }

 private:
  __device__ __forceinline__ void read(int i, int c, T (&w)[V]) const {
    if constexpr (kEarly) {
      widen(packed_[i], w);
    } else {
      load_aligned<W>(weight_, c, w);
    }
  }

  const void* weight_;
  double offset_;
  T held_[kHeld ? kItems : 1][V];
  Vec<W, V> packed_[kEarly && !kHeld ? kItems : 1];
};

}  // namespace fused_rmsnorm::cuda
