"""Faults in csrc/cuda, for the emulator. A test: a section, a dtype and a share of its cases."""

from . import Layer
from . import Mutant as M

_ROWS = (
    M("forward_rows.cuh", "static_cast<T>(f.eps)", "T(0)", "eps is left out"),
    M(
        "forward_rows.cuh",
        "static_cast<T>(static_cast<int>(f.k))",
        "static_cast<T>(static_cast<int>(f.n))",
        "the mean of a part of the row is over the whole row",
    ),
    M("forward_rows.cuh", "c + j < k", "c + j <= k", "the statistic reads one column more"),
    M(
        "affine.cuh",
        "sizeof(X) < sizeof(T) && call.llama",
        "false",
        "Llama's rounding is left out",
    ),
    M(
        "affine.cuh",
        "multiply_add(out[j], scale[j], bias[j])",
        "out[j] * scale[j]",
        "the bias is left out",
    ),
    M(
        "forward_rows.cuh",
        "sum[j] += more[j]",
        "sum[j] -= more[j]",
        "the residual is subtracted",
    ),
    M(
        "affine.cuh",
        "scale[j] += static_cast<T>(offset)",
        "scale[j] += T(0)",
        "the weight's offset is left out",
    ),
    M("rounding.cuh", "1.0f / sqrtf(v)", "1.0f / sqrtf(v + 1e-6f)", "eps is added twice"),
    M(
        "backward_rows.cuh",
        "r * (r * dot / static_cast<T>(static_cast<int>(b.k)))",
        "r * (r * dot / static_cast<T>(static_cast<int>(b.n)))",
        "the mean of the dot product is over n, not k",
    ),
    M("backward_rows.cuh", "c + j < k", "true", "columns beyond k belong to the statistic"),
    M(
        "backward_rows.cuh",
        "out[j] += more[j]",
        "out[j] += T(0)",
        "the sum's gradient is left out",
    ),
    M(
        "backward_rows.cuh",
        "plain && !b.dsum.data",
        "plain",
        "the plain loop of dx, though the sum's gradient is to be added",
    ),
    M(
        "affine.cuh",
        "kHeld || (weight_ && offset_ == 0)",
        "kHeld || weight_",
        "the plain loop, though the weight has an offset",
    ),
    M(
        "forward_rows.cuh",
        "!f.bias && !f.llama",
        "!f.bias",
        "the plain loop, though Llama's rounding is wanted",
    ),
    M(
        "forward_rows.cuh",
        "threadIdx.x % kFlight == q",
        "threadIdx.x % kFlight == 0",
        "of rows in flight, one gets another's root",
    ),
    M(
        "access.cuh",
        "row + kStep * rows.outer_stride",
        "row + (kStep + 1) * rows.outer_stride",
        "of rows in flight, all but the first are found too far on",
    ),
    M(
        "vec.cuh",
        "high = __uint_as_float(pair & 0xffff0000u)",
        "high = __uint_as_float(pair & 0xffffffffu)",
        "the lower of two bf16 leaves its bits in the upper one",
    ),
    M(
        "reduce.cuh",
        "__shfl_xor_sync(0xffffffffu, v, offset, kLanes)",
        "__shfl_xor_sync(0xffffffffu, v, offset ^ 1, kLanes)",
        "lanes of a short row add others than their partners",
    ),
    M(
        "backward_rows.cuh",
        "out.v[j] += sums[i][j]",
        "out.v[j] = sums[i][j]",
        "a partial forgets what was put away before",
        ("long bf16 100",),
    ),
    M(
        "backward_rows.cuh",
        "fetch(m + distance, filled)",
        "fetch(m, filled)",
        "the row that is fetched is the one that is worked on",
    ),
    M(
        "backward_rows.cuh",
        "buffer + i * kColumns + c",
        "buffer + c",
        "rows side by side: the first one's sums count for all",
    ),
    M(
        "backward_rows.cuh",
        "__pipeline_wait_prior(kAhead)",
        "__pipeline_wait_prior(kAhead + 1)",
        "the wait for a row is one group short",
    ),
)
_ANY = (
    M("backward_any.cuh", "m += partials", "m += partials + 1", "two passes: rows are left out"),
    M("backward_any.cuh", "db.add(g)", "dw.add(g)", "two passes: dy goes to dw, not to db"),
    M(
        "forward_any.cuh",
        "f.rstd && threadIdx.x == 0",
        "f.rstd && threadIdx.x == 1024",
        "two passes: rstd is not written",
    ),
    M(
        "fold.cuh",
        "level_[i - 1][j] = 0",
        "level_[i - 1][j] *= 1",
        "a sum that was folded goes on",
    ),
    M("fold.cuh", "add_to(0, level_[i])", "add_to(0, level_[0])", "folded sums are not added up"),
)
_GENERAL_TESTS = ("general bf16 15", "general f32 15")
_GENERAL = (
    M(
        "general.cuh",
        "(turn * rows.inner + w) * share.inner + j",
        "(turn * rows.inner + w) * share.inner + j / 2",
        "some rows under a row of the weight are taken twice, others never",
        _GENERAL_TESTS,
    ),
    M(
        "general.cuh",
        "shared - quotient(rows, shared) * rows.inner",
        "shared * 0",
        "every row takes the weight's first",
        _GENERAL_TESTS,
    ),
    M(
        "general.cuh",
        "wide ? sizeof(Acc<X>) : sizeof(X)",
        "sizeof(X)",
        "rows of an fp32 weight are found as those of a half type",
        _GENERAL_TESTS,
    ),
    M("gate.cuh", "s + z * sc", "s - z * sc", "the slope of silu has a wrong sign", _GENERAL_TESTS),
    M("gate.cuh", "Activation{s, sc}", "Activation{z * s, sc}", "sigmoid is silu", _GENERAL_TESTS),
    M(
        "gate.cuh",
        "limited > half_exp::kMost ? half_exp::kMost : limited",
        "limited",
        "exp(-z) of a large z is garbage",
        ("gates f32",),
    ),
    M(
        "gate.cuh",
        "fabsf(z[j]) <= half_exp::kUsual",
        "fabsf(z[j]) <= 2 * half_exp::kUsual",
        "exp(-z) overflows in numbers that are taken for usual",
        ("gates f32",),
    ),
    M(
        "forward_general.cuh",
        "sizeof(X) < sizeof(T) && f_.llama && !wide()",
        "sizeof(X) < sizeof(T) && f_.llama",
        "before a gate, a row is rounded though its weight is wide",
        _GENERAL_TESTS,
    ),
    M(
        "backward_general.cuh",
        "b_.llama && !wide()",
        "false",
        "dz is of a row that was not rounded",
        _GENERAL_TESTS,
    ),
    M(
        "backward_general.cuh",
        "(item * 2 + which) * (V / 4) + piece",
        "(item * 2 + which) + piece",
        "the second half of a vector's activations is written over the first of the slopes",
        _GENERAL_TESTS,
    ),
    M(
        "backward_general.cuh",
        "kThreads < 128 && last < rows",
        "false",
        "sums are kept where another row's activations are still read",
        ("long f32 100",),
    ),
    M(
        "backward_general.cuh",
        "j += parts",
        "j += parts + 1",
        "two passes: rows are left out",
        _GENERAL_TESTS,
    ),
    M(
        "plan.h",
        "call.gate != Gate::none || call.weight_has_rows",
        "call.gate != Gate::none || call.weight_rows > 1",
        "one row of such a weight has other bits than several",
        ("general bf16 100",),
    ),
)
_REDUCE = (
    M(
        "reduce.cuh",
        "set + row * kWarps + i",
        "set + i",
        "rows side by side: the first one's sum is everybody's",
    ),
    M("reduce.cuh", "__syncthreads()", "(void)0", "no barrier before the warps' sums are read"),
    M(
        "reduce.cuh",
        "Cluster::peer(slots, threadIdx.x)[Cluster::rank()] = v",
        "Cluster::peer(slots, threadIdx.x)[0] = v",
        "blocks of a cluster write to one slot",
    ),
    M(
        "reduce.cuh",
        "threadIdx.x < static_cast<unsigned>(cluster_)",
        "threadIdx.x + 1 < static_cast<unsigned>(cluster_)",
        "the last block of a cluster hears nothing",
    ),
    M("reduce.cuh", "offset < kLanes", "offset < kLanes / 2", "half of a warp is summed"),
    M("finalize.cuh", "i += ways", "i += ways + 1", "partials are left out"),
    M(
        "finalize.cuh",
        "sums[i * kFinalizeColumns + column]",
        "sums[i * kFinalizeColumns]",
        "the first column's sums for all",
    ),
    M("finalize.cuh", "is_second ? second : first", "first", "db is written over dw"),
    M("finalize.cuh", "int64_t{place} * count * stride", "0", "db is dw"),
)
_ACCESS = (
    M("access.cuh", "shift & 8 ? w[i + 2] : w[i]", "w[i]", "a shift by half a piece is not done"),
    M("access.cuh", "shift % 4 * 8", "0u", "a shift within a word is not done"),
    M(
        "access.cuh",
        "rest * rows.inner_stride",
        "rest * rows.outer_stride",
        "the stride of the outer dimension for the inner one",
    ),
    M(
        "image.cuh",
        "c >= 0 && c < count",
        "c >= 0",
        "of a row in shared memory, what lies beyond its end belongs to it",
    ),
    M(
        "image.cuh",
        "end - begin - whole",
        "end - begin - whole - 1",
        "the last column of a row is not written",
    ),
    M("image.cuh", "e < head ? 0 : whole", "0", "columns after the last vector are not written"),
    M(
        "entry.cu",
        "offset == 0 ? -0.0 : offset",
        "offset",
        "a weight of -0 has another sign where the row is not aligned",
        ("bits bf16 30",),
    ),
    M(
        "rows.h",
        "r.inner == 1 || r.multiplier",
        "true",
        "rows that cannot be found are taken",
        ("errors bf16",),
    ),
    M("rows.h", "log - 1", "log", "the division of a row's number shifts one too far"),
)

CUDA = Layer(
    "cuda",
    "csrc/cuda",
    ("values bf16 6", "values f32 6", "bits f16 3", "special f32 50", "long bf16 100"),
    (*_ROWS, *_ANY, *_GENERAL, *_REDUCE, *_ACCESS),
)
