// Vectors: V elements that enter and leave memory in 16-byte pieces where the address allows it,
// and as numbers of the arithmetic type in between.
#pragma once
#include <type_traits>

#include "../norm.h"
#include "device.cuh"

namespace fused_rmsnorm::cuda {

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

// Rounded to nearest even.
template <class T>
__device__ __forceinline__ T narrow(Acc<T> v) {
  if constexpr (sizeof(T) > 2) {
    return v;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else {
    return __float2bfloat16_rn(v);
  }
}

// a * b + c with one rounding. Compiled without -fmad: which products and sums a compiler would fuse is
// its own choice in each kernel, and the bits of a row must not hang on the kernel that its alignment picks.
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

__device__ __forceinline__ float inverse_sqrt(float v) { return 1.0f / sqrtf(v); }
__device__ __forceinline__ double inverse_sqrt(double v) { return 1.0 / sqrt(v); }

template <class T, int V>
struct alignas(16) Vec {
  static constexpr int kPieces = sizeof(T) * V / 16;  // of 16 bytes
  static_assert(kPieces >= 1);
  T v[V];

  __device__ __forceinline__ uint4& piece(int i) { return reinterpret_cast<uint4*>(v)[i]; }
};

__device__ __forceinline__ bool on_piece(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Sixteen bytes that start `shift` bytes (1 ... 15) into the 32 of low and high.
__device__ __forceinline__ uint4 shifted(uint4 low, uint4 high, unsigned shift) {
  unsigned w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = shift & 8 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) w[i] = shift & 4 ? w[i + 1] : w[i];
  const unsigned bits = shift % 4 * 8;
  return {__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits),
          __funnelshift_r(w[2], w[3], bits), __funnelshift_r(w[3], w[4], bits)};
}

// Where row m begins. A 64-bit division is some eighty instructions, as many as a short row takes.
__device__ __forceinline__ int64_t offset_of(const Rows& rows, int64_t m) {
  int64_t outer = m, inner = 0;
  if (rows.inner != 1) {
    const bool small = (m | rows.inner) >> 32 == 0;
    outer = small ? static_cast<unsigned>(m) / static_cast<unsigned>(rows.inner) : m / rows.inner;
    inner = m - outer * rows.inner;
  }
  return outer * rows.outer_stride + inner * rows.inner_stride;
}

// How the rows of a call lie in memory. The bits of the results do not depend on it.
enum class Access {
  aligned,  // every row starts at a multiple of 16 bytes, N is whole vectors: nothing to check
  any,      // asked for each vector
};

// A row, read in vectors; what lies past it reads as zero. With odd N seven rows of eight are
// unaligned: reading the aligned pieces round a vector (the second of which is the neighbour's first,
// so in L1) and shifting takes two wide reads where elements would take eight. At the row's edges,
// where a piece would leave it, elements are read; and everywhere in a row that is being
// alone, whose other elements belong to other threads.
template <class T, int V, Access kAccess>
struct RowReader {
  const T* row;
  int n;
  bool alone = false;

  __device__ RowReader(const Rows& rows, int64_t m, int64_t n_)
      : row(static_cast<const T*>(rows.data) + offset_of(rows, m)), n(static_cast<int>(n_)) {}
  __device__ RowReader(const void* vector, int64_t n_)
      : row(static_cast<const T*>(vector)), n(static_cast<int>(n_)) {}

  // One read instruction per 16 bytes does it.
  __device__ __forceinline__ bool direct(int c) const {
    return kAccess == Access::aligned || (c + V <= n && on_piece(row + c));
  }

  __device__ __forceinline__ Vec<T, V> load(int c) const {
    Vec<T, V> out;
    if (direct(c)) {
#pragma unroll
      for (int i = 0; i < out.kPieces; ++i) out.piece(i) = reinterpret_cast<const uint4*>(row + c)[i];
      return out;
    }
    if constexpr (kAccess == Access::any) {
      const unsigned over = reinterpret_cast<uintptr_t>(row + c) % 16;
      const char* const begin = reinterpret_cast<const char*>(row + c) - over;
      if (!alone && begin >= reinterpret_cast<const char*>(row) &&
          begin + (out.kPieces + 1) * 16 <= reinterpret_cast<const char*>(row + n)) {
        uint4 low = reinterpret_cast<const uint4*>(begin)[0];
#pragma unroll
        for (int i = 0; i < out.kPieces; ++i) {
          const uint4 high = reinterpret_cast<const uint4*>(begin)[i + 1];
          out.piece(i) = shifted(low, high, over);
          low = high;
        }
        return out;
      }
    }
#pragma unroll
    for (int j = 0; j < V; ++j) out.v[j] = c + j < n ? row[c + j] : T{};
    return out;
  }
};

// By intrinsic: nvcc merges plain stores of 16, 8 and 4 bytes in neighbouring branches into the smallest.
template <class Piece, class T, int V>
__device__ __forceinline__ void store_pieces(T* to, Vec<T, V>& from) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) * V / sizeof(Piece)); ++i) {
    __stwb(reinterpret_cast<Piece*>(to) + i, reinterpret_cast<Piece*>(from.v)[i]);
  }
}

// Columns c ... c + V - 1 of a row of n, of which those past the row are dropped. Unaligned rows are
// written in pieces of 8 or 4 bytes where their alignment allows it.
template <Access kAccess, class T, int V>
__device__ __forceinline__ void store(T* row, int c, int n, Vec<T, V>& from) {
  T* const to = row + c;
  const unsigned over = reinterpret_cast<uintptr_t>(to) % 16;
  if (kAccess == Access::aligned || (c + V <= n && over == 0)) return store_pieces<uint4>(to, from);
  if (c + V <= n && over == 8) return store_pieces<uint2>(to, from);
  if constexpr (sizeof(T) < 4) {
    if (c + V <= n && over % 4 == 0) return store_pieces<unsigned>(to, from);
  }
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if (c + j < n) to[j] = from.v[j];
  }
}

}  // namespace fused_rmsnorm::cuda
