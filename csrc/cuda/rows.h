// Whether the rows of a call may be read and written in whole 16-byte pieces. Host code.
#pragma once
#include "plan.h"

namespace fused_rmsnorm::cuda {

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
         is_aligned(f.weight) && is_aligned(f.bias) && is_aligned(f.y) && is_aligned(f.sum);
}
inline bool is_aligned(const Backward& b, const Plan& p) {
  return b.n % p.vector == 0 && is_aligned(b.x, b.x_dtype) && is_aligned(b.dy, b.dy_dtype) &&
         is_aligned(b.dsum, b.x_dtype) && is_aligned(b.weight) && is_aligned(b.dx);
}

}  // namespace fused_rmsnorm::cuda
