"""The kernels that are counted: those of the benchmark's grid (benchmarks/norms/cases.py), one row
shape each, since what a row costs does not depend on how many there are."""

import itertools
from dataclasses import dataclass, replace

from ptx.cases import Case

__all__ = ["GRID", "HELD", "Counted"]

_CORE = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)
_TRAINING = (1536, 6144, 7168)
_INFERENCE = (500, 3072, 3584)
_BF16 = Case(x="bf16", w="bf16", y="bf16")
_F16 = Case(x="f16", w="f16", y="f16")
_WIDE_WEIGHT = replace(_BF16, w="f32")


@dataclass(frozen=True)
class Counted:
    name: str
    direction: str
    case: Case


def _grid() -> list[Counted]:
    found = []

    def add(direction: str, what: str, case: Case) -> None:
        words = [direction, str(case.n), case.x, what]
        found.append(Counted(" ".join(w for w in words if w), direction, case))

    for direction in ("forward", "backward"):
        for n in sorted((*_CORE, *_TRAINING, *_INFERENCE)):
            add(direction, "", replace(_BF16, n=n))
        for n in (1024, 4096, 16384, 65536):
            add(direction, "", Case(n=n))
        for n in (4096, 16384):
            add(direction, "fp32 weight", replace(_WIDE_WEIGHT, n=n))
        for n in (1024, 4096, 16384):
            what = "add" if direction == "forward" else "dsum"
            add(direction, what, replace(_BF16, n=n, residual=True))
        add(direction, "", replace(_F16, n=4096))
        for n in (128, 1024, 4096, 16384):
            add(direction, "llama", replace(_BF16, n=n, llama=True))
        add(direction, f"llama {what}", replace(_BF16, n=4096, llama=True, residual=True))
        for n in (256, 4096):
            add(direction, "offset", replace(_BF16, n=n, offset=1.0))
        add(direction, "pRMSNorm k=256", replace(_BF16, n=4096, k=256))
        for n in (4096, 4097):
            add(direction, "llama to fp32", replace(_WIDE_WEIGHT, n=n, y="f32", llama=True))
        for n in (129, 229, 541, 4097):
            add(direction, "", replace(_BF16, n=n))
        add(direction, "fp32 weight", replace(_WIDE_WEIGHT, n=4097))
        add(direction, "offset", replace(_BF16, n=4097, offset=1.0))
        add(direction, what, replace(_BF16, n=4097, residual=True))
        add(direction, "x shifted by one", replace(_BF16, n=4096, x_shift=1))
        shifted = replace(_BF16, n=4096, x_shift=1, out_shift=1)
        add(direction, "x and output shifted by one", shifted)
        for n in (64, 72, 80, 96, 128, 192):
            add(direction, "", replace(_BF16, n=n))
        for n in (64, 72, 80, 96, 128, 192, 256, 512):
            add(direction, "heads of a packed QKV", replace(_BF16, n=n, inner=8, gap=16 * n))
    # A gate after the norm of heads (Qwen3-Next), before that of groups (Mamba 2); and without one
    # a weight per head, or a scale and shift per sample (AdaLN).
    for direction in ("forward", "backward"):
        for n, gate in itertools.product((128, 512, 4096), ("last", "first")):
            add(direction, f"gate {gate}", replace(_BF16, n=n, gate=gate))
        add(direction, "gate first", Case(n=4096, gate="first"))
        add(direction, "weight per head", replace(_BF16, n=128, weight_has_rows=True))
        db = direction == "backward"
        per_sample = replace(_BF16, n=1152, weight_has_rows=True, bias=not db, db=db, offset=1.0)
        add(direction, "weight and bias per sample", per_sample)
    add("forward", "bias", replace(_BF16, n=4096, bias=True))
    for n in (4096, 16384):
        add("backward", "db", replace(_BF16, n=n, db=True))
        add("backward", "dx only", replace(_BF16, n=n, dw=False))
    return found


GRID = _grid()
# Those whose counts a test holds in every run, on sm_90.
_HELD_BOTH_WAYS = (
    *("1024 bf16", "4096 bf16", "16384 bf16", "32768 bf16", "4096 f32", "4096 bf16 fp32 weight"),
    *("4097 bf16", "4096 bf16 x and output shifted by one", "4096 bf16 llama"),
    *("128 bf16", "128 bf16 heads of a packed QKV"),
    *("4096 bf16 gate first", "128 bf16 gate last", "128 bf16 weight per head"),
)
HELD = (
    *(f"{direction} {what}" for direction in ("forward", "backward") for what in _HELD_BOTH_WAYS),
    *("forward 4096 bf16 add", "backward 4096 bf16 dx only", "backward 4096 bf16 db"),
)
