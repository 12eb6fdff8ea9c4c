#include "checks.h"

#include <ATen/MemoryOverlap.h>

#include <algorithm>
#include <cstdlib>

namespace fused_rmsnorm {
namespace {

// Under torch.compile sizes that depend on data are taken to be equal, and compared when they are known.
bool same(const c10::SymInt& a, const c10::SymInt& b) {
  if (!a.is_symbolic() && !b.is_symbolic()) return a == b;
  return a.sym_eq(b).expect_true(__FILE__, __LINE__);
}

bool same(c10::SymIntArrayRef a, c10::SymIntArrayRef b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const auto& i, const auto& j) { return same(i, j); });
}

bool is_real(at::ScalarType t) {
  return t == at::kFloat || t == at::kBFloat16 || t == at::kHalf || t == at::kDouble;
}

bool is_complex(at::ScalarType t) { return t == at::kComplexFloat || t == at::kComplexDouble; }

void check_real(const Tensor& t, const char* name) {
  TORCH_CHECK_TYPE(is_real(t.scalar_type()), name,
                   " must have dtype float16, bfloat16, float32 or float64, but got ", t.scalar_type());
}

// Before anything asks for sizes, which some of these do not have. None reaches an operator as an
// undefined tensor, whose shape is [0].
void check_strided(const Tensor& t, const char* name) {
  TORCH_CHECK_TYPE(t.defined(), name, " must be a tensor, but got None");
  TORCH_CHECK_TYPE(t.layout() == at::kStrided && !t.is_nested(), name, " must be a strided tensor, but got ",
                   t.is_nested() ? "a nested one: take its values()" : c10::str("layout ", t.layout()));
}

// Whether t's dimensions before the last broadcast to x's.
bool rows_broadcast(const Tensor& t, const Tensor& x) {
  for (int64_t d = 2; d <= t.dim(); d++) {
    const auto size = t.sym_size(-d);
    if (!TORCH_GUARD_OR_FALSE(size.sym_eq(1)) && !same(size, x.sym_size(-d))) return false;
  }
  return true;
}

void check_affine(const Tensor& t, const char* name, const Tensor& x) {
  check_strided(t, name);
  const bool fits = t.dim() > 0 && t.dim() <= x.dim() && same(t.sym_size(-1), x.sym_size(-1)) &&
                    (t.dim() == 1 || rows_broadcast(t, x));
  TORCH_CHECK(
      fits, name, " must have shape [", x.sym_size(-1),
      "], the size of input's last dimension, or dimensions before it that broadcast to input's shape ",
      x.sym_sizes(), ", but got ", t.sym_sizes());
  TORCH_CHECK(t.device() == x.device(), name, " must be on input's device ", x.device(), ", but is on ",
              t.device());
  if (!x.is_complex() || !is_complex(t.scalar_type())) check_real(t, name);
}

void check_like_input(const Tensor& t, const char* name, const Tensor& x) {
  check_strided(t, name);
  TORCH_CHECK(same(t.sym_sizes(), x.sym_sizes()), name, " must have input's shape ", x.sym_sizes(),
              ", but got ", t.sym_sizes());
  TORCH_CHECK(t.device() == x.device(), name, " must be on input's device ", x.device(), ", but is on ",
              t.device());
}

void check_rstd(const Tensor& rstd, const Tensor& x) {
  check_strided(rstd, "rstd");
  TORCH_CHECK_TYPE(rstd.scalar_type() == acc_type(x.scalar_type()), "rstd must have dtype ",
                   acc_type(x.scalar_type()), ", but got ", rstd.scalar_type());
  TORCH_CHECK(rstd.device() == x.device() && rstd.dim() == x.dim() && rstd.sym_size(-1) == 1 &&
                  same(rstd.sym_sizes().slice(0, x.dim() - 1), x.sym_sizes().slice(0, x.dim() - 1)),
              "rstd must have input's shape with 1 for the last dimension, but got ", rstd.sym_sizes());
}

