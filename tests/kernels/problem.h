// One call of the kernels of a backend with all its arrays, and what fp64 says about it.
//
// Error bounds, u = 2^-24 (2^-53 for f64). A sum over m columns runs in at least 8 (f64: 4) lane
// accumulators of two roundings a step, and their total takes a few more: its error is at most
// (m / lanes * 2 + 10) u times the sum of magnitudes. Half of that reaches 1/sqrt of a sum of
// squares. Each product adds u, and storing half the spacing of the output's dtype. Of an activation:
// 2 u in its exponential, and one in each of the four steps after it at most.
#pragma once
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "numbers.h"

namespace fused_rmsnorm::test {

struct Types {
  Dtype x, w, y;
  bool llama;
};
inline const std::vector<Types>& all_types() {
  using enum Dtype;
  static const std::vector<Types> types = {
      {f32, f32, f32, false}, {f64, f64, f64, false},   {f16, f16, f16, false}, {bf16, bf16, bf16, false},
      {f16, f32, f16, false}, {bf16, f32, bf16, false}, {f16, f16, f16, true},  {bf16, bf16, bf16, true},
      {f16, f32, f32, true},  {bf16, f32, f32, true},   {f32, f32, f32, true},
  };
  return types;
}
inline const char* name(Dtype d) {
  return d == Dtype::f32 ? "f32" : d == Dtype::f64 ? "f64" : d == Dtype::f16 ? "f16" : "bf16";
}

struct Shape {
  Types types{};
  int64_t rows = 1, n = 1, k = 1;
  bool weight = true, bias = false, residual = false, want_rstd = true;
  double offset = 0, eps = 1e-6;
  int64_t inner = 1, gap = 0;             // heads per token, elements between tokens
  int64_t head_gap = 0;                   // elements between heads
  int64_t x_shift = 0, out_shift = 0;     // elements past a cache line
  bool dx = true, dw = true, db = false;  // of the backward; residual: with dsum
  int64_t weight_rows = 1, weight_share = 1;
  bool weight_has_rows = false;
  Gate gate = Gate::none;
  bool sigmoid = false;

