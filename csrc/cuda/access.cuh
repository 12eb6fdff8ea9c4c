// Rows and vectors of weights in global or shared memory, read and written V columns at a time.
#pragma once
#include "vec.cuh"

namespace fused_rmsnorm::cuda {

// Where row m begins. Divided by multiplication (rows.h), since a division is some twenty instructions,
// and one of 64 bits eighty, as many as a short row takes.
__device__ __forceinline__ int64_t offset_of(const Rows& rows, int64_t m) {
  int64_t outer = m, inner = 0;
  if (rows.inner != 1) {
    outer =
        m >> 31 == 0
            ? static_cast<int64_t>((uint64_t{static_cast<unsigned>(m)} * rows.multiplier >> 32) >> rows.shift)
            : m / rows.inner;
    inner = m - outer * rows.inner;
  }
  return outer * rows.outer_stride + inner * rows.inner_stride;
}

template <class T>
__device__ __forceinline__ const T* row_of(const Rows& rows, int64_t m) {
  return static_cast<const T*>(rows.data) + offset_of(rows, m);
}

// How the rows of a call lie in memory. The bits of the results do not depend on it.
enum class Access {
  aligned,  // every row starts at a multiple of 16 bytes, N is whole vectors: nothing to check
  any,      // asked for each vector
};

// Elements by which p lies past a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ int misaligned(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T));
}

// The sixteen bytes that start `elements` elements (less than 16 bytes) into the 32 of low and high.
template <int kSize>
__device__ __forceinline__ uint4 shifted(uint4 low, uint4 high, int elements) {
  unsigned w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  const unsigned shift = elements * kSize;
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = shift & 8 ? w[i + 2] : w[i];
  if constexpr (kSize < 8) {
#pragma unroll
    for (int i = 0; i < 5; ++i) w[i] = shift & 4 ? w[i + 1] : w[i];
  }
  if constexpr (kSize < 4) {
    const unsigned bits = shift % 4 * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = __funnelshift_r(w[i], w[i + 1], bits);
  }
  return {w[0], w[1], w[2], w[3]};
}

// Columns begin ... end - 1 of a row, read in vectors that may start anywhere; the others read as zero.
// With odd N seven rows of eight are unaligned: reading the aligned pieces round a vector (the second
// of which is the neighbour's first, so in L1) and shifting takes two wide reads where elements would
// take eight. Elements are read only where a piece would leave the columns.
template <class T, int V, Access kAccess>
struct Reader {
  static constexpr int kPiece = 16 / sizeof(T);  // elements
  const T* row;
  int begin, end;
  bool alone = false;  // other threads write beside what this one reads: nothing else may be touched

  __device__ __forceinline__ Vec<T, V> load(int c) const {
    Vec<T, V> out;
    const int over = kAccess == Access::aligned ? 0 : misaligned(row + c);
    if (kAccess == Access::aligned || (over == 0 && c >= begin && c + V <= end)) {
#pragma unroll
      for (int i = 0; i < out.kPieces; ++i) out.piece(i) = reinterpret_cast<const uint4*>(row + c)[i];
    } else if (!alone && c - over >= begin && c - over + V + kPiece <= end) {
      const uint4* const pieces = reinterpret_cast<const uint4*>(row + (c - over));
      uint4 low = pieces[0];
#pragma unroll
      for (int i = 0; i < out.kPieces; ++i) {
        const uint4 high = pieces[i + 1];
        out.piece(i) = shifted<sizeof(T)>(low, high, over);
        low = high;
      }
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) out.v[j] = c + j >= begin && c + j < end ? row[c + j] : T{};
    }
    return out;
  }
};

// Brings what lies at p, at a multiple of 4 bytes, closer. Nothing waits for it.
__device__ __forceinline__ void touch(const void* p) {
  static_cast<void>(*static_cast<const volatile unsigned*>(p));
}

// Columns c ... c + V - 1 of a row, of which those outside begin ... end - 1 are dropped. Written by
// intrinsic: nvcc merges plain stores of 16 bytes and of elements in neighbouring branches.
template <Access kAccess, class T, int V>
__device__ __forceinline__ void store(T* row, int c, int begin, int end, Vec<T, V>& from) {
  T* const to = row + c;
  if (kAccess == Access::aligned || (misaligned(to) == 0 && c >= begin && c + V <= end)) {
#pragma unroll
    for (int i = 0; i < from.kPieces; ++i) __stwb(reinterpret_cast<uint4*>(to) + i, from.piece(i));
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (c + j >= begin && c + j < end) to[j] = from.v[j];
    }
  }
}

}  // namespace fused_rmsnorm::cuda