// First and last byte of the memory that t's elements lie in, of which there is at least one.
std::pair<const char*, const char*> extent(const Tensor& t) {
  const auto* begin = static_cast<const char*>(t.const_data_ptr());
  if (!begin) return {nullptr, nullptr};
  int64_t last = 0;  // strides of tensors are not negative
  for (int64_t d = 0; d < t.dim(); d++) last += (t.size(d) - 1) * t.stride(d);
  return {begin, begin + (last + 1) * t.element_size() - 1};
}

// A vector that is read while `written` is written: refused also where it lies between the elements.
void check_not_within(const OptTensor& vector, const char* name, const Tensor& written, const char* where) {
  if (!present(vector) || !vector->numel() || !written.numel()) return;
  const auto [begin, end] = extent(*vector);
  const auto [written_begin, written_end] = extent(written);
  if (!begin || !written_begin) return;  // a device that shows no addresses
  TORCH_CHECK(end < written_begin || written_end < begin, name, " must not share memory with ", where,
              ", which is written in place: clone it");
}

struct Level {
  int64_t size, stride;
};
using Levels = c10::SmallVector<Level, 5>;

// The dimensions of t that have more than one index, the smallest stride first.
Levels levels_of(const Tensor& t) {
  Levels levels;
  for (int64_t d = 0; d < t.dim(); d++) {
    if (t.size(d) != 1) levels.push_back({t.size(d), t.stride(d)});
  }
  std::sort(levels.begin(), levels.end(), [](const Level& a, const Level& b) { return a.stride < b.stride; });
  return levels;
}

// Each step of a dimension passes all that the dimensions below it span. So it is in every view that
// slicing, transposing and selecting make; strides made up by hand may interleave without it.
bool is_nested(const Levels& levels) {
  int64_t span = 1;
  for (const auto& [size, stride] : levels) {
    if (stride < span) return false;
    span += (size - 1) * stride;
  }
  return true;
}

// Whether two elements of one tensor with these dimensions lie `distance` >= 0 elements apart.
bool is_apart_by(int64_t distance, const Level* levels, size_t count) {
  if (count == 0) return distance == 0;
  const auto [size, stride] = levels[count - 1];
  const int64_t steps = distance / stride, rest = distance % stride;
  // The dimensions below span less than a stride, to either side.
  return (steps < size && is_apart_by(rest, levels, count - 1)) ||
         (steps + 1 < size && is_apart_by(stride - rest, levels, count - 1));
}

// at::assert_no_internal_overlap, which lets everything with gaps pass, and where there are gaps the rest.
void check_apart(const Tensor& t, const char* name) {
  at::assert_no_internal_overlap(t);
  if (t.is_non_overlapping_and_dense() || t.numel() == 0) return;
  TORCH_CHECK(is_nested(levels_of(t)), name,
              " must not overlap itself in memory, nor interleave, to be "
              "written in place, but has strides ",
              t.strides(), " for shape ", t.sizes(), ": clone it");
}

// The same for two tensors of one shape, which check_apart has seen alone. Of two dtypes, they must not
// even interleave.
void check_apart(const Tensor& x, const Tensor& residual) {
  at::assert_no_overlap(x, residual);
  if (!x.numel() || !x.has_storage() || !residual.is_alias_of(x)) return;
  const auto [begin, end] = extent(x);
  const auto [other_begin, other_end] = extent(residual);
  if (!begin || end < other_begin || other_end < begin) return;
  const Levels levels = levels_of(x), other = levels_of(residual);
  const bool alike =
      x.scalar_type() == residual.scalar_type() &&
      std::equal(levels.begin(), levels.end(), other.begin(), other.end(),
                 [](const Level& a, const Level& b) { return a.size == b.size && a.stride == b.stride; });
  const int64_t distance = std::abs(begin - other_begin) / x.element_size();
  TORCH_CHECK(alike && !is_apart_by(distance, levels.data(), levels.size()),
              "input and residual must not share memory, in which both are written: clone one of them");
}

}  // namespace

