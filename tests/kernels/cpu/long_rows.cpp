// Rows of up to 2^31 elements and sums over many rows: the error of r, dx and dw relative to fp64 does
// not grow with them. A row of 2^31 fp32 numbers takes 1 MiB here: one file is mapped over and over, one
// mapping behind the other, so that the row repeats itself. So does what the kernels write, which is
// right if every period of it is: the last one is looked at.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <vector>

#include "../../../csrc/cpu/kernels.h"
#include "../problem.h"
#include "here.h"

using namespace fused_rmsnorm;
using namespace fused_rmsnorm::test;

namespace {

constexpr int64_t kPeriod = int64_t{1} << 18;  // Linux has 65530 mappings for a process

// n numbers in memory that repeat after kPeriod (or, if n is less, do not).
class Repeated {
 public:
  Repeated(Dtype dtype, int64_t n) : period_(dtype, std::min(n, kPeriod)), bytes_(n * size_of(dtype)) {
    const int64_t piece = period_.bytes();
    const int file = memfd_create("row", 0);
    void* const whole = mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (file < 0 || whole == MAP_FAILED || ftruncate(file, piece) != 0) std::abort();
    data_ = static_cast<char*>(whole);
    for (int64_t at = 0; at < bytes_; at += piece) {
      const int access = PROT_READ | PROT_WRITE;
      if (mmap(data_ + at, piece, access, MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED) std::abort();
    }
    close(file);
  }
  Repeated(const Repeated&) = delete;
  ~Repeated() { munmap(data_, bytes_); }

  char* data() const { return data_; }
  Rows row() const { return {data_, 1, bytes_ / size_of(period_.dtype()), 0}; }
  // The first period, and back into memory.
  Array& period() { return period_; }
  void write() { std::memcpy(data_, period_.data(), period_.bytes()); }
  const Array& read() {
    std::memcpy(period_.data(), data_, period_.bytes());
    return period_;
  }

 private:
  Array period_;
  int64_t bytes_;
  char* data_;
};

// What a row of n is tried with: noise, the same number everywhere, and ones under a few large ones.
void fill_row(Array& a, int kind, Random& random) {
  for (int64_t i = 0; i < a.count(); ++i) {
    a.set(i, kind == 0 ? random.uniform(-3, 3) : kind == 1 ? 0.7 : random.chance(1) ? 100 : 1);
  }
}

void long_row(Checker& check, const cpu::Kernels& kernels, Dtype dtype, int64_t n, int kind) {
  Random random(5);
  const auto where = [&](const char* what) {
    return [&, what] {
      return std::string(kernels.name) + " " + what + ", " + name(dtype) + " n " + std::to_string(n) +
             " kind " + std::to_string(kind);
    };
  };
  Repeated x(dtype, n), dy(dtype, n), weight(dtype, n), out(dtype, n);
  fill_row(x.period(), kind, random), x.write();
  for (int64_t i = 0; i < weight.period().count(); ++i) {
    weight.period().set(i, random.uniform(0.5, 1.5));
    dy.period().set(i, x.period()[i] + random.uniform(-1, 1));
  }
  weight.write(), dy.write();
  const double u = unit(dtype), periods = static_cast<double>(n) / x.period().count();
  long double squares = 0, dot = 0;
  for (int64_t i = 0; i < x.period().count(); ++i) {
    const long double v = x.period()[i];
    squares += v * v, dot += v * dy.period()[i] * weight.period()[i];
  }
  squares *= periods, dot *= periods;

  Array rstd(compute_type(dtype), 1);
  Forward f;
  f.rows = 1, f.n = f.k = n, f.eps = 1e-6, f.x_dtype = f.w_dtype = f.y_dtype = dtype;
  f.x = x.row(), f.weight = weight.data(), f.y = out.data(), f.rstd = rstd.data();
  kernels.forward(f, 0, 1, false);
  const double r = static_cast<double>(1 / std::sqrt(squares / n + 1e-6L));
  // A block of 4096 columns has at most 256 additions per lane, of two roundings each where there is no
  // fma. In a row of one number they may all go the same way; in noise a few are left.
  const double few = kind == 1 ? 128 * u : 12 * u;
  check.near(rstd[0], r, r * few, where("rstd"));
  const Array& y = out.read();
  for (int64_t i = 0; i < y.count(); ++i) {
    const double want = x.period()[i] * r * weight.period()[i], exact = std::fabs(want) * (few + 2 * u);
    check.near(y[i], want, exact + half_spacing(dtype, std::fabs(want) + exact), where("y"));
  }

  Backward b;
  b.rows = 1, b.n = b.k = n, b.x_dtype = b.w_dtype = b.dy_dtype = dtype;
  b.dy = dy.row(), b.x = x.row(), b.weight = weight.data(), b.rstd = rstd.data(), b.dx = out.data();
  kernels.backward(b, cpu::plan(b), 0, 1, false);
  const double c = static_cast<double>(rstd[0] * rstd[0] * dot / n);
  const Array& dx = out.read();
  for (int64_t i = 0; i < dx.count(); ++i) {
    const double g = dy.period()[i] * weight.period()[i], pull = x.period()[i] * c;
    const double want = rstd[0] * (g - pull);
    const double exact = rstd[0] * (8 * u * (std::fabs(g) + std::fabs(pull)) + 2 * few * std::fabs(pull));
    check.near(dx[i], want, exact + half_spacing(dtype, std::fabs(want) + exact), where("dx"));
  }
}

// dw and db of many short rows. All terms are positive, so that nothing cancels.
void many_rows(Checker& check, const cpu::Kernels& kernels, Dtype dtype, int64_t rows) {
  Random random(6);
  Shape s;
  s.types = {dtype, dtype == Dtype::f64 ? dtype : Dtype::f32, dtype, false};
  s.rows = rows, s.n = s.k = 2, s.dx = false, s.db = true;
  BackwardProblem p(s, random);
  random.fill(p.x, 0.2, 0.3), random.fill(p.dy, 0.6, 0.7), random.fill(p.rstd, 1, 1.1);
  const Backward b = p.args();
  const cpu::Chunks chunks = cpu::plan(b);
  kernels.backward(b, chunks, 0, chunks.count, false);
  kernels.merge(b, chunks, 0, b.n);
  for (int64_t j = 0; j < s.n; ++j) {
    long double dw = 0, db = 0;
    for (int64_t i = 0; i < rows; ++i) {
      dw += static_cast<long double>(p.dy[i * s.n + j]) * p.x[i * s.n + j] * p.rstd[i];
      db += p.dy[i * s.n + j];
    }
    const double few = 24 * unit(dtype);
    const auto where = [&](const char* what) {
      return [&, what] {
        return std::string(kernels.name) + " " + what + ", " + name(dtype) + " rows " + std::to_string(rows);
      };
    };
    check.near(p.dw[j], static_cast<double>(dw), static_cast<double>(dw) * few, where("dw"));
    check.near(p.db[j], static_cast<double>(db), static_cast<double>(db) * few, where("db"));
  }
}

}  // namespace

int main() {
  Checker check;
  const auto all = kernels_here();
  for (const cpu::Kernels* kernels : all) {
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16, Dtype::f64}) {
      for (const int kind : {0, 1, 2}) {
        // Around a fold, and with one, two and many blocks.
        for (const int64_t n : {4095, 4096, 4097, 8192, 12300, 1 << 18, 1 << 24}) {
          long_row(check, *kernels, dtype, n, kind);
        }
      }
      for (const int64_t rows : {1000, 131073, 500003}) many_rows(check, *kernels, dtype, rows);
    }
  }
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16}) {  // by the best kernels here
    long_row(check, *all.back(), dtype, int64_t{1} << 31, 0);
  }
  std::printf("failures: %lld\n", static_cast<long long>(check.failures()));
  return check.failures() ? 1 : 0;
}
