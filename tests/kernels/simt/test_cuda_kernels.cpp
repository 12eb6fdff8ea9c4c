// The CUDA kernels on the emulated device, through the entry points that torch calls.
//
//   test_cuda_kernels SECTION DTYPE [PERCENT]     SECTION: see below
//
// values    every shape of the launch plan on every architecture, at its edges, against fp64
// bits      a row alone, in a batch, elsewhere in memory, under another schedule: the same bytes
// general   all of this and of special, of weights of several rows and of gates
// long      sums of very many terms: in one thread, over rows
// gates     activations over numbers of every exponent (f32)
// errors    what is refused, and divisions
// special   NaN and inf stay in their rows; outputs over inputs; no rows; large values
// PERCENT of the random cases are run, for slow sanitizers.
#include <cstdio>
#include <cstring>

#include "../../../csrc/cuda/gate.cuh"
#include "../../../csrc/cuda/general.cuh"
#include "../../../csrc/cuda/rows.h"
#include "../../../csrc/cuda/run.h"
#include "../activations.h"
#include "simt.h"

using namespace fused_rmsnorm;
using namespace fused_rmsnorm::test;

namespace {

void run(Checker& check, const Shape& s, const char* error) {
  check.that(!error, [&] { return std::string(error) + ": " + s.describe(); });
}

// The call as torch makes it; or on so small a grid that blocks take several rows.
template <class Call>
const char* run_small(const Call& call, cuda::Plan plan, int64_t grid) {
  plan.max_grid = std::min(plan.max_grid, grid);
  return cuda::run(call, plan, nullptr);
}
void run(Checker& check, const Shape& s, const Forward& f, int64_t grid) {
  run(check, s,
      grid && f.rows ? run_small(f, cuda::plan_of(f, simt::arch), grid) : cuda::forward(f, nullptr));
}
void run(Checker& check, const Shape& s, const Backward& b, int64_t grid) {
  run(check, s, grid ? run_small(b, cuda::plan_of(b, simt::arch), grid) : cuda::backward(b, nullptr));
}

constexpr int kArchitectures[] = {75, 80, 90, 120};

// What is asked of a call.
enum class Asked {
  plain,
  general,  // a weight of several rows, or a gate, or both
};

// N at the edges of every shape of the plan, and a few between.
std::vector<int64_t> lengths(Dtype x, int arch, Asked asked) {
  const int64_t v = 16 / size_of(x);
  std::vector<int64_t> all = {1, 2, 3, v, v + 1};
  const auto edges = [&](const auto& shapes) {
    for (const auto& s : shapes) {
      const int64_t most = v * s.threads * s.items;
      for (int64_t n : {most - v, most - 1, most, most + 1}) all.push_back(n);
    }
  };
  if (asked == Asked::general) {
    edges(cuda::kGeneralShapes);
    all.push_back(v * cuda::kGeneralLongThreads * 3 + 5);
    return all;
  }
  edges(cuda::kShapes);
  const int64_t block = v * 512 * 4;
  for (int64_t n : {2 * block, 2 * block + 3}) all.push_back(n);
  if (arch >= 90) {  // clusters of 4 and 8, of 1024 threads, two passes
    for (int64_t n : {4 * block - 5, 8 * block}) all.push_back(n);
  }
  return all;
}

void make_general(Shape& s, Random& random) {
  s.weight_has_rows = random.chance(60);
  if (s.types.x != Dtype::f64 && (!s.weight_has_rows || random.chance(50))) {
    s.gate = random.chance(50) ? Gate::last : Gate::first;
    s.sigmoid = random.chance(40), s.residual = false;
    if (s.gate == Gate::last) s.types.y = s.types.x;
  } else {
    s.weight_has_rows = true;
  }
  if (s.weight_has_rows) {
    s.weight_rows = 1 + random.below(5), s.weight_share = s.weight_rows == 1 ? 1 : 1 + random.below(3);
    s.rows = (s.rows + 1) / 2 * s.weight_rows * s.weight_share;
  }
}

// As is_usual() of rows.h asks, where n is whole vectors: of so many things at once few random calls are.
void make_usual(Shape& s) {
  const int64_t v = 16 / size_of(s.types.x);
  s.k = s.n, s.weight = true, s.residual = false, s.types.y = s.types.x;
  if (s.gate != Gate::none) s.sigmoid = s.bias = s.db = false;
  for (int64_t* elements : {&s.gap, &s.head_gap, &s.x_shift, &s.out_shift}) *elements -= *elements % v;
}

Shape random_shape(const Types& types, int64_t n, Random& random, Asked asked) {
  Shape s;
  s.types = types, s.n = n;
  s.rows = n > 40000           ? 1 + random.below(2)
           : n > 5000          ? 1 + random.below(4)
           : random.chance(30) ? 1 + random.below(60)
                               : 1 + random.below(9);
  s.k = random.chance(60) ? n : 1 + random.below(n);
  s.weight = !random.chance(15), s.bias = random.chance(25), s.residual = random.chance(35);
  s.offset = random.chance(25) ? 1 : 0, s.want_rstd = !random.chance(20);
  const int64_t v = 16 / size_of(types.x);
  s.inner = random.chance(25) ? 1 + random.below(4) : 1;
  s.gap = random.chance(25) ? random.chance(50) ? v * random.below(9) : random.below(70) : 0;
  s.head_gap = random.chance(20) ? random.below(10) : 0;
  if (random.chance(50)) {
    s.x_shift = random.chance(30) ? v * random.below(4) : random.below(4 * v);
    s.out_shift = random.chance(30) ? v * random.below(4) : random.below(4 * v);
  }
  s.dx = !random.chance(15), s.dw = !random.chance(20), s.db = random.chance(30);
  if (asked == Asked::general) make_general(s, random);
  if (asked == Asked::general && random.chance(40)) make_usual(s);
  return s;
}

std::string on_device(const char* what) {
  return std::string(what) + " sm_" + std::to_string(simt::arch) + " schedule " +
         std::to_string(simt::schedule);
}

void forward_and_backward(Checker& check, const Shape& s, Random& random) {
  const int64_t grid = random.chance(50) ? 1 + random.below(3) : 0;
  ForwardProblem f(s, random);
  run(check, s, f.args(), grid);
  check_forward(f, check, on_device("forward"));
  BackwardProblem b(s, random, cuda::backward_workspace);
  run(check, s, b.args(), grid);
  check_backward(b, check, on_device("backward"));
}

void values(Checker& check, Dtype x, int percent, Asked asked) {
  Random random(1);
  for (int arch : kArchitectures) {
    simt::arch = arch;
    for (const Types& types : all_types()) {
      if (types.x != x) continue;
      for (int64_t n : lengths(x, arch, asked)) {
        for (int repeat = 0; repeat < (n > 5000 ? 1 : 3); ++repeat) {
          const Shape s = random_shape(types, n, random, asked);
          simt::schedule = static_cast<int>(random.below(8));
          if (random.chance(percent)) forward_and_backward(check, s, random);
        }
      }
    }
  }
}

// `one`'s weight and bias: the row of them that row m of s takes.
template <class Problem>
void copy_weight(Problem& one, const Problem& from, const Shape& s, int64_t m) {
  const int64_t at = s.weight_row(m) * s.n;
  for (int64_t j = 0; j < one.weight.count(); ++j) one.weight.set(j, from.weight[at + j]);
  for (int64_t j = 0; j < one.bias.count(); ++j) one.bias.set(j, from.bias[at + j]);
}

void bits(Checker& check, Dtype x, int percent, Asked asked) {
  Random random(2);
  for (int arch : {80, 90}) {
    simt::arch = arch;
    for (const Types& types : all_types()) {
      if (types.x != x) continue;
      for (int64_t n : lengths(x, arch, asked)) {
        if (!random.chance(percent)) continue;
        Shape s = random_shape(types, n, random, asked);
        s.rows = (n > 5000 ? 2 : 7) * s.weight_rows * s.weight_share, s.want_rstd = s.dx = true;
        Shape one = s;
        one.rows = one.inner = one.weight_rows = one.weight_share = 1, one.gap = one.head_gap = 0;
        one.x_shift = random.below(32), one.out_shift = random.below(32);
        const int64_t m = random.below(s.rows);

        const int64_t grid = random.chance(50) ? 1 + random.below(3) : 0;
        ForwardProblem f(s, random), alone(one, random);
        copy_row(alone.x, one, f.x, s, m);
        if (s.residual) copy_row(alone.residual, one, f.residual, s, m);
        if (s.gate != Gate::none) copy_row(alone.z, one, f.z, s, m);
        copy_weight(alone, f, s, m);
        run(check, s, f.args(), grid);
        simt::schedule = static_cast<int>(random.below(8));
        run(check, one, cuda::forward(alone.args(), nullptr));
        check.that(same_row(f.y, m, alone.y, 0, n) && same_row(f.rstd, m, alone.rstd, 0, 1) &&
                       (!s.residual || same_row(f.sum, m, alone.sum, 0, n)),
                   [&] { return on_device("forward") + ": a row alone has other bits, " + s.describe(); });

        BackwardProblem b(s, random, cuda::backward_workspace);
        BackwardProblem row(one, random, cuda::backward_workspace);
        copy_row(row.x, one, b.x, s, m), copy_row(row.dy, one, b.dy, s, m);
        if (s.residual) copy_row(row.dsum, one, b.dsum, s, m);
        if (s.gate != Gate::none) copy_row(row.z, one, b.z, s, m);
        copy_weight(row, b, s, m), row.rstd.set(0, b.rstd[m]);
        run(check, s, b.args(), grid);
        run(check, one, cuda::backward(row.args(), nullptr));
        check.that(same_row(b.dx, m, row.dx, 0, n) && (!row.dz.count() || same_row(b.dz, m, row.dz, 0, n)),
                   [&] { return on_device("backward") + ": a row alone has other bits, " + s.describe(); });

        // dw and db: another layout in memory, another schedule.
        Shape moved = s;
        moved.inner = 1, moved.head_gap = 0, moved.gap = random.below(9), moved.x_shift = random.below(32);
        BackwardProblem again(moved, random, cuda::backward_workspace);
        for (int64_t i = 0; i < s.rows; ++i) {
          for (int64_t j = 0; j < n; ++j) {
            again.x.set(place(moved, i, j), b.x[place(s, i, j)]);
            again.dy.set(place(moved, i, j), b.dy[place(s, i, j)]);
            if (s.residual) again.dsum.set(place(moved, i, j), b.dsum[place(s, i, j)]);
            if (s.gate != Gate::none) again.z.set(place(moved, i, j), b.z[place(s, i, j)]);
          }
        }
        copy(again.weight, b.weight), copy(again.bias, b.bias), copy(again.rstd, b.rstd);
        simt::schedule = static_cast<int>(random.below(8));
        run(check, moved, again.args(), grid);
        check.that(
            again.dx.same_bytes(b.dx) && again.dz.same_bytes(b.dz) && (!s.dw || again.dw.same_bytes(b.dw)) &&
                (!s.db || again.db.same_bytes(b.db)),
            [&] { return on_device("backward") + ": gradients depend on the layout, " + s.describe(); });
      }
    }
  }
}

// Under a gate: y over x or the gate, dx over x or dy, dz over the gate.
void gates_in_place(Checker& check, Shape s, Random& random) {
  s.k = s.n, s.rows = 7, s.residual = false, s.types.y = s.types.x;
  for (Gate gate : {Gate::last, Gate::first}) {
    s.gate = gate;
    const auto where = [&](const char* what) {
      return [&, what] { return on_device(what) + ", " + s.describe(); };
    };
    for (bool over_x : {false, true}) {
      ForwardProblem f(s, random), in(s, random);
      copy(in.x, f.x), copy(in.z, f.z), copy(in.weight, f.weight);
      run(check, s, cuda::forward(f.args(), nullptr));
      Forward args = in.args();
      Array& y = over_x ? in.x : in.z;
      args.y = y.data();
      run(check, s, cuda::forward(args, nullptr));
      check.that(y.same_bytes(f.y), where("gate in place, forward"));

      BackwardProblem b(s, random, cuda::backward_workspace), over(s, random, cuda::backward_workspace);
      copy(over.x, b.x), copy(over.dy, b.dy), copy(over.z, b.z), copy(over.weight, b.weight);
      copy(over.rstd, b.rstd);
      run(check, s, cuda::backward(b.args(), nullptr));
      Backward back = over.args();
      Array& dx = over_x ? over.x : over.dy;
      back.dx = dx.data(), back.dz = over.z.data();
      run(check, s, cuda::backward(back, nullptr));
      check.that(dx.same_bytes(b.dx) && over.z.same_bytes(b.dz) && over.dw.same_bytes(b.dw),
                 where("gate in place, backward"));
    }
  }
}

void special(Checker& check, Dtype x, int percent, Asked asked) {
  Random random(3);
  for (const Types& types : all_types()) {
    if (types.x != x) continue;
    const int64_t long_row = asked == Asked::plain ? 20001 : 9001;  // in two passes
    for (int64_t n : {int64_t{40}, int64_t{64}, int64_t{777}, int64_t{2048}, long_row}) {
      if (!random.chance(percent)) continue;
      Shape s;
      s.types = types, s.n = s.k = n, s.rows = 5;
      if (asked == Asked::general) s.weight_has_rows = true, s.weight_rows = s.rows;
      const auto where = [&](const char* what) {
        return [&, what] { return on_device(what) + ", " + s.describe(); };
      };

      // One row of NaN and one of inf between finite ones.
      ForwardProblem clean(s, random), dirty(s, random);
      copy(dirty.x, clean.x), copy(dirty.weight, clean.weight);
      dirty.x.set(place(s, 1, n / 2), NAN), dirty.x.set(place(s, 3, n - 1), INFINITY);
      run(check, s, cuda::forward(clean.args(), nullptr));
      run(check, s, cuda::forward(dirty.args(), nullptr));
      for (int64_t m : {0, 2, 4})
        check.that(same_row(clean.y, m, dirty.y, m, n), where("a clean row changed"));
      check.that(std::isnan(dirty.y[n]) && std::isnan(dirty.y[2 * n - 1]),
                 where("NaN does not fill its row"));
      check.that(std::isnan(dirty.y[4 * n - 1]), where("inf / inf is not NaN"));
      check.that(dirty.y[3 * n] == 0, where("a finite number over an infinite rms is not 0"));

      // Numbers whose squares overflow the dtype, and whose sum does not.
      for (int64_t i = 0; i < clean.x.count(); ++i)
        clean.x.set(i, clean.x[i] * (x == Dtype::f16 ? 1e4 : 1e15));
      run(check, s, cuda::forward(clean.args(), nullptr));
      check_forward(clean, check, on_device("large"));

      // Outputs over inputs, with rows that do and do not start at 16 bytes.
      for (int64_t shift : {0, 1}) {
        if (types.y != types.x) break;
        s.residual = true, s.x_shift = s.out_shift = shift;
        ForwardProblem f(s, random), over(s, random);
        copy(over.x, f.x), copy(over.residual, f.residual), copy(over.weight, f.weight);
        run(check, s, cuda::forward(f.args(), nullptr));
        Forward args = over.args();
        args.y = over.x.data(), args.sum = over.residual.data();
        run(check, s, cuda::forward(args, nullptr));
        check.that(over.x.same_bytes(f.y) && over.residual.same_bytes(f.sum), where("in place, forward"));

        for (int which = 0; which < 3; ++which) {
          BackwardProblem b(s, random, cuda::backward_workspace), in(s, random, cuda::backward_workspace);
          copy(in.x, b.x), copy(in.dy, b.dy), copy(in.dsum, b.dsum), copy(in.weight, b.weight);
          copy(in.rstd, b.rstd);
          run(check, s, cuda::backward(b.args(), nullptr));
          Backward args = in.args();
          Array& target = which == 0 ? in.x : which == 1 ? in.dy : in.dsum;
          args.dx = target.data();
          run(check, s, cuda::backward(args, nullptr));
          check.that(target.same_bytes(b.dx) && in.dw.same_bytes(b.dw), where("in place, backward"));
        }
      }
      s.residual = false, s.x_shift = s.out_shift = 0;
      if (asked == Asked::general && x != Dtype::f64 && types.y == x) {
        Shape gated = s;
        gated.weight_has_rows = false, gated.weight_rows = 1;
        gates_in_place(check, gated, random);
      }

      // No rows: nothing to write but zeros in dw and db.
      s.rows = 0, s.db = true;
      forward_and_backward(check, s, random);
    }
  }
}

// One number that stops a running sum of ones from growing, and many ones after it: what a thread adds up
// is to lose no more of them than the folding (fold.cuh, kSpan) explains, whatever the length.
void long_sums(Checker& check, Dtype x) {
  if (x == Dtype::f64) return;  // 2^53 ones
  const double u = unit(x);
  simt::arch = 90, simt::schedule = 0;
  Random random(4);
  Shape s;
  s.types = {x, x, x, false};
  s.weight = false;
  const auto fill = [&](Array& a, double at_first) {
    for (int64_t i = 0; i < a.count(); ++i) a.set(i, i == 0 ? at_first : 1);
  };

  // A row in two passes, of which each thread has 256 vectors.
  s.n = s.k = int64_t{16} / size_of(x) * cuda::kLongThreads * 256;
  cuda::Plan two_pass = cuda::forward_plan(int64_t{1} << 24, x, simt::arch);
  check.that(two_pass.family == cuda::Family::two_pass, [] { return std::string("not in two passes"); });
  ForwardProblem f(s, random);
  const double first = 16384;  // squared 2^28: what a vector of ones adds to it is lost
  fill(f.x, first);
  run(check, s, cuda::run(f.args(), two_pass, nullptr));
  const double squares = first * first + static_cast<double>(s.n - 1);
  const double r = 1 / std::sqrt(squares / s.n + s.eps);
  check.near(f.rstd[0], r, 24 * u * r, [] { return std::string("rstd of a long row"); });
  BackwardProblem b(s, random, cuda::backward_workspace);
  fill(b.x, first), fill(b.dy, first);
  b.rstd.set(0, 1);
  Backward args = b.args();
  args.dw = nullptr;
  two_pass = cuda::backward_plan(int64_t{1} << 24, x, x, simt::arch);
  run(check, s, cuda::run(args, two_pass, nullptr));
  const double dx = 1 - squares / s.n;  // of a column with x = dy = 1
  check.near(b.dx[1], dx, 24 * u * squares / s.n + half_spacing(x, dx),
             [] { return std::string("dx of a long row"); });

  // Very many rows, of which a thread has 16 kSpan: aligned, unaligned, and in two passes; and under a gate
  // that is 1, aligned and in two passes.
  s.types = {x, Dtype::f32, x, false}, s.weight = true;  // dw unrounded
  for (int which = 0; which < 5; ++which) {
    const bool two_passes = which == 2 || which == 4;
    if (which == 3) s.gate = Gate::last, s.sigmoid = true;
    s.n = s.k = which % 3 ? 3 : 16 / size_of(x), s.rows = 16 * cuda::kSpan * (two_passes ? 1 : 16);
    BackwardProblem many(s, random, cuda::backward_workspace);
    fill(many.x, 1), fill(many.dy, 4096), fill(many.rstd, 4096);  // 2^24, to which a one adds nothing
    for (int64_t i = 0; i < many.z.count(); ++i) many.z.set(i, 40);
    Backward call = many.args();
    call.dx = call.dz = nullptr;
    Backward of_length = call;
    if (two_passes) of_length.n = int64_t{1} << 24;
    cuda::Plan plan = cuda::plan_of(of_length, simt::arch);
    plan.max_grid = 1;
    run(check, s, cuda::run(call, plan, nullptr));
    const double want = 0x1p24 + static_cast<double>(s.rows - 1);
    check.near(many.dw[0], want, (cuda::kSpan + 64) * u * want,
               [&] { return "dw of many rows, " + std::to_string(which); });
  }

  // Rows side by side put their sums away where the activations of the next ones are kept, whoever is first.
  // Of 16-bit numbers sigmoid(40) may be a unit in the last place below 1 (gate.cuh).
  s.n = s.k = 8 * 16 / size_of(x), s.rows = 16 * (cuda::kSpan + 1);
  const double near_ones = size_of(x) == 2 ? static_cast<double>(s.rows) * 0x1p-22 : 0;
  for (simt::schedule = 0; simt::schedule < 4; ++simt::schedule) {
    BackwardProblem beside(s, random, cuda::backward_workspace);
    fill(beside.x, 1), fill(beside.dy, 1), fill(beside.rstd, 1);
    for (int64_t i = 0; i < beside.z.count(); ++i) beside.z.set(i, 40);
    Backward sums = beside.args();
    sums.dx = sums.dz = nullptr;
    cuda::Plan small = cuda::plan_of(sums, simt::arch);
    check.that(small.rows_per_block == 16, [] { return std::string("16 rows side by side"); });
    small.max_grid = 1;
    run(check, s, cuda::run(sums, small, nullptr));
    for (int64_t j = 0; j < s.n; ++j) {
      check.near(beside.dw[j], s.rows, near_ones,
                 [] { return std::string("dw of gated rows side by side"); });
    }
  }
  simt::schedule = 0;
  s.gate = Gate::none, s.sigmoid = false;

  // A row over a whole block, whose partial is put away three times: of ones, dw is their number.
  s.n = s.k = 4096, s.rows = 2 * cuda::kSpan + 1;
  BackwardProblem wide(s, random, cuda::backward_workspace);
  fill(wide.x, 1), fill(wide.dy, 1), fill(wide.rstd, 1);
  cuda::Plan plan = cuda::backward_plan(s.n, x, x, simt::arch);
  check.that(cuda::kShapes[plan.shape].threads >= 128, [] { return std::string("rows side by side"); });
  plan.max_grid = 1;
  Backward call = wide.args();
  call.dx = nullptr;
  run(check, s, cuda::run(call, plan, nullptr));
  for (int64_t j = 0; j < s.n; ++j) {
    check.near(wide.dw[j], s.rows, 0, [] { return std::string("dw of rows over a whole block"); });
  }
}

// The activations of the gates: rows of ones are their own norm under rstd = 1, so y is act(z) and dz, under
// a gradient of ones, act'(z).
void gates(Checker& check) {
  simt::arch = 90, simt::schedule = 0;
  Random random(6);
  constexpr uint32_t kStep = 4999;  // of the bits of z: a prime shows all last digits
  Shape s;
  s.types = {Dtype::f32, Dtype::f32, Dtype::f32, false};
  s.n = s.k = 4096, s.rows = (int64_t{1} << 32) / kStep / s.n, s.weight = false, s.eps = 0;
  s.gate = Gate::last, s.dw = false;
  for (const bool sigmoid : {false, true}) {
    s.sigmoid = sigmoid;
    ForwardProblem f(s, random);
    BackwardProblem b(s, random, cuda::backward_workspace);
    for (int64_t i = 0; i < f.z.count(); ++i) {
      const uint32_t bits = static_cast<uint32_t>(i) * kStep;
      std::memcpy(f.z.data() + 4 * i, &bits, 4), std::memcpy(b.z.data() + 4 * i, &bits, 4);
      f.x.set(i, 1), b.x.set(i, 1), b.dy.set(i, 1);
    }
    for (int64_t m = 0; m < s.rows; ++m) b.rstd.set(m, 1);
    run(check, s, cuda::forward(f.args(), nullptr));
    run(check, s, cuda::backward(b.args(), nullptr));
    for (int64_t i = 0; i < f.z.count(); ++i) {
      check_activation(check, f.z[i], f.y[i], b.dz[i], sigmoid, "CUDA");
    }
  }
}

// Of every number of a 16-bit dtype.
template <class X>
void quick_activations(Checker& check) {
  for (unsigned bits = 0; bits < 1u << 16; ++bits) {
    const auto low = static_cast<unsigned short>(bits);
    const float z[1] = {cuda::widen(reinterpret_cast<const X&>(low))};
    for (const bool sigmoid : {false, true}) {
      float value[1], slope[1];
      cuda::activate<X>(z, sigmoid, value, slope);
      check_activation(check, z[0], value[0], slope[0], sigmoid, "CUDA", true);
    }
  }
}

// Rows are found by a multiplication that divides: exact for every row and number of rows side by side.
// Rows are counted in 32 bits in the kernels of usual calls.
void most_rows_of_usual_calls(Checker& check) {
  Forward f;
  Backward b;
  alignas(16) static float weight[8];
  f.n = f.k = b.n = b.k = 8, f.weight = b.weight = weight;
  for (int more : {0, 1}) {
    f.rows = b.rows = (int64_t{1} << 31) + more;
    check.that(
        cuda::is_usual(f, cuda::plan_of(f, 90)) != more && cuda::is_usual(b, cuda::plan_of(b, 90)) != more,
        [] { return std::string("rows that 32 bits do not count are taken for usual"); });
  }
}

void divisions(Checker& check) {
  Random random(5);
  const auto holds = [&](int64_t m, int64_t inner) {
    const int64_t want = m / inner + (inner == 1 ? 0 : m % inner << 28);
    for (int64_t all : {m + 1, int64_t{1} << 31, int64_t{1} << 34}) {
      if (m >= all) continue;
      const auto say = [&] {
        return "row " + std::to_string(m) + " of " + std::to_string(all) + ", " + std::to_string(inner) +
               " side by side";
      };
      const Rows divided = cuda::with_divisor({nullptr, inner}, all);
      check.that(cuda::quotient(divided, m) == m / inner, say);
      check.that(cuda::quotient(divided, all) == all / inner, say);
      const Rows rows = cuda::with_places({nullptr, inner, 1, int64_t{1} << 28}, all);
      const bool found = inner == 1 || inner >= all || all <= int64_t{1} << 31;
      check.that(cuda::has_places(rows) == found, say);
      if (found) check.that(cuda::offset_of(rows, m) == want, say);
    }
  };
  std::vector<int64_t> numbers = {1, 3, 5, 6, 7, 10, 641, 6700417};
  for (int bit = 1; bit < 34; ++bit) {
    for (int64_t d : {-1, 0, 1}) numbers.push_back((int64_t{1} << bit) + d);
  }
  for (int i = 0; i < 1000; ++i) numbers.push_back(1 + random.below(int64_t{1} << (1 + random.below(33))));
  for (int64_t inner : numbers) {
    for (int64_t m : numbers) {
      holds(m, inner), holds(m / inner * inner, inner);
      if (m >= inner) holds(m / inner * inner - 1, inner);
    }
    holds(0, inner), holds((int64_t{1} << 31) - 1, inner);
  }
}

void errors(Checker& check) {
  divisions(check);
  most_rows_of_usual_calls(check);
  Forward f;
  f.rows = 1, f.n = f.k = (int64_t{1} << 30) + 1;
  Backward b;
  b.rows = 1, b.n = b.k = f.n;
  for (const char* message : {cuda::forward(f, nullptr), cuda::backward(b, nullptr)}) {
    check.that(message && std::strstr(message, "2^30"),
               [] { return std::string("too long a row is taken"); });
  }
  f.n = f.k = b.n = b.k = 64, f.rows = b.rows = (int64_t{1} << 31) + 1;
  f.x.inner = b.dy.inner = 2;
  for (const char* message : {cuda::forward(f, nullptr), cuda::backward(b, nullptr)}) {
    check.that(message && std::strstr(message, "2^31"),
               [] { return std::string("too many rows of two strides are taken"); });
  }
  // Of a weight of so many rows, each of which has blocks of its own.
  b.x.inner = b.dy.inner = 1, b.weight = &b, b.weight_has_rows = true, b.weight_rows = b.rows;
  const char* const message = cuda::backward(b, nullptr);
  check.that(message && std::strstr(message, "backward_general with 2147483649 blocks"),
             [] { return std::string("more blocks than a grid holds are taken"); });
  b.weight = nullptr, b.weight_has_rows = false, b.weight_rows = 1;
  f.rows = b.rows = 1;
  // The workspace is that of the rows there are, not of the most partials that a plan may make.
  b.n = b.k = int64_t{1} << 30, b.dw = &b;
  check.that(cuda::backward_workspace(b) == b.n * 4, [] { return std::string("workspace of one long row"); });
  b.n = b.k = 4096, b.rows = 3, b.db = &b;
  check.that(cuda::backward_workspace(b) == 3 * 2 * b.n * 4,
             [] { return std::string("workspace of three rows"); });
}

}  // namespace

int main(int count, char** words) {
  if (count < 3) return std::fprintf(stderr, "test_cuda_kernels SECTION DTYPE [PERCENT]\n"), 2;
  const std::string section = words[1], dtype = words[2];
  const int percent = count > 3 ? std::atoi(words[3]) : 100;
  Checker check;
  quick_gates = true;
  for (Dtype d : {Dtype::f32, Dtype::f64, Dtype::f16, Dtype::bf16}) {
    if (dtype != name(d)) continue;
    if (section == "values") values(check, d, percent, Asked::plain);
    if (section == "bits") bits(check, d, percent, Asked::plain);
    if (section == "general") {
      values(check, d, percent, Asked::general);
      bits(check, d, percent, Asked::general);
      special(check, d, percent, Asked::general);
    }
    if (section == "special") special(check, d, percent, Asked::plain);
    if (section == "long") long_sums(check, d);
    if (section == "errors") errors(check);
    if (section == "gates") {
      gates(check);
      quick_activations<__nv_bfloat16>(check);
      quick_activations<__half>(check);
    }
  }
  std::printf("%s %s: %lld failures\n", words[1], words[2], static_cast<long long>(check.failures()));
  return check.failures() ? 1 : 0;
}
