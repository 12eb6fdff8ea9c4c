// The CPU backend: the kernels over torch's threads.
#include <ATen/Parallel.h>

#include "backend.h"

namespace fused_rmsnorm {
namespace {

struct Cpu {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };
  static int64_t workspace(const Backward& args) { return cpu::backward_workspace(args); }

  static void run(const Forward& args) {
    at::parallel_for(0, args.rows, cpu::forward_grain(args),
                     [&](int64_t begin, int64_t end) { cpu::forward(args, begin, end); });
  }

  static void run(const Backward& args) {
    at::parallel_for(0, cpu::backward_chunks(args), 1,
                     [&](int64_t begin, int64_t end) { cpu::backward(args, begin, end); });
    if (!args.dw && !args.db) return;
    constexpr int64_t kColumns = 2048;  // with fewer, a second thread costs more than it saves
    at::parallel_for(0, args.n, kColumns,
                     [&](int64_t begin, int64_t end) { cpu::backward_merge(args, begin, end); });
  }
};

}  // namespace

FUSED_RMSNORM_LIBRARY_IMPL(CPU, m) { register_backend<Cpu>(m); }

}  // namespace fused_rmsnorm
