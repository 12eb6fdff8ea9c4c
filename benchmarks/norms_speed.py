"""Speed of the norms alone: every contender over a grid of (rows, N, dtype, threads, direction).

Two operations: the norm, and the residual add with the norm after it. LayerNorm has weight and
bias, as torch.nn.LayerNorm; every RMSNorm has a weight. Weights are in the input's dtype, without
which F.rms_norm leaves its faster path. Results are checked against the definition in fp64 before
anything is timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .copies import COPIES, copy_by
from .environment import cache_bytes, where_it_fits
from .harness import Contender, graphed, measure, threads, time_cuda, time_host
from .peers import present

__all__ = [
    "FULL_ADD",
    "FULL_SHAPES",
    "GPU_ADD",
    "GPU_SHAPES",
    "QUICK_ADD",
    "QUICK_COMPILED",
    "QUICK_SHAPES",
    "Case",
    "beyond_caches",
    "cases",
    "minimal_bytes",
    "time_case",
]

Kind = Literal["speed", "add"]  # the norm; the residual add and the norm
Direction = Literal["forward", "backward", "forward+backward"]
Norm = Callable[..., Any]  # (x, w, b) -> y; (x, residual, w, b) -> (y, sum)

EPS = 1e-6
P = 0.0625
# Bytes that a GPU moves in some 50 us: below, a launch costs as much, so calls are replayed from
# CUDA graphs, and the host's latency is shown apart.
GRAPHED_BELOW = 100 << 20

# rows, N. One row of an RNN step, in L1, in L2, the paper's GRU, memory, memory with odd N.
QUICK_SHAPES = ((1, 128), (32, 512), (80, 1000), (512, 1024), (4096, 4096), (4096, 4097))
QUICK_ADD = ((32, 512), (4096, 4096))
FULL_SHAPES = (
    *QUICK_SHAPES,
    *((1, 1023), (1, 1024), (1, 4096), (8, 4096), (64, 1024), (64, 1023), (80, 3000), (128, 2048)),
    *((8192, 128), (131072, 64), (65536, 128), (16384, 512), (16384, 1000), (16384, 1024)),
    *((8192, 2048), (2048, 8192), (1024, 16384), (128, 131072)),
)
FULL_ADD = ((1, 1024), (32, 512), (80, 1000), (512, 1024), (4096, 4096), (4096, 4097))
# Memory-bound rows of every launch plan, QK-norm, an odd N, and two that only latency decides.
GPU_SHAPES = (
    *((32768, n) for n in (256, 512, 1024, 2048, 4096, 8192, 16384)),
    *((16384, 32768), (8192, 65536), (4096, 131072), (2048, 262144)),
    *((1 << 20, 64), (27030 * 24, 128), (32768, 4097), (1, 4096), (99, 4096)),
)
GPU_ADD = ((32768, 1024), (32768, 4096), (16384, 32768), (32768, 4097), (99, 4096))
# Compilation takes about 10 s per shape and direction: the quick run compiles these only.
QUICK_COMPILED = ((32, 512), (4096, 4096))


def beyond_caches() -> tuple[tuple[int, int], ...]:
    """Even and odd rows whose fp32 input alone fills the last-level cache of this machine's CPU."""
    last = list(cache_bytes().values())[-1:]
    return tuple((-(-size // (4 * n)), n) for size in last for n in (4096, 4097))


@dataclass(frozen=True)
class Case:
    kind: Kind
    rows: int
    n: int
    dtype: torch.dtype
    direction: Direction
    threads: int
    compiled: bool  # also time torch.compile

    @property
    def key(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kind}/{self.threads}t/{dtype}/{self.rows}x{self.n}/{self.direction}"


def cases(
    kind: Kind,
    shapes: Sequence[tuple[int, int]],
    dtypes: Sequence[torch.dtype],
    threads: Sequence[int],
    directions: Sequence[Direction],
    compiled: Sequence[tuple[int, int]],
) -> Iterator[Case]:
    for t, dtype, (rows, n), direction in itertools.product(threads, dtypes, shapes, directions):
        yield Case(kind, rows, n, dtype, direction, t, (rows, n) in compiled)


def minimal_bytes(kind: Kind, rows: int, n: int, size: int, direction: Direction) -> int:
    """What must cross the memory bus once, for x, weight and gradients of ``size`` bytes each."""
    row_sets = (4, 4) if kind == "add" else (2, 3)  # x, residual, sum, y; sum, dy, d(sum), dx
    forward = row_sets[0] * rows * n * size + n * size
    backward = row_sets[1] * rows * n * size + 4 * rows + 2 * n * size
    both = forward + 4 * rows + backward
    return {"forward": forward, "backward": backward, "forward+backward": both}[direction]


def norms(n: int, compiled: bool) -> dict[str, Norm]:
    """name -> f(x, weight, bias)."""
    import fused_rmsnorm.functional as ours

    found: dict[str, Norm] = {
        "rms_norm": lambda x, w, b: ours.rms_norm(x, n, w, EPS),
        "prms_norm": lambda x, w, b: ours.rms_norm(x, n, w, EPS, p=P),
        "torch_layer_norm": lambda x, w, b: F.layer_norm(x, (n,), w, b, EPS),
        "torch_rms_norm": lambda x, w, b: F.rms_norm(x, (n,), w, EPS),
    }
    if compiled:
        torch.compiler.reset()  # each case is compiled for its own shape
        call = torch.compile(lambda x, w: F.rms_norm(x, (n,), w, EPS), dynamic=False)
        found["compiled_rms_norm"] = lambda x, w, b: call(x, w)
    return found


def add_norms(n: int, compiled: bool) -> dict[str, Norm]:
    """name -> f(x, residual, weight, bias): ours in one pass, and each norm after an add."""
    import fused_rmsnorm.functional as ours

    def after_add(norm: Norm) -> Norm:
        def two_steps(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            s = x + r
            return norm(s, w, b), s

        return two_steps

    single = norms(n, False)
    found: dict[str, Norm] = {
        "add_rms_norm": lambda x, r, w, b: ours.add_rms_norm(x, r, n, w, EPS),
        **{k: after_add(single[k]) for k in ("rms_norm", "torch_layer_norm", "torch_rms_norm")},
    }
    if compiled:
        torch.compiler.reset()
        found["compiled_rms_norm"] = torch.compile(found["torch_rms_norm"], dynamic=False)
    return found


class Inputs(NamedTuple):
    """Of one call: its arguments (bias last) and the gradients of what it returns."""

    args: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]


def _outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _definition(*args: Tensor, k: int) -> tuple[Tensor, ...]:
    """In fp64; a sum of two inputs has the value that their dtype (the weight's) can hold."""
    x, *others, w, _ = args
    for residual in others:
        x = x + residual.double()
        x = x + (x.to(w.dtype).double() - x).detach()
    y = x * torch.rsqrt(x[:, :k].square().mean(-1, keepdim=True) + EPS) * w.double()
    return (y, x) if others else (y,)


def _errors(found: dict[str, Norm], data: Inputs) -> dict[str, float]:
    """Largest error of y and dx over the largest value, against fp64; raises if ours is wrong.

    Ours may be off by what F.rms_norm is off, and an ulp. Neither LayerNorm, another function, nor
    the compiled one, which would be compiled for these few rows too, is looked at.
    """
    *inputs, w, b = data.args
    x = inputs[0]
    n = x.size(-1)
    errors = {}
    for name, norm in found.items():
        if name in ("torch_layer_norm", "compiled_rms_norm"):
            continue
        k = -(-n // 16) if name == "prms_norm" else n
        others = [t[:64].detach() for t in inputs[1:]]
        results = []
        for f, dtype in ((norm, x.dtype), (lambda *args: _definition(*args, k=k), torch.double)):  # noqa: B023
            leaf = x[:64].detach().to(dtype, copy=True).requires_grad_()
            outs = _outputs(f(leaf, *others, w, b))
            grads = [g[:64].to(y.dtype) for g, y in zip(data.grads, outs, strict=True)]
            (dx,) = torch.autograd.grad(outs, leaf, grads)
            results.append((outs[0].detach().double(), dx.double()))
        pairs = zip(*results, strict=True)
        errors[name] = max(((a - e).abs().max() / e.abs().max()).item() for a, e in pairs)
    bound = 2 * errors["torch_rms_norm"] + torch.finfo(x.dtype).eps
    slack = {"rms_norm": 1, "add_rms_norm": 1, "prms_norm": 4}
    if not all(e <= slack[k] * bound for k, e in errors.items() if k in slack):
        raise RuntimeError(f"wrong result at {list(x.shape)} {x.dtype}: errors {errors}")
    return errors


def _add_peers(found: dict[str, Norm], direction: Direction, data: Inputs) -> dict[str, str]:
    """Adds the other projects' kernels that work on this case; the others' errors by name."""
    failed = {}
    for name, (peer, norm) in present().items():
        if direction != "forward" and not peer.backward:
            continue
        x, w, _ = data.args
        try:
            y = norm(x, w)
            if peer.backward:
                torch.autograd.grad(y, (x, w), data.grads)
        except Exception as error:  # whatever a peer raises: it is shown, not hidden
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            found[name] = lambda x, w, b, norm=norm: norm(x, w)  # type: ignore[misc]
    return failed


def _contender(name: str, norm: Norm, direction: Direction, data: Sequence[Inputs]) -> Contender:
    """LayerNorm's bias is differentiated, the others have none."""

    def leaves(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args if name == "torch_layer_norm" else args[:-1]

    def forward(d: Inputs) -> Any:
        with torch.no_grad():
            return norm(*d.args)

    def both(d: Inputs) -> tuple[Tensor, ...]:
        return torch.autograd.grad(_outputs(norm(*d.args)), leaves(d.args), d.grads)

    def backward(graph: Any) -> tuple[Tensor, ...]:
        y, leaves, grads = graph
        return torch.autograd.grad(y, leaves, grads, retain_graph=True)

    if direction == "backward":
        graphs = [(_outputs(norm(*d.args)), leaves(d.args), d.grads) for d in data]
        return Contender(name, backward, graphs)
    return Contender(name, forward if direction == "forward" else both, data)


def _copies(sources: Sequence[Tensor]) -> Iterator[Contender]:
    """torch.clone and, on a CPU, memcpy and (from 1 MiB) non-temporal stores."""
    yield Contender("clone", torch.clone, sources)
    if sources[0].device.type != "cpu":
        return
    to = torch.zeros_like(sources[0])
    for name in COPIES:
        copy = copy_by(name)
        if copy and (name == "memcpy" or to.nbytes >= 1 << 20):
            yield Contender(name, copy, [(to, source) for source in sources])


def time_case(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    """One entry of the results: sizes, minimal bytes, errors and a Timing per contender."""
    with threads(case.threads):
        return _time_case(case, device, seconds)


def _sets(tensor_bytes: int, device: torch.device) -> int:
    """How many inputs take turns: small ones stay where they are meant to be, in L1 or L2.

    On a GPU they rotate past its L2; what no cache holds need not rotate.
    """
    if device.type == "cuda" and tensor_bytes > 1 << 22:
        return max(2, -(-(128 << 20) // tensor_bytes))
    if where_it_fits(2 * tensor_bytes, 1) == "memory":
        return 1
    return 4 if tensor_bytes < 1 << 20 else 2


def _time_case(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    rows, n = case.rows, case.n
    size = torch.finfo(case.dtype).bits // 8
    random = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=random).to(case.dtype)

    sets = _sets(rows * n * size, device)
    weight, bias = ((1 + 0.1 * randn(n)).to(case.dtype).requires_grad_(), randn(n).requires_grad_())
    each = 2 if case.kind == "add" else 1  # x and residual; y and their sum

    def inputs() -> Inputs:
        leaves = [randn(rows, n).requires_grad_() for _ in range(each)]
        return Inputs((*leaves, weight, bias), tuple(randn(rows, n) for _ in range(each)))

    data = [inputs() for _ in range(sets)]
    found = (add_norms if case.kind == "add" else norms)(n, case.compiled)
    peers = device.type == "cuda" and case.kind == "speed"
    failed = _add_peers(found, case.direction, data[0]) if peers else {}
    errors = _errors({k: f for k, f in found.items() if k != "flashinfer"}, data[0])
    contenders = [_contender(name, f, case.direction, data) for name, f in found.items()]
    contenders += _copies([d.args[0].detach() for d in data])
    timer = time_cuda if device.type == "cuda" else time_host
    bytes_ = minimal_bytes(case.kind, rows, n, size, case.direction)
    not_graphed: dict[str, str] = {}
    if device.type == "cuda" and bytes_ < GRAPHED_BELOW:
        contenders, not_graphed = graphed(contenders)
    # Tensors that the calls of one contender touch: inputs that take turns, outputs in one place.
    touched = {
        "forward": sets * each + each,
        "backward": sets * (1 + each) + 1,
        "forward+backward": sets * 2 * each + each + 1,
    }[case.direction]
    return {
        "rows": rows,
        "n": n,
        "dtype": str(case.dtype).removeprefix("torch."),
        "direction": case.direction,
        "threads": case.threads,
        "bytes": bytes_,
        "copy_bytes": 2 * rows * n * size,
        "fits": where_it_fits(touched * rows * n * size, case.threads, device.type),
        "errors": errors,
        "failed": failed,
        "not_graphed": not_graphed,
        "times": measure(contenders, seconds=seconds, timer=timer),
    }
