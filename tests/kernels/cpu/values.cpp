#include <cstdio>
#include <thread>

#include "../../../csrc/cpu/kernels.h"
#include "../problem.h"
#include "here.h"

using namespace fused_rmsnorm;
using namespace fused_rmsnorm::test;

namespace {

// Several rows of weight, and as many rows as they go into.
void share_weight(Shape& s, Random& random) {
  s.weight_rows = 1 + random.below(5), s.weight_share = 1 + random.below(3);
  s.rows = (s.rows + 1) / 2 * s.weight_rows * s.weight_share;
}

Shape random_shape(const Types& types, int64_t n, Random& random) {
  Shape s;
  s.types = types, s.n = n;
  s.rows = random.chance(20) ? 1 + random.below(40) : 1 + random.below(5);
  if (n > 500) s.rows = 1 + random.below(4);
  s.k = random.chance(60) ? n : 1 + random.below(n);
  s.weight = !random.chance(15), s.bias = random.chance(25), s.residual = random.chance(35);
  s.offset = random.chance(25) ? 1 : 0, s.want_rstd = !random.chance(20);
  s.head_gap = random.chance(20) ? random.below(10) : 0;
  s.inner = random.chance(25) ? 1 + random.below(4) : 1, s.gap = random.chance(25) ? random.below(70) : 0;
  s.x_shift = random.chance(50) ? random.below(33) : 0,
  s.out_shift = random.chance(50) ? random.below(33) : 0;
  s.dx = !random.chance(15), s.dw = !random.chance(20), s.db = random.chance(30);
  if (random.chance(30)) share_weight(s, random);
  if (types.x != Dtype::f64 && random.chance(40)) {
    s.gate = random.chance(50) ? Gate::last : Gate::first;
    s.sigmoid = random.chance(40), s.residual = false;
    if (s.gate == Gate::last) s.types.y = types.x;
  }
  return s;
}

void run_backward(const cpu::Kernels& kernels, const Backward& b, bool stream) {
  const cpu::Chunks chunks = cpu::plan(b);
  kernels.backward(b, chunks, 0, chunks.runs * chunks.count, stream);
  kernels.merge(b, chunks, 0, b.weight_rows * b.n);
}

using All = std::vector<const cpu::Kernels*>;

void values(Checker& check, const All& all) {
  Random random(1);
  std::vector<int64_t> lengths;
  for (int64_t n = 1; n <= 70; ++n) lengths.push_back(n);
  for (int64_t n : {95, 96, 97, 127, 128, 129, 191, 192, 193, 255, 256, 257, 511, 513, 1000, 4097})
    lengths.push_back(n);
  for (const cpu::Kernels* kernels : all) {
    for (const Types& types : all_types()) {
      for (int64_t n : lengths) {
        for (int repeat = 0; repeat < 2; ++repeat) {
          const Shape s = random_shape(types, n, random);
          const bool stream = n * size_of(s.types.y) >= 512;
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

// Work split over threads, each taking parts in turn; ThreadSanitizer watches.
template <class Part>
void on_threads(int64_t count, const Part& part) {
  constexpr int kThreads = 3;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([=] {
      for (int64_t i = t; i < count; i += kThreads) part(i, i + 1);
    });
  }
  for (std::thread& t : threads) t.join();
}

// The same bytes for a row alone and in a batch, at any alignment, streamed or not, and for any split
// of rows, chunks and columns over threads.
void bits(Checker& check, const All& all) {
  Random random(2);
  for (const cpu::Kernels* kernels : all) {
    for (const Types& types : all_types()) {
      for (int64_t n : {1, 7, 16, 33, 64, 129, 1000, 4097}) {
        Shape s = random_shape(types, n, random), one;
        s.rows = n > 500 ? 72 : 600, s.want_rstd = s.dx = true;
        // One turn through the weight's rows, two, or many.
        const int64_t turns = 1 + random.below(3);
        if (s.weight_rows > 1) s.weight_share = turns > 2 ? 3 : s.rows / turns / s.weight_rows;
        s.rows -= s.rows % (s.weight_rows * s.weight_share);
        const auto where = [&](const char* what) {
          return [&, what] { return std::string(kernels->name) + " " + what + ", " + s.describe(); };
        };
        ForwardProblem f(s, random), split(s, random);
        copy(split.x, f.x), copy(split.residual, f.residual), copy(split.z, f.z);
        copy(split.weight, f.weight), copy(split.bias, f.bias);
        kernels->forward(f.args(), 0, s.rows, false);
        const Forward args = split.args();
        const bool stream = n * size_of(s.types.y) >= 512;
        on_threads(s.rows, [&](int64_t i, int64_t j) { kernels->forward(args, i, j, stream); });
        check.that(split.y.same_bytes(f.y) && split.rstd.same_bytes(f.rstd) && split.sum.same_bytes(f.sum),
                   where("forward hangs on threads"));

        one = s, one.rows = one.inner = one.weight_rows = one.weight_share = 1, one.gap = one.head_gap = 0;
        one.x_shift = random.below(33), one.out_shift = random.below(33);
        const int64_t m = random.below(s.rows);
        ForwardProblem alone(one, random);
        copy_row(alone.x, one, f.x, s, m);
        if (s.residual) copy_row(alone.residual, one, f.residual, s, m);
        if (s.gate != Gate::none) copy_row(alone.z, one, f.z, s, m);
        for (int64_t j = 0; j < n; ++j) {
          alone.weight.set(j, f.weight[s.weight_row(m) * n + j]);
          alone.bias.set(j, f.bias[s.weight_row(m) * n + j]);
        }
        kernels->forward(alone.args(), 0, 1, false);
        check.that(same_row(f.y, m, alone.y, 0, n) && same_row(f.rstd, m, alone.rstd, 0, 1),
                   where("forward: a row alone has other bits"));

        BackwardProblem b(s, random), parts(s, random);
        copy(parts.x, b.x), copy(parts.dy, b.dy), copy(parts.dsum, b.dsum);
        copy(parts.weight, b.weight), copy(parts.rstd, b.rstd), copy(parts.z, b.z), copy(parts.bias, b.bias);
        run_backward(*kernels, b.args(), false);
        const Backward call = parts.args();
        const cpu::Chunks chunks = cpu::plan(call);
        on_threads(chunks.runs * chunks.count,
                   [&](int64_t i, int64_t j) { kernels->backward(call, chunks, i, j, stream); });
        on_threads(s.weight_rows * n, [&](int64_t i, int64_t j) { kernels->merge(call, chunks, i, j); });
        check.that(parts.dx.same_bytes(b.dx), where("dx hangs on threads"));
        check.that(parts.dz.same_bytes(b.dz), where("dz hangs on threads"));
        check.that(!s.dw || parts.dw.same_bytes(b.dw), where("dw hangs on threads"));
        check.that(!s.db || parts.db.same_bytes(b.db), where("db hangs on threads"));
      }
    }
  }
}

// How rows are cut: all of them once, enough work for each thread, and the shapes it was measured on.
void cuts(Checker& check) {
  Backward b;
  const auto where = [&] { return "chunks of " + std::to_string(b.rows) + " x " + std::to_string(b.n); };
  Random random(4);
  for (int repeat = 0; repeat < 2000; ++repeat) {
    b.rows = 1 + random.below(repeat % 2 ? 50 : repeat % 5 ? 100000 : 10000000);
    b.n = 1 + random.below(repeat % 3 ? 300 : 70000);
    const cpu::Chunks c = cpu::plan(b);
    check.that(c.count >= 1 && c.count <= std::max<int64_t>(128, b.rows / 512), where);
    check.that(c.rows_per_chunk <= 1024, where);
    check.that(c.rows_per_chunk * c.count >= b.rows && c.rows_per_chunk * (c.count - 1) < b.rows, where);
    const bool enough_work = c.rows_per_chunk >= 4 && c.rows_per_chunk * b.n >= 16384;
    check.that(c.count == 1 || enough_work || c.rows_per_chunk > 512, where);
    check.that(c.count <= 8 || c.rows_per_chunk >= 16, where);
  }
  const int64_t measured[][3] = {{1, 65536, 1},     {7, 65536, 1},      {8, 16384, 2},     {16, 4096, 4},
                                 {24, 2048, 2},     {80, 1000, 4},      {64, 960, 2},      {64, 240, 1},
                                 {200, 4096, 8},    {256, 4096, 16},    {4096, 4096, 128}, {131072, 64, 128},
                                 {131073, 64, 256}, {4194304, 64, 4096}};
  for (const auto& [rows, n, count] : measured) {
    b.rows = rows, b.n = n;
    check.that(cpu::plan(b).count == count, where);
  }
}

// The same under several rows of weight.
void cuts_of_weight_rows(Checker& check) {
  Backward b;
  const auto where = [&] {
    return "chunks of " + std::to_string(b.rows) + " x " + std::to_string(b.n) + " under " +
           std::to_string(b.weight_rows) + " rows of weight, each for " + std::to_string(b.weight_share);
  };
  Random random(5);
  for (int repeat = 0; repeat < 2000; ++repeat) {
    b.weight_rows = 2 + random.below(repeat % 4 ? 40 : 3000);
    b.weight_share = 1 + random.below(repeat % 3 ? 4 : 5000);
    b.rows = b.weight_rows * b.weight_share * (1 + random.below(repeat % 5 ? 100 : 2));
    b.n = 1 + random.below(300);
    const cpu::Chunks c = cpu::plan(b);
    const int64_t turn = b.weight_rows * b.weight_share, turns = b.rows / turn;
    check.that(c.runs * c.rows_per_run == b.rows, where);
    check.that(c.rows_per_chunk * c.count >= c.rows_per_run, where);
    check.that(c.rows_per_chunk * (c.count - 1) < c.rows_per_run, where);
    if (c.runs == 1) {
      check.that(c.rows_per_partial == b.weight_rows && c.partials == c.count, where);
      check.that(c.rows_per_chunk % turn == 0 && c.count <= std::max<int64_t>(128, b.rows / 512), where);
    } else {
      check.that(c.rows_per_partial == 1 && c.rows_per_run == b.weight_share, where);
      check.that(c.partials == turns * c.count && c.rows_per_chunk <= 1024, where);
      check.that(c.runs * c.count <= std::max<int64_t>(128, c.runs + b.rows / 512), where);
    }
  }
}

// So many rows that their partials are added in blocks; and a bias whose gradients are all -0 gets -0.
void sums(Checker& check, const All& all) {
  Random random(6);
  for (const cpu::Kernels* kernels : all) {
    for (const Types& types : all_types()) {
      Shape s;
      s.types = types, s.n = s.k = 3, s.rows = 140000, s.weight = s.bias = s.dw = s.db = true;
      BackwardProblem many(s, random);
      check.that(cpu::plan(many.args()).partials > 128, [] { return std::string("few partials"); });
      run_backward(*kernels, many.args(), false);
      check_backward(many, check, kernels->name);

      s.n = s.k = 37, s.rows = 50;
      BackwardProblem zeros(s, random);
      for (int64_t i = 0; i < zeros.dy.count(); ++i) zeros.dy.set(i, -0.0);
      run_backward(*kernels, zeros.args(), false);
      bool negative = true;
      for (int64_t j = 0; j < s.n; ++j) negative &= zeros.db[j] == 0 && std::signbit(zeros.db[j]);
      check.that(negative, [&] { return std::string(kernels->name) + ": db of -0"; });
    }
  }
}

// NaN and inf stay in their rows, in the right places; denormals are numbers.
void special(Checker& check, const All& all) {
  Random random(3);
  for (const cpu::Kernels* kernels : all) {
    for (const Types& types : all_types()) {
      for (int64_t n : {5, 16, 37, 100, 1030}) {
        Shape s;
        s.types = types, s.n = s.k = n, s.rows = 5;
        const auto where = [&](const char* what) {
          return [&, what] { return std::string(kernels->name) + " " + what + ", " + s.describe(); };
        };
        ForwardProblem clean(s, random), dirty(s, random);
        copy(dirty.x, clean.x), copy(dirty.weight, clean.weight);
        dirty.x.set(n + n / 2, NAN), dirty.x.set(3 * n + n - 1, INFINITY);
        kernels->forward(clean.args(), 0, s.rows, false);
        kernels->forward(dirty.args(), 0, s.rows, false);
        for (int64_t m : {0, 2, 4})
          check.that(same_row(clean.y, m, dirty.y, m, n), where("a clean row changed"));
        bool full = true, zero = true;
        for (int64_t j = 0; j < n; ++j) full &= std::isnan(dirty.y[n + j]);
        for (int64_t j = 0; j + 1 < n; ++j) zero &= dirty.y[3 * n + j] == 0;
        check.that(full, where("NaN does not fill its row"));
        check.that(zero && std::isnan(dirty.y[4 * n - 1]), where("a row over an infinite rms"));

        // A NaN weight spoils its column only.
        copy(dirty.x, clean.x), dirty.weight.set(n / 2, NAN);
        if (types.w == Dtype::f32) {  // the NaN whose rounding to bf16 would carry into the sign
          const uint32_t ones = 0x7fffffff;
          std::memcpy(dirty.weight.data() + n / 2 * 4, &ones, 4);
        }
        kernels->forward(dirty.args(), 0, s.rows, false);
        bool right = true;
        for (int64_t i = 0; i < s.rows * n; ++i) right &= std::isnan(dirty.y[i]) == (i % n == n / 2);
        check.that(right, where("NaN in the weight"));

        // Denormal inputs, and eps small enough for them to matter.
        const double tiny = types.x == Dtype::f64 ? 1e-310 : types.x == Dtype::f16 ? 1e-7 : 1e-39;
        for (int64_t i = 0; i < clean.x.count(); ++i) clean.x.set(i, random.uniform(-9, 9) * tiny);
        kernels->forward(clean.args(), 0, s.rows, false);
        check_forward(clean, check, std::string(kernels->name) + " denormals");
      }
    }
  }
}

}  // namespace

// cpu_kernels [NAME]: those of one instruction set only, e.g. the one that an emulator is there for.
int main(int argc, char** argv) {
  Checker check;
  const auto all = kernels_here(argc > 1 ? argv[1] : nullptr);
  values(check, all);
  bits(check, all);
  cuts(check);
  cuts_of_weight_rows(check);
  sums(check, all);
  special(check, all);
  if (all.empty()) check.fail("no such kernels here");
  std::printf("failures: %lld\n", static_cast<long long>(check.failures()));
  return check.failures() ? 1 : 0;
}