void check_norm(const Options& options, const Tensor& x, const OptTensor& weight, const OptTensor& bias) {
  TORCH_CHECK_VALUE(options.weight_offset == 0 || present(weight),
                    "weight_offset must be 0 without a weight, but got ", options.weight_offset);
  check_strided(x, "input");
  TORCH_CHECK(x.dim() > 0, "input must have at least one dimension, but got a scalar");
  TORCH_CHECK_TYPE(is_real(x.scalar_type()) || is_complex(x.scalar_type()),
                   "input must have dtype float16, bfloat16, float32, float64, complex64 or complex128, "
                   "but got ",
                   x.scalar_type());
  if (present(weight)) check_affine(*weight, "weight", x);
  if (present(bias)) check_affine(*bias, "bias", x);
}

void check_gated(const Options& options, const Tensor& x, const Tensor& gate, const OptTensor& weight,
                 const OptTensor& bias) {
  check_norm(options, x, weight, bias);
  check_real(x, "input");
  check_like_input(gate, "gate", x);
  check_real(gate, "gate");
}

void check_residual(const Tensor& x, const Tensor& residual) {
  check_like_input(residual, "residual", x);
  const auto type = residual.scalar_type();
  const bool wider =
      is_real(x.scalar_type()) && is_real(type) && c10::promoteTypes(x.scalar_type(), type) == type;
  TORCH_CHECK_TYPE(type == x.scalar_type() || wider, "residual must have input's dtype ", x.scalar_type(),
                   " or a wider one, but got ", type);
}

void check_add_inplace(const Options& options, const Tensor& x, const Tensor& residual,
                       const OptTensor& weight) {
  check_residual(x, residual);
  const auto y_type = output_type(options, x.scalar_type(), weight);
  TORCH_CHECK_TYPE(
      y_type == x.scalar_type(), "input must have dtype ", y_type,
      " to take the result in place (the weight is wider and casting_mode is \"llama\"), but got ",
      x.scalar_type());
}

void check_no_overlap(const Tensor& x, const Tensor& residual, const OptTensor& weight,
                      const OptTensor& bias) {
  check_apart(x, "input");
  check_apart(residual, "residual");
  check_apart(x, residual);
  check_not_within(weight, "weight", x, "input");
  check_not_within(weight, "weight", residual, "residual");
  check_not_within(bias, "bias", x, "input");
  check_not_within(bias, "bias", residual, "residual");
}

void check_fwd(const Options& options, const Tensor& x, const OptTensor& weight, const OptTensor& bias) {
  check_norm(options, x, weight, bias);
  TORCH_CHECK_TYPE(!x.is_complex(), "input must be real here, but got ", x.scalar_type(),
                   ": call rms_norm, which takes complex numbers");
  if (!present(bias)) return;
  TORCH_CHECK(present(weight), "bias needs a weight here: call rms_norm, which takes a bias alone");
  TORCH_CHECK_TYPE(weight->scalar_type() == bias->scalar_type(), "bias must have weight's dtype ",
                   weight->scalar_type(), " here, but got ", bias->scalar_type());
  TORCH_CHECK(same(weight->sym_sizes(), bias->sym_sizes()), "bias must have weight's shape ",
              weight->sym_sizes(), " here, but got ", bias->sym_sizes());
}

void check_gated_fwd(const Options& options, const Tensor& x, const Tensor& gate, const OptTensor& weight,
                     const OptTensor& bias) {
  check_gated(options, x, gate, weight, bias);
  check_fwd(options, x, weight, bias);
}

void check_bwd(const Options& options, const Tensor& dy, const Tensor& x, const OptTensor& weight,
               const Tensor& rstd, const OptTensor& grad_sum) {
  check_fwd(options, x, weight, {});
  check_like_input(dy, "grad_output", x);
  check_real(dy, "grad_output");
  if (present(grad_sum)) {
    check_like_input(*grad_sum, "grad_sum", x);
    check_real(*grad_sum, "grad_sum");
  }
  check_rstd(rstd, x);
}

void check_gated_bwd(const Options& options, const Tensor& dy, const Tensor& x, const Tensor& gate,
                     const OptTensor& weight, const OptTensor& bias, const Tensor& rstd) {
  check_gated_fwd(options, x, gate, weight, bias);
  check_like_input(dy, "grad_output", x);
  check_real(dy, "grad_output");
  check_rstd(rstd, x);
}

}  // namespace fused_rmsnorm
