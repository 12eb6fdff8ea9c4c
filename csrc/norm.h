// What a kernel is given: plain structs and the entry points of both backends. No torch in here,
// so that the kernels build without it, run under the SIMT emulator and in sanitizer builds.
//
//   r  = 1 / sqrt(mean(x[j]^2 for j < k) + eps)          k = n: RMSNorm;  k < n: pRMSNorm
//   y  = x * r * (weight_offset + w) + b
//   dx = r*g - [j < k] * x * r^3 * sum(g*x over all n) / k,   g = dy * (weight_offset + w)
//   dw = sum over rows of dy * x * r,   db = sum over rows of dy
//
// Everything between load and store is fp32 (fp64 for f64 input), rounded once at the end. In
// llama mode x*r is rounded to x's dtype before the weight is multiplied (and dw uses that rounded
// value); the rounding itself is passed through by dx.
//
// With a gate z of x's shape and act(z) = z * sigmoid(z), or sigmoid(z):
//   Gate::last    y * act(z) in place of y; in llama mode y is rounded to its dtype before
//   Gate::first   x * act(z), which nothing rounds, in place of x
#pragma once
#include <cstdint>

namespace fused_rmsnorm {

enum class Dtype : int { f32, f16, bf16, f64 };

enum class Gate : int { none, last, first };

constexpr int64_t size_of(Dtype d) { return d == Dtype::f64 ? 8 : d == Dtype::f32 ? 4 : 2; }

// Rows of n contiguous elements. Row i starts, counted in elements from data, at
//   (i / inner) * outer_stride + (i % inner) * inner_stride
// which covers (token, head) slices of a packed QKV tensor. A matrix has inner == 1 and
// outer_stride == its row stride; an expanded gradient has stride 0. Always inner >= 1. On CUDA, rows of two
// strides are at most 2^31.
struct Rows {
  const void* data = nullptr;
  int64_t inner = 1;
  int64_t outer_stride = 0;
  int64_t inner_stride = 0;
  uint32_t multiplier = 0, shift = 0;  // of a division by inner: the CUDA backend's own, see cuda/rows.h
};

// Dtype combinations that the kernels are instantiated for (x, w, y):
//   (f32, f32, f32)  (f64, f64, f64)
//   (h, h, h)  (h, f32, h)  and, in llama mode only, (h, f32, f32)      h = f16 or bf16
// Without a weight, w_dtype equals x_dtype. With a gate, which has x's dtype: not f64, and y has x's dtype
// unless the gate is first. Any pointer may have any alignment that its element type allows. An output may be
// the very same memory as an input (y == x, sum == residual), never a shifted overlap.
struct Forward {
  int64_t rows = 0, n = 0, k = 0;  // 1 <= k <= n
  double eps = 0, weight_offset = 0;
  bool llama = false;
  Dtype x_dtype = Dtype::f32, w_dtype = Dtype::f32, y_dtype = Dtype::f32;
  Rows x;
  Rows residual;                 // data == nullptr: plain norm. Else x + residual, rounded to x_dtype,
                                 // is written to sum and that rounded value is normalised.
  const void* weight = nullptr;  // weight_rows * n elements or nullptr (then 1, without the offset)
  const void* bias = nullptr;    // as many of w_dtype or nullptr; only together with a weight
  void* y = nullptr;             // rows * n, contiguous
  void* sum = nullptr;           // rows * n of x_dtype, contiguous; set exactly when residual is
  void* rstd = nullptr;          // rows, float (double for f64); nullptr: not wanted
  // Row i takes row (i / weight_share) % weight_rows of weight and bias. rows is a multiple of their product.
  int64_t weight_rows = 1, weight_share = 1;
  Gate gate = Gate::none;
  bool sigmoid = false;          // act is the sigmoid
  bool weight_has_rows = false;  // of a kind of weight that may have several rows: so that a row of x has the
                                 // same bits where it has one, the CUDA kernels are chosen by this
  Rows z;                        // of the gate; there is no residual beside it
};

struct Backward {
  int64_t rows = 0, n = 0, k = 0;
  double weight_offset = 0;
  bool llama = false;
  Dtype x_dtype = Dtype::f32, w_dtype = Dtype::f32, dy_dtype = Dtype::f32;  // dy has y's dtype
  Rows dy, x;
  Rows dsum;  // x_dtype, added to dx before it is rounded; data == nullptr: none
  const void* weight = nullptr;
  const void* rstd = nullptr;  // rows, contiguous, float (double for f64)
  void* dx = nullptr;          // rows * n of x_dtype, contiguous; nullptr: not wanted
  void* dw = nullptr;          // weight_rows * n of w_dtype; nullptr: not wanted
  void* db = nullptr;          // as many of w_dtype; nullptr: not wanted
  void* workspace = nullptr;   // as many bytes as the backend's backward_workspace() says, any content
  // As of the forward; a gate not together with dsum.
  int64_t weight_rows = 1, weight_share = 1;
  Gate gate = Gate::none;
  bool sigmoid = false, weight_has_rows = false;
  Rows z;
  const void* bias = nullptr;  // as in the forward, where the gate is last and dz wanted
  void* dz = nullptr;          // rows * n of x_dtype, contiguous; wanted together with dx or not at all
};

// What the kernels' library exports; everything else in it is hidden. To the linker this is C: plain names
// (a reference is a pointer there) with the version of the structs in them, so that no other version of
// these kernels in the same process is ever taken for this one.
static_assert(sizeof(Rows) == 40 && sizeof(Forward) == 240 && sizeof(Backward) == 296,
              "Another layout, or another meaning: count up the version in the names below");
#pragma GCC visibility push(default)

// CPU. The caller owns the threads: it splits rows, chunks and columns over them as it likes, and
// the bits of every result are the same for every split.
namespace cpu {

// "AVX512", "AVX2", "NEON" or "baseline"; capped by ATEN_CPU_CAPABILITY
const char* capability() __asm__("fused_rmsnorm_v3_cpu_capability");

void forward(const Forward&, int64_t row_begin, int64_t row_end) __asm__("fused_rmsnorm_v3_cpu_forward");
// Rows below which a second thread does not pay.
int64_t forward_grain(const Forward&) __asm__("fused_rmsnorm_v3_cpu_forward_grain");

// Backward runs in two steps: every chunk of rows writes its dx and its own fp32 partial of dw and
// db into the workspace; then columns of the partials, counted over all rows of the weight, are added
// in chunk order. With neither dw nor db wanted there is nothing to merge. Chunks depend on the numbers
// of rows and columns only, never on threads.
int64_t backward_workspace(const Backward&) __asm__("fused_rmsnorm_v3_cpu_backward_workspace");  // bytes
int64_t backward_chunks(const Backward&) __asm__("fused_rmsnorm_v3_cpu_backward_chunks");
// Chunks below which a second thread does not pay.
int64_t backward_grain(const Backward&) __asm__("fused_rmsnorm_v3_cpu_backward_grain");
void backward(const Backward&, int64_t chunk_begin,
              int64_t chunk_end) __asm__("fused_rmsnorm_v3_cpu_backward");
void backward_merge(const Backward&, int64_t col_begin,
                    int64_t col_end) __asm__("fused_rmsnorm_v3_cpu_backward_merge");

}  // namespace cpu

// CUDA. Work is queued on the stream (a cudaStream_t) of the current device; nothing synchronises.
// forward and backward return nullptr, or a message that says what was launched and what failed.
namespace cuda {

// Bytes, on the current device.
int64_t backward_workspace(const Backward&) __asm__("fused_rmsnorm_v3_cuda_backward_workspace");
const char* forward(const Forward&, void* stream) __asm__("fused_rmsnorm_v3_cuda_forward");
const char* backward(const Backward&, void* stream) __asm__("fused_rmsnorm_v3_cuda_backward");

}  // namespace cuda

#pragma GCC visibility pop
}  // namespace fused_rmsnorm
