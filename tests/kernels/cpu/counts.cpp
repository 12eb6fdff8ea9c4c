// One call of the kernels per case, for counting the instructions that it takes (benchmarks/instructions).
//   counts KERNELS callgrind    under valgrind --tool=callgrind: one dump per case, which bears its name
//   counts KERNELS step [CASE...]   by itself, one instruction after the other, some 30 us each: for
//                               instruction sets that valgrind does not know. Prints "name: instructions".
//                               A case that there is none of: whether it works here
//   counts                      the cases: "name: elements"
// KERNELS: AVX2, AVX512, ...
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "../../../csrc/cpu/kernels.h"
#include "here.h"
#if __has_include(<valgrind/callgrind.h>)
#include <valgrind/callgrind.h>
#else
#define CALLGRIND_ZERO_STATS
#define CALLGRIND_DUMP_STATS_AT(name) (std::fprintf(stderr, "no <valgrind/callgrind.h>\n"), std::exit(2))
#endif

using namespace fused_rmsnorm;
using namespace fused_rmsnorm::test;

namespace {

struct Case {
  const char* name;
  Dtype dtype;
  int64_t rows, n;
  bool backward = false, bias = false, add = false, dw = true;
  Gate gate = Gate::none;
  int64_t weight_rows = 1;
};
const Case cases[] = {
    {"forward bf16 64x4096", Dtype::bf16, 64, 4096},
    {"forward fp32 64x4096", Dtype::f32, 64, 4096},
    {"forward fp16 64x4096", Dtype::f16, 64, 4096},
    {"forward bf16 1024x128", Dtype::bf16, 1024, 128},
    {"forward fp32 1024x128", Dtype::f32, 1024, 128},
    {"forward fp32 2048x64", Dtype::f32, 2048, 64},
    {"forward bf16 80x1000", Dtype::bf16, 80, 1000},
    {"forward fp32 80x1000", Dtype::f32, 80, 1000},
    {"forward bf16 64x4096 add", Dtype::bf16, 64, 4096, false, false, true},
    {"forward bf16 64x4096 bias", Dtype::bf16, 64, 4096, false, true},
    {"backward bf16 64x4096", Dtype::bf16, 64, 4096, true},
    {"backward fp32 64x4096", Dtype::f32, 64, 4096, true},
    {"backward fp16 64x4096", Dtype::f16, 64, 4096, true},
    {"backward bf16 64x4096 add", Dtype::bf16, 64, 4096, true, false, true},
    {"backward bf16 64x4096 dx", Dtype::bf16, 64, 4096, true, false, false, false},
    {"forward bf16 64x4096 gate last", Dtype::bf16, 64, 4096, false, false, false, false, Gate::last},
    {"forward bf16 64x4096 gate first", Dtype::bf16, 64, 4096, false, false, false, false, Gate::first},
    {"forward fp32 64x4096 gate last", Dtype::f32, 64, 4096, false, false, false, false, Gate::last},
    {"backward bf16 64x4096 gate last", Dtype::bf16, 64, 4096, true, false, false, true, Gate::last},
    {"backward bf16 64x4096 gate first", Dtype::bf16, 64, 4096, true, false, false, true, Gate::first},
    {"backward fp32 64x4096 gate last", Dtype::f32, 64, 4096, true, false, false, true, Gate::last},
    {"forward bf16 1024x128 heads", Dtype::bf16, 1024, 128, false, false, false, false, Gate::none, 8},
    {"backward bf16 1024x128 heads", Dtype::bf16, 1024, 128, true, false, false, true, Gate::none, 8},
};

// Zeros, from a line's start: what is counted does not depend on the numbers.
char* zeros(int64_t bytes) {
  static std::vector<std::unique_ptr<char[]>> kept;
  kept.push_back(std::make_unique<char[]>(bytes + 64));
  char* const p = kept.back().get();
  return p + (64 - reinterpret_cast<uintptr_t>(p) % 64);
}

// The one call of the case.
std::function<void()> call_of(const cpu::Kernels& kernels, const Case& c) {
  const int64_t size = size_of(c.dtype), whole = c.rows * c.n * size;
  const auto rows = [&] { return Rows{zeros(whole), 1, c.n, 0}; };
  if (!c.backward) {
    Forward f;
    f.rows = c.rows, f.n = f.k = c.n, f.eps = 1, f.x_dtype = f.w_dtype = f.y_dtype = c.dtype;
    f.weight_rows = c.weight_rows, f.gate = c.gate;
    if (c.gate != Gate::none) f.z = rows();
    f.x = rows(), f.weight = zeros(c.weight_rows * c.n * size), f.y = zeros(whole),
    f.rstd = zeros(c.rows * 4);
    if (c.bias) f.bias = zeros(c.n * size);
    if (c.add) f.residual = rows(), f.sum = zeros(whole);
    return [&kernels, f] { kernels.forward(f, 0, f.rows, false); };
  }
  Backward b;
  b.rows = c.rows, b.n = b.k = c.n, b.x_dtype = b.w_dtype = b.dy_dtype = c.dtype;
  b.weight_rows = c.weight_rows, b.gate = c.gate;
  if (c.gate != Gate::none) b.z = rows(), b.dz = zeros(whole);
  b.x = rows(), b.dy = rows(), b.weight = zeros(c.weight_rows * c.n * size), b.rstd = zeros(c.rows * 4),
  b.dx = zeros(whole);
  if (c.dw) b.dw = zeros(c.weight_rows * c.n * size);
  if (c.add) b.dsum = rows();
  b.workspace = zeros(cpu::backward_workspace(b));
  return [&kernels, b] {
    const cpu::Chunks chunks = cpu::plan(b);
    kernels.backward(b, chunks, 0, chunks.runs * chunks.count, false);
    if (b.dw) kernels.merge(b, chunks, 0, b.weight_rows * b.n);
  };
}

// Instructions between two stops of a child process that makes the call.
long step_through(const std::function<void()>& call) {
  const pid_t child = fork();
  if (child == 0) {
    if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(1);
    raise(SIGSTOP);
    call();
    raise(SIGSTOP);
    _exit(0);
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child || !WIFSTOPPED(status)) return -1;
  long steps = 0;
  for (; ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr) == 0; ++steps) {
    if (waitpid(child, &status, 0) != child || !WIFSTOPPED(status) || WSTOPSIG(status) != SIGTRAP) break;
  }
  kill(child, SIGKILL);
  waitpid(child, &status, 0);
  return steps;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    for (const Case& c : cases) std::printf("%s: %lld\n", c.name, static_cast<long long>(c.rows * c.n));
    return 0;
  }
  for (const cpu::Kernels* kernels : kernels_here()) {
    if (std::strcmp(kernels->name, argv[1]) != 0) continue;
    const bool step = std::strcmp(argv[2], "step") == 0;
    const long nothing = step ? step_through([] {}) : 0;
    if (nothing < 0) {
      std::fprintf(stderr, "this machine allows no ptrace\n");
      return 1;
    }
    for (const Case& c : cases) {
      const auto is_it = [&c](const char* name) { return std::strcmp(c.name, name) == 0; };
      if (argc > 3 && std::none_of(argv + 3, argv + argc, is_it)) continue;
      const std::function<void()> call = call_of(*kernels, c);
      if (step) {
        std::printf("%s: %ld\n", c.name, step_through(call) - nothing);
      } else {
        CALLGRIND_ZERO_STATS;
        call();
        CALLGRIND_DUMP_STATS_AT(c.name);
      }
    }
    return 0;
  }
  std::fprintf(stderr, "this machine has no %s\n", argv[1]);
  return 1;
}
