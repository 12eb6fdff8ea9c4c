"""Faults in csrc/cpu: the kernels, and how their work is cut."""

from . import Layer
from . import Mutant as M

_FORWARD = (
    M("forward.h", "sums / k + eps", "sums / k", "eps is left out"),
    M(
        "forward.h",
        "splat(static_cast<T>(f.k))",
        "splat(static_cast<T>(f.n))",
        "the mean of a part of the row is over the whole row",
    ),
    M("forward.h", "w + Pack<T>{offset, offset}", "w", "the weight's offset is left out"),
    M("forward.h", "fma(v, w, load<X>(bias + i, lanes))", "v * w", "the bias is left out"),
    M(
        "forward.h",
        "load<X>(x + i, lanes) + load<X>(other + i, lanes)",
        "load<X>(x + i, lanes) - load<X>(other + i, lanes)",
        "the residual is subtracted",
    ),
    M(
        "forward.h",
        "kGate == Gate::none ? Types::kLlama : in.gate.llama",
        "false",
        "Llama's rounding is left out",
    ),
    M(
        "forward.h",
        "out[m + i] = rstd_[i]",
        "out[m] = rstd_[i]",
        "rstd of a block in its first row",
    ),
    M(
        "forward.h",
        "static_cast<Y*>(f_.y) + m * f_.n",
        "static_cast<Y*>(f_.y) + m * f_.k",
        "rows of y lie k apart",
    ),
)
_BACKWARD = (
    M(
        "backward.h",
        "r * (r * sums[i] / static_cast<T>(b_.k))",
        "r * (r * sums[i] / static_cast<T>(b_.n))",
        "the mean of the dot product is over n, not k",
    ),
    M("backward.h", "fma(v, minus_c, g)", "g", "dx without what goes through rstd"),
    M(
        "backward.h",
        "choose_first<X>(k - i, t, g)",
        "t",
        "columns beyond k belong to the statistic",
    ),
    M(
        "backward.h",
        "fma(g, r, load<X>(dsum + i, lanes))",
        "g * r",
        "the sum's gradient is left out",
    ),
    M(
        "backward.h",
        "fma(g, round_to<X>(v * r), before)",
        "fma(product, r, before)",
        "dw under Llama's rounding sees what was not rounded",
    ),
    M("backward.h", "fill(db, size, -T{0})", "fill(db, size, T{0})", "db of -0 is +0"),
    M(
        "backward.h",
        "fill(dw, size, T{0})",
        "fill(dw, size / 2, T{0})",
        "half of a partial of dw begins with what lay there",
    ),
    M("backward.h", "count - half", "count - half - 1", "the last partial is not added"),
    M("backward.h", "begin - begin % width", "begin", "columns are merged from within a pack"),
    M(
        "backward.h",
        "run % turns * b.weight_rows + run / turns",
        "run",
        "runs of rows under another row of the weight",
    ),
)
_SWEEP = (
    M(
        "sweep.h",
        "i / call.weight_share % call.weight_rows",
        "i % call.weight_rows",
        "rows that share a row of the weight are not neighbours",
    ),
    M(
        "sweep.h",
        "(i % rows.inner) * rows.inner_stride",
        "(i % rows.inner) * rows.outer_stride",
        "the stride of the outer dimension for the inner one",
    ),
    M("sweep.h", "i != fold_at || i == stat_n", "true", "sums are never folded", ("long_rows",)),
    M(
        "short_rows.h",
        "f.n == 64 && f.k == 64",
        "f.n == 64",
        "short rows have the statistic of whole ones",
    ),
    M(
        "short_rows.h",
        "splat(r[i])",
        "splat(r[0])",
        "short rows of a block are written with the first one's rstd",
    ),
    M(
        "short_rows.h",
        "write(rstd[now], count)",
        "write(rstd[now ^ 1], count)",
        "short rows are written with the rstd of the next block",
    ),
    M(
        "short_rows.h",
        "f.weight_rows == 1",
        "true",
        "short rows share the first row of the weight",
    ),
    M("short_rows.h", "at += turn_", "at += 0", "short rows: the stride of the outer dimension"),
    M(
        "short_rows.h",
        "w + Pack<T>{offset, offset}",
        "w",
        "short rows: the weight's offset is left out",
    ),
    M(
        "pairwise.h",
        "levels_[level] + v",
        "v",
        "a block's sum is dropped when folded",
        ("long_rows",),
    ),
    M(
        "stager.h",
        "(kLine - fill_) / static_cast<int>(sizeof(E))",
        "kLine / static_cast<int>(sizeof(E))",
        "a line begun is taken for an empty one",
    ),
    M("stager.h", "fill_ > lead_", "fill_ > kLine", "the last line is not written"),
)
_SIMD = (
    M(
        "simd_avx512.h",
        "_mm512_andnot_si512(high, _mm512_set1_epi16(1))",
        "_mm512_setzero_si512()",
        "bf16: ties are rounded up, not to even",
    ),
    M(
        "simd_avx512.h",
        "_mm512_add_epi16(high, high)",
        "high",
        "bf16: a NaN of all ones becomes a zero",
    ),
    M(
        "simd_avx512.h",
        "pairs(quarters(0), quarters(1))",
        "pairs(quarters(1), quarters(0))",
        "sums of several rows: one gets another's",
    ),
    M(
        "simd_avx2.h",
        "_mm256_add_ps(_mm256_shuffle_ps(p, q, 0x44), _mm256_shuffle_ps(p, q, 0xee))",
        "_mm256_add_ps(_mm256_shuffle_ps(p, q, 0x88), _mm256_shuffle_ps(p, q, 0xdd))",
        "sums of several rows: lanes meet in another order than in one row's",
    ),
    M("simd_avx2.h", "_mm256_fmadd_ps(x, y, z)", "_mm256_fmadd_ps(x, y, x)", "fma adds a factor"),
    M(
        "simd_avx512.h",
        "_mm512_mask_storeu_epi16(p, first(count), (__m512i)v)",
        "_mm512_mask_storeu_epi16(p, first(count - 1), (__m512i)v)",
        "the last element of a row is not written",
    ),
    M("simd_baseline.h", "x * y + z", "x * y - z", "fma subtracts, where it is not fused"),
)
_GATE = (
    M("gate.h", "s + z * sc", "s - z * sc", "the slope of silu has a wrong sign", ("gates 1021",)),
    M("gate.h", "sigmoid ? s : z * s", "z * s", "sigmoid is silu", ("gates 1021",)),
    M(
        "gate.h",
        "splat(half_exp::kMost)",
        "splat(half_exp::kMost + 10)",
        "exp(-z) of a large z is garbage",
        ("gates 1021",),
    ),
    M(
        "gate.h",
        "splat(half_exp::kLn2Low)",
        "splat(half_exp::kLn2Low * 1.0001f)",
        "the second part of ln 2 lacks its last digits",
        ("gates 1021",),
    ),
    M("gate.h", "m & (ring_ - 1)", "m & 0", "rows stash into one place"),
)
_CUTS = (
    M(
        "dispatch.cpp",
        "std::max<int64_t>(1, ceil_div(units, count))",
        "std::max<int64_t>(1, units / count)",
        "more chunks than were asked for",
    ),
    M(
        "dispatch.cpp",
        "units_per_chunk * unit",
        "units_per_chunk * unit + 1",
        "chunks are cut within a turn of the weight's rows",
    ),
)

CPU = Layer(
    "cpu",
    "csrc/cpu",
    ("cpu_kernels", "gates 1021"),
    (*_FORWARD, *_BACKWARD, *_SWEEP, *_SIMD, *_GATE, *_CUTS),
)
