// The project's own launch code, compiled for the host: instead of launching, it notes which kernel it
// would have launched, how, and with which arguments. So no plan, grid or struct is written down twice.
// Or, asked to, it launches on the project's emulator (tests/kernels/simt), whose bits are compared.
#define launch launch_on_the_emulator
#include "cuda/device.cuh"
#undef launch

#include <cxxabi.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <string>
#include <typeinfo>

namespace {

std::string noted;
bool emulate = false;

std::string demangled(const char* name) {
  int status = 0;
  char* const text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  std::string result = text ? text : name;
  std::free(text);
  return result;
}

template <class T>
void note_bytes(const T& value) {
  constexpr const char* kDigits = "0123456789abcdef";
  noted += "|";
  for (size_t i = 0; i < sizeof value; ++i) {
    const unsigned char byte = reinterpret_cast<const unsigned char*>(&value)[i];
    noted += kDigits[byte >> 4];
    noted += kDigits[byte & 15];
  }
}

template <auto kKernel>
struct Named {};

}  // namespace

namespace fused_rmsnorm::cuda {

template <auto kKernel, class... Args>
const char* launch(const Launch& l, void* stream, const Args&... args) {
  if (emulate) return launch_on_the_emulator<kKernel>(l, stream, args...);
  noted += demangled(typeid(Named<kKernel>).name());
  for (const int64_t v : {l.blocks, int64_t{l.threads}, int64_t{l.shared_bytes}, int64_t{l.cluster}})
    noted += "|" + std::to_string(v);
  (note_bytes(args), ...);
  noted += "\n";
  return nullptr;
}

}  // namespace fused_rmsnorm::cuda

#include "cuda/backward_bf16.cu"
#include "cuda/backward_f16.cu"
#include "cuda/backward_f32.cu"
#include "cuda/backward_f64.cu"
#include "cuda/entry.cu"
#include "cuda/forward_bf16.cu"
#include "cuda/forward_f16.cu"
#include "cuda/forward_f32.cu"
#include "cuda/forward_f64.cu"
#include "cuda/run.h"

namespace {

using namespace fused_rmsnorm;

// max_grid > 0: with so small a grid that blocks take several rows.
template <class Call>
const char* launches(const Call& call, cuda::Plan plan, int64_t max_grid, bool on_emulator) {
  noted.clear();
  emulate = on_emulator;
  if (max_grid) plan.max_grid = std::min(plan.max_grid, max_grid);
  const char* const error = cuda::run(call, plan, nullptr);
  return error ? error : noted.c_str();
}

template <class T>
const char* bytes_of(const T& value) {
  noted.clear();
  note_bytes(value);
  return noted.c_str() + 1;
}

}  // namespace

extern "C" {

const char* name_of(const char* mangled) { return (noted = demangled(mangled)).c_str(); }

// "struct.field offset bytes" of every field that the tests fill.
const char* layout() {
  noted.clear();
#define FIELD(S, f) \
  noted += #S "." #f " " + std::to_string(offsetof(S, f)) + " " + std::to_string(sizeof(S::f)) + "\n"
  FIELD(Rows, data), FIELD(Rows, inner), FIELD(Rows, outer_stride), FIELD(Rows, inner_stride);
  FIELD(Forward, rows), FIELD(Forward, n), FIELD(Forward, k), FIELD(Forward, eps);
  FIELD(Forward, weight_offset), FIELD(Forward, llama), FIELD(Forward, x_dtype), FIELD(Forward, w_dtype);
  FIELD(Forward, y_dtype), FIELD(Forward, x), FIELD(Forward, residual), FIELD(Forward, weight);
  FIELD(Forward, bias), FIELD(Forward, y), FIELD(Forward, sum), FIELD(Forward, rstd);
  FIELD(Forward, weight_rows), FIELD(Forward, weight_share), FIELD(Forward, weight_has_rows);
  FIELD(Forward, gate), FIELD(Forward, sigmoid), FIELD(Forward, z);
  FIELD(Backward, rows), FIELD(Backward, n), FIELD(Backward, k), FIELD(Backward, weight_offset);
  FIELD(Backward, llama), FIELD(Backward, x_dtype), FIELD(Backward, w_dtype), FIELD(Backward, dy_dtype);
  FIELD(Backward, dy), FIELD(Backward, x), FIELD(Backward, dsum), FIELD(Backward, weight);
  FIELD(Backward, rstd), FIELD(Backward, dx), FIELD(Backward, dw), FIELD(Backward, db);
  FIELD(Backward, workspace), FIELD(Backward, weight_rows), FIELD(Backward, weight_share);
  FIELD(Backward, weight_has_rows), FIELD(Backward, gate), FIELD(Backward, sigmoid), FIELD(Backward, z);
  FIELD(Backward, bias), FIELD(Backward, dz);
#undef FIELD
  return noted.c_str();
}

// A struct as it is made, in hexadecimal.
const char* fresh_forward() { return bytes_of(Forward{}); }
const char* fresh_backward() { return bytes_of(Backward{}); }

// A line per launch: kernel|blocks|threads|shared bytes|cluster|arguments in hexadecimal. Or an error.
const char* launches_forward(const Forward* f, int arch, int64_t max_grid, int on_emulator) {
  simt::arch = arch;
  return launches(*f, cuda::plan_of(*f, arch), max_grid, on_emulator);
}
const char* launches_backward(const Backward* b, int arch, int64_t max_grid, int on_emulator) {
  simt::arch = arch;
  return launches(*b, cuda::plan_of(*b, arch), max_grid, on_emulator);
}

int64_t workspace(const Backward* b, int arch) {
  simt::arch = arch;
  return cuda::backward_workspace(*b);
}

// family, shape, vector, threads, cluster, rows per block and largest grid of the plan; dy < 0: forward.
// general: under a weight that may have several rows.
const char* plan(int64_t n, int x, int dy, int arch, int general) {
  Forward f;
  f.n = n, f.x_dtype = static_cast<Dtype>(x), f.weight_has_rows = general;
  Backward b;
  b.n = n, b.x_dtype = f.x_dtype, b.dy_dtype = static_cast<Dtype>(dy), b.weight_has_rows = general;
  const cuda::Plan p = dy < 0 ? cuda::plan_of(f, arch) : cuda::plan_of(b, arch);
  noted.clear();
  for (const int64_t v : {int64_t(p.family), int64_t{p.shape}, int64_t{p.vector}, int64_t{p.threads},
                          int64_t{p.cluster}, int64_t{p.rows_per_block}, p.max_grid})
    noted += std::to_string(v) + " ";
  return noted.c_str();
}

}  // extern "C"
