#include <cstdio>

#include "../../csrc/cpu/kernels.h"
#include "problem.h"

using namespace fused_rmsnorm;
using namespace fused_rmsnorm::test;

namespace {

std::vector<const cpu::Kernels*> kernels_here() {
  std::vector<const cpu::Kernels*> all = {&cpu::baseline_kernels};
#if defined(__x86_64__)
  for (const cpu::Kernels* k : {&cpu::avx2_kernels, &cpu::avx512_kernels}) {
    if (cpu::supported(*k)) all.push_back(k);
  }
#endif
  return all;
}

Shape random_shape(const Types& types, int64_t n, Random& random) {
  Shape s;
  s.types = types, s.n = n;
  s.rows = random.chance(20) ? 1 + random.below(40) : 1 + random.below(5);
  if (n > 500) s.rows = 1 + random.below(4);
  s.k = random.chance(60) ? n : 1 + random.below(n);
  s.weight = !random.chance(15), s.bias = random.chance(25), s.residual = random.chance(35);
  s.offset = random.chance(25) ? 1 : 0, s.want_rstd = !random.chance(20);
  s.inner = random.chance(25) ? 1 + random.below(4) : 1, s.gap = random.chance(25) ? random.below(70) : 0;
  s.x_shift = random.chance(50) ? random.below(33) : 0,
  s.out_shift = random.chance(50) ? random.below(33) : 0;
  s.dx = !random.chance(15), s.dw = !random.chance(20), s.db = random.chance(30);
  return s;
}

void run_backward(const cpu::Kernels& kernels, const Backward& b, bool stream) {
  const cpu::Chunks chunks = cpu::plan(b);
  kernels.backward(b, chunks, 0, chunks.count, stream);
  kernels.merge(b, chunks, 0, b.n);
}

void values(Checker& check) {
  Random random(1);
  std::vector<int64_t> lengths;
  for (int64_t n = 1; n <= 70; ++n) lengths.push_back(n);
  for (int64_t n : {95, 96, 97, 127, 128, 129, 191, 192, 193, 255, 256, 257, 511, 513, 1000, 4097})
    lengths.push_back(n);
  for (const cpu::Kernels* kernels : kernels_here()) {
    for (const Types& types : all_types()) {
      for (int64_t n : lengths) {
        for (int repeat = 0; repeat < 2; ++repeat) {
          const Shape s = random_shape(types, n, random);
          const bool stream = n * size_of(types.y) >= 512;
          ForwardProblem f(s, random);
          kernels->forward(f.args(), 0, s.rows, stream);
          check_forward(f, check, kernels->name);
          BackwardProblem b(s, random);
          run_backward(*kernels, b.args(), stream);
          check_backward(b, check, kernels->name);
        }
      }
    }
  }
}

}  // namespace

int main() {
  Checker check;
  values(check);
  std::printf("failures: %lld\n", static_cast<long long>(check.failures()));
  return check.failures() ? 1 : 0;
}
