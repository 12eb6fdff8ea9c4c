// What the host finds out about the rows of a call before it launches a kernel: whether they are
// aligned, and the multiplication that stands for the division of a row's number.
#pragma once
#include "plan.h"

namespace fused_rmsnorm::cuda {

// Whether rows may be read and written in whole 16-byte pieces.
inline bool is_aligned(const void* p, int64_t bytes = 0) {
  return (reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(bytes)) % 16 == 0;
}
// An absent tensor is aligned.
inline bool is_aligned(const Rows& r, Dtype d) {
  return !r.data || (is_aligned(r.data, r.outer_stride * size_of(d)) &&
                     is_aligned(nullptr, r.inner_stride * size_of(d)));
}

inline bool is_aligned(const Forward& f, const Plan& p) {
  return f.n % p.vector == 0 && is_aligned(f.x, f.x_dtype) && is_aligned(f.residual, f.x_dtype) &&
         is_aligned(f.z, f.x_dtype) && is_aligned(f.weight) && is_aligned(f.bias) && is_aligned(f.y) &&
         is_aligned(f.sum);
}
inline bool is_aligned(const Backward& b, const Plan& p) {
  return b.n % p.vector == 0 && is_aligned(b.x, b.x_dtype) && is_aligned(b.dy, b.dy_dtype) &&
         is_aligned(b.dsum, b.x_dtype) && is_aligned(b.z, b.x_dtype) && is_aligned(b.weight) &&
         is_aligned(b.bias) && is_aligned(b.dx) && is_aligned(b.dz);
}

constexpr int64_t kMostRows32 = int64_t{1} << 31;  // rows that are counted, and divided, in 32 bits

// As most models call gates and weights of several rows: everything is aligned, there is a weight, all
// columns are in the statistic, y and dy have x's dtype, there is no residual, and beside a gate, which is
// z * sigmoid(z), neither bias nor db. Such calls, if not of fp64, have kernels of their own, where none of
// that is asked.
template <class Call>
bool has_usual_terms(const Call& call) {
  return call.weight && call.k == call.n && call.rows <= kMostRows32 &&
         (call.gate == Gate::none || (!call.sigmoid && !call.bias));
}
inline bool is_usual(const Forward& f, const Plan& p) {
  return is_aligned(f, p) && has_usual_terms(f) && f.y_dtype == f.x_dtype && !f.residual.data;
}
inline bool is_usual(const Backward& b, const Plan& p) {
  return is_aligned(b, p) && has_usual_terms(b) && b.dy_dtype == b.x_dtype && (b.gate == Gate::none || !b.db);
}

// m / inner = (m * multiplier >> 32) >> shift for every m <= 2^31: with L = ceil(log2(inner)) and the
// multiplier 2^(31 + L) / inner rounded up, the product is too large by less than m * inner, at most
// 2^(31 + L), which is less than what separates a quotient from the next (Granlund and Montgomery
// 1994, theorem 4.2). Where there are more rows, or the inner ones are as many, there is no multiplier.
inline Rows with_divisor(Rows r, int64_t rows) {
  if (r.inner > 1 && r.inner < kMostRows32 && rows <= kMostRows32) {
    int log = 1;
    while (int64_t{1} << log < r.inner) ++log;
    r.multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + log)) + r.inner - 1) / r.inner);
    r.shift = log - 1;
  }
  return r;
}

// Rows of x, dy and the like as the kernels find them, by multiplication alone: to do without a division made
// their code a tenth shorter.
inline Rows with_places(Rows r, int64_t rows) {
  if (r.inner >= rows) r.outer_stride = r.inner > 1 ? r.inner_stride : r.outer_stride, r.inner = 1;
  return with_divisor(r, rows);
}
inline bool has_places(const Rows& r) { return r.inner == 1 || r.multiplier; }

}  // namespace fused_rmsnorm::cuda