  std::string describe() const {
    return std::string(name(types.x)) + "/" + name(types.w) + "/" + name(types.y) +
           (types.llama ? " llama" : "") + " rows " + std::to_string(rows) + " n " + std::to_string(n) +
           " k " + std::to_string(k) + " inner " + std::to_string(inner) + " gap " + std::to_string(gap) +
           " head gap " + std::to_string(head_gap) + (weight ? "" : " no weight") + (bias ? " bias" : "") +
           (residual ? " residual" : "") + " offset " + std::to_string(offset) + " shifts " +
           std::to_string(x_shift) + " " + std::to_string(out_shift) + (dx ? " dx" : "") + (dw ? " dw" : "") +
           (db ? " db" : "") + " weight rows " + std::to_string(weight_rows) +
           (weight_has_rows ? " of several" : "") + " share " + std::to_string(weight_share) +
           (gate == Gate::none   ? ""
            : gate == Gate::last ? " gate last"
                                 : " gate first") +
           (sigmoid ? " sigmoid" : "");
  }
  int64_t weight_row(int64_t row) const { return row / weight_share % weight_rows; }
};

// act(z), its slope, and the terms that the slope is the sum of.
struct Activation {
  double value, slope, slope_size;
};
inline Activation activation(double z, bool sigmoid) {
  const double s = 1 / (1 + std::exp(-z)), c = 1 / (1 + std::exp(z));
  return sigmoid ? Activation{s, s * c, s * c} : Activation{z * s, s + z * s * c, s + std::fabs(z) * s * c};
}
// By how many u an activation is off, and by how many more if it comes from a GPU's approximations
// (gate.cuh): a power of two 2^-22, a reciprocal a unit in the last place, and the power's argument.
constexpr double kActivationError = 6;
inline double quick_error(double z) { return 8 + 1.25 * std::min(std::fabs(z), 87.0); }
inline bool quick_gates = false;  // whether the kernels under test take them for 16-bit numbers

inline Dtype compute_type(Dtype x) { return x == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

// Rows as slices of wider heads and tokens.
inline int64_t token_of(const Shape& s) { return s.inner * (s.n + s.head_gap) + s.gap; }
inline Rows rows_of(const Array& a, const Shape& s) {
  return {a.data(), s.inner, token_of(s), s.inner > 1 ? s.n + s.head_gap : 0};
}
inline int64_t extent(const Shape& s) { return (s.rows + s.inner - 1) / s.inner * token_of(s); }
inline int64_t place(const Shape& s, int64_t row, int64_t column) {
  return row / s.inner * token_of(s) + row % s.inner * (s.n + s.head_gap) + column;
}

inline bool same_row(const Array& a, int64_t i, const Array& b, int64_t j, int64_t n) {
  const int64_t bytes = n * size_of(a.dtype());
  return std::memcmp(a.data() + i * bytes, b.data() + j * bytes, bytes) == 0;
}

// One row of a problem as a problem of its own, elsewhere in memory.
inline void copy_row(Array& to, const Shape& one, const Array& from, const Shape& many, int64_t m) {
  for (int64_t j = 0; j < one.n; ++j) to.set(place(one, 0, j), from[place(many, m, j)]);
}
inline void copy(Array& to, const Array& from) {
  for (int64_t j = 0; j < to.count(); ++j) to.set(j, from[j]);
}

// Some weights are -0, whose sign an offset of +0 would change.
inline void sign_zeros(Array& weight) {
  for (int64_t j = 2; j < weight.count(); j += 7) weight.set(j, -0.0);
}

struct ForwardProblem {
  Shape s;
  Array x, residual, z, weight, bias, y, sum, rstd;

  ForwardProblem(const Shape& shape, Random& random)
      : s(shape),
        x(s.types.x, extent(s), s.x_shift),
        residual(s.types.x, s.residual ? extent(s) : 0, s.x_shift),
        z(s.types.x, s.gate != Gate::none ? extent(s) : 0, s.x_shift),
        weight(s.types.w, s.weight_rows * s.n, s.x_shift),
        bias(s.types.w, s.weight_rows * s.n),
        y(s.types.y, s.rows * s.n, s.out_shift),
        sum(s.types.x, s.residual ? s.rows * s.n : 0, s.out_shift),
        rstd(compute_type(s.types.x), s.rows) {
    random.fill(x, -3, 3);
    random.fill(residual, -3, 3);
    random.fill(z, -6, 6);
    random.fill(weight, -2, 2);
    sign_zeros(weight);
    random.fill(bias, -2, 2);
  }

  Forward args() {
    Forward f;
    f.rows = s.rows, f.n = s.n, f.k = s.k, f.eps = s.eps;
    f.weight_offset = s.offset, f.llama = s.types.llama;
    f.x_dtype = s.types.x, f.w_dtype = s.types.w, f.y_dtype = s.types.y;
    f.x = rows_of(x, s);
    if (s.residual) f.residual = rows_of(residual, s);
    if (s.weight) f.weight = weight.data();
    if (s.bias && s.weight) f.bias = bias.data();
    f.y = y.data();
    f.sum = s.residual ? sum.data() : nullptr;
    f.rstd = s.want_rstd ? rstd.data() : nullptr;
    f.weight_rows = s.weight_rows, f.weight_share = s.weight_share;
    f.weight_has_rows = s.weight_has_rows;
    f.gate = s.gate, f.sigmoid = s.sigmoid;
    if (s.gate != Gate::none) f.z = rows_of(z, s);
    return f;
  }
};

struct BackwardProblem {
  Shape s;
  Array dy, x, dsum, z, weight, bias, rstd, dx, dz, dw, db, workspace;

  BackwardProblem(const Shape& shape, Random& random,
                  int64_t (*workspace_bytes)(const Backward&) = cpu::backward_workspace)
      : s(shape),
        dy(s.types.y, extent(s), s.x_shift),
        x(s.types.x, extent(s), s.x_shift),
        dsum(s.types.x, s.residual ? extent(s) : 0, s.x_shift),
        z(s.types.x, s.gate != Gate::none ? extent(s) : 0, s.x_shift),
        weight(s.types.w, s.weight_rows * s.n, s.x_shift),
        bias(s.types.w, s.gate != Gate::none ? s.weight_rows * s.n : 0),
        rstd(compute_type(s.types.x), s.rows),
        dx(s.types.x, s.rows * s.n, s.out_shift),
        dz(s.types.x, s.gate != Gate::none ? s.rows * s.n : 0, s.out_shift),
        dw(s.types.w, s.weight_rows * s.n),
        db(s.types.w, s.weight_rows * s.n) {
    random.fill(dy, -2, 2);
    random.fill(x, -3, 3);
    random.fill(dsum, -2, 2);
    random.fill(z, -6, 6);
    random.fill(weight, -2, 2);
    sign_zeros(weight);
    random.fill(bias, -2, 2);
    random.fill(rstd, 0.3, 1.5);
    const Backward b = args();
    workspace = Array(Dtype::f32, workspace_bytes(b) / 4, 0);
    random.fill(workspace, -1e9, 1e9);
  }

  Backward args() {
    Backward b;
    b.rows = s.rows, b.n = s.n, b.k = s.k;
    b.weight_offset = s.offset, b.llama = s.types.llama;
    b.x_dtype = s.types.x, b.w_dtype = s.types.w, b.dy_dtype = s.types.y;
    b.dy = rows_of(dy, s), b.x = rows_of(x, s);
    if (s.residual) b.dsum = rows_of(dsum, s);
    if (s.weight) b.weight = weight.data();
    b.rstd = rstd.data();
    if (s.dx) b.dx = dx.data();
    if (s.dw) b.dw = dw.data();
    if (s.db) b.db = db.data();
    b.workspace = workspace.data();
    b.weight_rows = s.weight_rows, b.weight_share = s.weight_share;
    b.weight_has_rows = s.weight_has_rows;
    b.gate = s.gate, b.sigmoid = s.sigmoid;
    if (s.gate == Gate::none) return b;
    b.z = rows_of(z, s);
    if (s.bias && s.weight) b.bias = bias.data();
    if (s.dx) b.dz = dz.data();
    return b;
  }
};

// Where got leaves want by more than the bound.
class Checker {
 public:
  void near(double got, double want, double bound, const std::function<std::string()>& where) {
    if (std::isnan(want) ? std::isnan(got) : got == want || std::fabs(got - want) <= bound) return;
    fail(where() + ": got " + std::to_string(got) + ", want " + std::to_string(want) + " within " +
         std::to_string(bound));
  }
  void that(bool ok, const std::function<std::string()>& where) {
    if (!ok) fail(where());
  }
  void fail(const std::string& message) {
    if (failures_++ < 20) std::fprintf(stderr, "FAIL %s\n", message.c_str());
  }
  int64_t failures() const { return failures_; }

 private:
  int64_t failures_ = 0;
};

inline double unit(Dtype x) { return x == Dtype::f64 ? 0x1p-53 : 0x1p-24; }
inline double sum_error(Dtype x, int64_t columns) {
  return (columns / (x == Dtype::f64 ? 4 : 8) * 2 + 10) * unit(x);
}
inline double half_spacing(Dtype d, double v) { return spacing(d, v) / 2 * (1 + 1e-9); }

// v, which is off by up to `error`, as it is rounded; near a tie that may go either way.
inline void round_between(Dtype d, double& v, double& error) {
  const double low = round_to(d, v - error), high = round_to(d, v + error);
  v = round_to(d, v);
  error = std::max(high - v, v - low);
}

// The same of all activations of a call.
template <class Problem>
double activation_error(const Problem& p) {
  double more = 0;
  for (int64_t i = 0; quick_gates && size_of(p.s.types.x) == 2 && i < p.z.count(); ++i) {
    if (!std::isnan(p.z[i])) more = std::max(more, quick_error(p.z[i]));
  }
  return kActivationError + more;
}

inline void check_forward(ForwardProblem& p, Checker& check, const std::string& what) {
  const Shape& s = p.s;
  const double u = unit(s.types.x), of_gate = activation_error(p);
  for (int64_t m = 0; m < s.rows; ++m) {
    std::vector<double> h(s.n), act(s.n, 1);
    const int64_t w_row = s.weight_row(m) * s.n;
    double squares = 0;
    for (int64_t j = 0; j < s.n; ++j) {
      h[j] = p.x[place(s, m, j)];
      if (s.residual) {
        h[j] += p.residual[place(s, m, j)];  // exact here, or rounded to fp32 as the kernels do
        if (s.types.x != Dtype::f64) h[j] = static_cast<float>(h[j]);
        h[j] = round_to(s.types.x, h[j]);
        check.near(p.sum[m * s.n + j], h[j], 0, [&] { return what + ": sum, " + s.describe(); });
      }
      if (s.gate != Gate::none) act[j] = activation(p.z[place(s, m, j)], s.sigmoid).value;
      if (s.gate == Gate::first) h[j] *= act[j];
      if (j < s.k) squares += h[j] * h[j];
    }
    const double r = 1 / std::sqrt(squares / s.k + s.eps);
    const double h_error = s.gate == Gate::first ? (of_gate + 1) * u : 0;
    const double r_error = sum_error(s.types.x, s.k) / 2 + 4 * u + h_error;
    if (s.want_rstd) {
      check.near(p.rstd[m], r, r * r_error, [&] { return what + ": rstd, " + s.describe(); });
    }
    for (int64_t j = 0; j < s.n; ++j) {
      const double w = s.weight ? p.weight[w_row + j] + s.offset : 1;
      const double b = s.bias && s.weight ? p.bias[w_row + j] : 0;
      const double xr = h[j] * r;
      double xr_error = std::fabs(xr) * (r_error + h_error + u), v = xr;
      if (s.types.llama) round_between(s.types.x, v, xr_error);
      double want = v * w + b;
      double exact = xr_error * std::fabs(w) + 4 * u * (std::fabs(v * w) + std::fabs(b)) +
                     2 * u * std::fabs(v * s.offset);
      if (s.gate == Gate::last) {
        if (s.types.llama && s.types.w == s.types.x) round_between(s.types.x, want, exact);
        want *= act[j];
        exact = exact * std::fabs(act[j]) + std::fabs(want) * (of_gate + 1) * u;
      }
      const double bound = exact + half_spacing(s.types.y, std::fabs(want) + exact);
      check.near(p.y[m * s.n + j], want, bound, [&] {
        return what + ": y[" + std::to_string(m) + "," + std::to_string(j) + "], " + s.describe();
      });
    }
  }
  check.that(p.y.guards_whole() && p.sum.guards_whole() && p.rstd.guards_whole() && p.x.guards_whole(),
             [&] { return what + ": wrote outside, " + s.describe(); });
}

inline void check_backward(BackwardProblem& p, Checker& check, const std::string& what) {
  const Shape& s = p.s;
  const double u = unit(s.types.x), of_gate = activation_error(p);
  const int64_t columns = s.weight_rows * s.n;
  std::vector<double> dw(columns), dw_size(columns), dw_slack(columns), db(columns), db_size(columns);
  const double g_error = s.gate == Gate::last ? (of_gate + 1) * u : 0;
  const double v_error = s.gate == Gate::first ? (of_gate + 1) * u : 0;
  for (int64_t m = 0; m < s.rows; ++m) {
    const double r = p.rstd[m];
    const int64_t w_row = s.weight_row(m) * s.n;
    std::vector<Activation> act(s.n, {1, 0, 0});
    double dot = 0, dot_size = 0;
    for (int64_t j = 0; j < s.n; ++j) {
      const double w = s.weight ? p.weight[w_row + j] + s.offset : 1;
      double x = p.x[place(s, m, j)], g = p.dy[place(s, m, j)];
      if (s.gate != Gate::none) act[j] = activation(p.z[place(s, m, j)], s.sigmoid);
      (s.gate == Gate::first ? x : g) *= act[j].value;
      dot += g * w * x, dot_size += std::fabs(g * x) * (std::fabs(w) + (s.weight ? std::fabs(s.offset) : 0));
      double xr = x * r;
      if (s.types.llama) {
        double error = std::fabs(xr) * (u + v_error);
        round_between(s.types.x, xr, error);
        dw_slack[w_row + j] += std::fabs(g * error);
      }
      dw[w_row + j] += g * xr, dw_size[w_row + j] += std::fabs(g * xr);
      db[w_row + j] += g, db_size[w_row + j] += std::fabs(g);
    }
    const double dot_error = dot_size * (sum_error(s.types.x, s.n) + 3 * u + g_error + v_error);
    for (int64_t j = 0; s.dx && j < s.n; ++j) {
      const double w = s.weight ? p.weight[w_row + j] + s.offset : 1;
      const double x = p.x[place(s, m, j)], dy = p.dy[place(s, m, j)];
      const double a = act[j].value, v = s.gate == Gate::first ? x * a : x;
      const double g = (s.gate == Gate::last ? dy * a : dy) * w;
      const double extra = s.residual ? p.dsum[place(s, m, j)] : 0;
      const double xrr = j < s.k ? v * r * r / s.k : 0;
      double want = r * (g - xrr * dot) + extra;
      const double size =
          r * (std::fabs(g) * (1 + std::fabs(s.offset)) + std::fabs(xrr * dot)) + std::fabs(extra);
      double exact = (8 * u + g_error + v_error) * size + r * std::fabs(xrr) * dot_error;
      const auto compare = [&](const Array& got, const char* which, double value, double error) {
        check.near(got[m * s.n + j], value, error + half_spacing(s.types.x, std::fabs(value) + error), [&] {
          return what + ": " + which + "[" + std::to_string(m) + "," + std::to_string(j) + "], " +
                 s.describe();
        });
      };
      const double slope = act[j].slope, slope_error = (of_gate + 2) * u * act[j].slope_size;
      if (s.gate == Gate::last) {
        double norm = x * r, error = std::fabs(norm) * u;
        if (s.types.llama) round_between(s.types.x, norm, error);
        const double b = s.bias && s.weight ? p.bias[w_row + j] : 0;
        error = error * std::fabs(w) + 4 * u * (std::fabs(norm * w) + std::fabs(b)) +
                2 * u * std::fabs(norm * s.offset);
        norm = norm * w + b;
        if (s.types.llama && s.types.w == s.types.x) round_between(s.types.x, norm, error);
        compare(p.dz, "dz", dy * norm * slope,
                std::fabs(dy) * (error * std::fabs(slope) + std::fabs(norm) * (slope_error + 3 * u)));
      } else if (s.gate == Gate::first) {
        compare(p.dz, "dz", want * x * slope,
                std::fabs(x) * (exact * std::fabs(slope) + std::fabs(want) * (slope_error + 3 * u)));
        exact = exact * std::fabs(a) + std::fabs(want * a) * (of_gate + 2) * u;
        want *= a;
      }
      compare(p.dx, "dx", want, exact);
    }
  }
  // Columns are summed row by row: one rounding a row, two for the product.
  const double column_error = (s.rows + 4) * 2 * u + g_error + v_error;
  for (int64_t j = 0; j < columns; ++j) {
    const auto where = [&](const char* which) {
      return [&, which] { return what + ": " + which + "[" + std::to_string(j) + "], " + s.describe(); };
    };
    const double exact = dw_size[j] * column_error + dw_slack[j], exact_db = db_size[j] * column_error;
    if (s.dw)
      check.near(p.dw[j], dw[j], exact + half_spacing(s.types.w, std::fabs(dw[j]) + exact), where("dw"));
    if (s.db) {
      check.near(p.db[j], db[j], exact_db + half_spacing(s.types.w, std::fabs(db[j]) + exact_db),
                 where("db"));
    }
  }
  check.that(p.dx.guards_whole() && p.dz.guards_whole() && p.dw.guards_whole() && p.db.guards_whole() &&
                 p.workspace.guards_whole(),
             [&] { return what + ": wrote outside, " + s.describe(); });
}

}  // namespace fused_rmsnorm::test
