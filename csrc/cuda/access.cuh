// Rows and vectors of weights in global or shared memory, read and written V columns at a time.
#pragma once
#include "vec.cuh"

namespace fused_rmsnorm::cuda {

// m / rows.inner by the multiplier that the host has found (rows.h): a division of 64 bits is eighty
// instructions, as many as a short row takes.
__device__ __forceinline__ unsigned outer_of(const Rows& rows, int64_t m) {
  return static_cast<unsigned>(uint64_t{static_cast<unsigned>(m)} * rows.multiplier >> 32) >> rows.shift;
}

// Where row m begins.
__device__ __forceinline__ int64_t offset_of(const Rows& rows, int64_t m) {
  if (rows.inner == 1) return m * rows.outer_stride;
  const unsigned outer = outer_of(rows, m);
  const unsigned rest = static_cast<unsigned>(m) - outer * static_cast<unsigned>(rows.inner);
  return outer * rows.outer_stride + rest * rows.inner_stride;
}

template <class T>
__device__ __forceinline__ const T* row_of(const Rows& rows, int64_t m) {
  return static_cast<const T*>(rows.data) + offset_of(rows, m);
}

// Where row m begins, from where row m - kStep does.
template <int kStep, class T>
__device__ __forceinline__ const T* next_row(const Rows& rows, const T* row, int64_t m) {
  return rows.inner == 1 ? row + kStep * rows.outer_stride : row_of<T>(rows, m);
}

// Elements by which column c of row m lies past a multiple of 16 bytes: of the address, the lowest bits
// are enough, and 64-bit products are four instructions each.
template <class T>
__device__ __forceinline__ int misaligned(const Rows& rows, int64_t m, int c) {
  unsigned outer = static_cast<unsigned>(m), inner = 0;
  if (rows.inner != 1) {
    outer = outer_of(rows, m);
    inner = static_cast<unsigned>(m) - outer * static_cast<unsigned>(rows.inner);
  }
  const unsigned start = static_cast<unsigned>(reinterpret_cast<uintptr_t>(rows.data)) / sizeof(T);
  return (start + outer * static_cast<unsigned>(rows.outer_stride) +
          inner * static_cast<unsigned>(rows.inner_stride) + c) %
         (16 / sizeof(T));
}

__device__ __forceinline__ bool starts_piece(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}
// Elements by which p lies past a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ int misaligned(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T));
}

// The sixteen bytes that start `shift` bytes (less than sixteen) into the 32 of low and high.
template <int kSize>  // that of an element, of which the shift is a multiple
__device__ __forceinline__ uint4 shifted(uint4 low, uint4 high, unsigned shift) {
  unsigned w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
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

// A vector of the bytes that start `over` bytes into `pieces`.
template <class T, int V>
__device__ __forceinline__ Vec<T, V> load_shifted(const uint4* pieces, unsigned over) {
  Vec<T, V> out;
  uint4 low = pieces[0];
#pragma unroll
  for (int i = 0; i < out.kPieces; ++i) {
    const uint4 high = pieces[i + 1];
    out.piece(i) = shifted<sizeof(T)>(low, high, over);
    low = high;
  }
  return out;
}
template <class T, int V>
__device__ __forceinline__ Vec<T, V> load_pieces(const T* p) {
  Vec<T, V> out;
#pragma unroll
  for (int i = 0; i < out.kPieces; ++i) out.piece(i) = reinterpret_cast<const uint4*>(p)[i];
  return out;
}
// By intrinsic: nvcc merges plain stores of 16 bytes and of elements in neighbouring branches.
template <class T, int V>
__device__ __forceinline__ void store_pieces(T* p, Vec<T, V>& from) {
#pragma unroll
  for (int i = 0; i < from.kPieces; ++i) __stwb(reinterpret_cast<uint4*>(p) + i, from.piece(i));
}

// The n columns of a row of any alignment, read in vectors that may start at any of them; what lies beyond
// reads as zero. Of odd N seven rows of eight are unaligned: reading the aligned pieces around
// a vector (the second of which is the neighbour's first, so in L1) and shifting takes two wide reads
// where elements would take eight. Elements are read only where a piece would leave the columns.
template <class T, int V>
class Reader {
 public:
  // alone: other threads write beside what a thread reads, so that nothing else may be touched.
  __device__ Reader(const T* row, int n, bool alone = false)
      : row_(row), n_(n), over_(misaligned(row)), alone_(alone) {}

  __device__ __forceinline__ T column(int c) const { return row_[c]; }
  __device__ __forceinline__ Vec<T, V> load(int c) const {
    constexpr int kPiece = 16 / sizeof(T);  // elements
    const int over = (over_ + c) & (kPiece - 1);
    if (over == 0 && c + V <= n_) return load_pieces<T, V>(row_ + c);
    if (!alone_ && c >= over && c - over + V + kPiece <= n_) {
      return load_shifted<T, V>(reinterpret_cast<const uint4*>(row_ + (c - over)), over * sizeof(T));
    }
    return gathered<T, V>([&](int j) { return c + j < n_ ? row_[c + j] : T{}; });
  }

 private:
  const T* row_;
  int n_, over_;
  bool alone_;
};

// Columns c ... of a row that starts on 16 bytes, and goes on beyond them to the end of a piece.
template <class E, int V>
__device__ __forceinline__ Vec<E, V> load_inside(const E* row, int c) {
  constexpr int kPiece = 16 / sizeof(E);  // elements
  const int over = c & (kPiece - 1);
  if (over == 0) return load_pieces<E, V>(row + c);
  return load_shifted<E, V>(reinterpret_cast<const uint4*>(row + (c - over)), over * sizeof(E));
}

// Writes columns c ... c + V - 1 of n: in pieces where they start on one and are in the row.
template <class T, int V>
__device__ __forceinline__ void store_within(T* row, int c, int n, Vec<T, V>& from, bool on_piece) {
  if (on_piece && c + V <= n) return store_pieces(row + c, from);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if (c + j < n) row[c + j] = from.element(j);
  }
}

}  // namespace fused_rmsnorm::cuda
