"""Speed of the norms alone: every contender over a grid of (rows, N, dtype, threads, direction).

LayerNorm has weight and bias, as torch.nn.LayerNorm; every RMSNorm has a weight. Weights are in the
input's dtype, without which F.rms_norm leaves its faster path. Results are checked against the
definition in fp64 before anything is timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .copies import nt_clone
from .harness import Contender, Timing, graphed, measure, time_cuda, time_host
from .peers import present

__all__ = [
    "FULL_SHAPES",
    "GPU_SHAPES",
    "QUICK_SHAPES",
    "Case",
    "cases",
    "minimal_bytes",
    "time_case",
]

Direction = Literal["forward", "backward", "forward+backward"]
Norm = Callable[[Tensor, Tensor, Tensor], Tensor]

EPS = 1e-6
P = 0.0625
# Bytes that a GPU moves in some 50 us: below, a launch costs as much, so calls are replayed from
# CUDA graphs, and the host's latency is shown apart.
GRAPHED_BELOW = 100 << 20

# rows, N. One row of an RNN step, in L1, in L2, the paper's GRU, memory, memory with odd N.
QUICK_SHAPES = ((1, 128), (32, 512), (80, 1000), (512, 1024), (4096, 4096), (4096, 4097))
FULL_SHAPES = (
    *QUICK_SHAPES,
    *((1, 1024), (1, 4096), (8, 4096), (64, 1024), (64, 1023), (80, 3000), (128, 2048)),
    *((8192, 128), (131072, 64), (65536, 128), (16384, 512), (16384, 1000), (16384, 1024)),
    *((8192, 2048), (2048, 8192), (1024, 16384), (128, 131072)),
)
# Memory-bound rows of every launch plan, QK-norm, an odd N, and two that only latency decides.
GPU_SHAPES = (
    *((32768, n) for n in (256, 512, 1024, 2048, 4096, 8192, 16384)),
    *((16384, 32768), (8192, 65536), (4096, 131072), (2048, 262144)),
    *((1 << 20, 64), (27030 * 24, 128), (32768, 4097), (1, 4096), (99, 4096)),
)
# Compilation takes about 10 s per shape and direction: the quick run compiles these only.
QUICK_COMPILED = ((32, 512), (4096, 4096))


@dataclass(frozen=True)
class Case:
    rows: int
    n: int
    dtype: torch.dtype
    direction: Direction
    threads: int
    compiled: bool  # also time torch.compile(F.rms_norm)

    @property
    def key(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"speed/{self.threads}t/{dtype}/{self.rows}x{self.n}/{self.direction}"


def cases(
    shapes: Sequence[tuple[int, int]],
    dtypes: Sequence[torch.dtype],
    threads: Sequence[int],
    directions: Sequence[Direction],
    compiled: Sequence[tuple[int, int]],
) -> Iterator[Case]:
    for t, dtype, (rows, n), direction in itertools.product(threads, dtypes, shapes, directions):
        yield Case(rows, n, dtype, direction, t, (rows, n) in compiled)


def minimal_bytes(rows: int, n: int, size: int, direction: Direction) -> int:
    """What must cross the memory bus once, for x, weight and gradients of ``size`` bytes each."""
    forward = 2 * rows * n * size + n * size
    backward = 3 * rows * n * size + 4 * rows + 2 * n * size
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


def _definition(x: Tensor, w: Tensor, k: int) -> Tensor:
    x, w = x.double(), w.double()
    return x * torch.rsqrt(x[:, :k].square().mean(-1, keepdim=True) + EPS) * w


def _errors(
    found: dict[str, Norm], x: Tensor, w: Tensor, b: Tensor, dy: Tensor
) -> dict[str, float]:
    """Largest error of y and dx over the largest value, against fp64; raises if ours is wrong.

    Ours may be off by what F.rms_norm is off, and an ulp.
    """
    n = x.size(-1)
    errors = {}
    for name, norm in found.items():
        if name == "torch_layer_norm":
            continue
        k = -(-n // 16) if name == "prms_norm" else n
        xs = x[:64].detach()
        results = []
        for f in (lambda x: norm(x, w, b), lambda x: _definition(x, w, k)):  # noqa: B023
            leaf = xs.clone().requires_grad_()
            y = f(leaf)
            (dx,) = torch.autograd.grad(y, leaf, dy[:64].to(y.dtype))
            results.append((y.detach().double(), dx.double()))
        pairs = zip(*results, strict=True)
        errors[name] = max(((a - e).abs().max() / e.abs().max()).item() for a, e in pairs)
    bound = 2 * errors["torch_rms_norm"] + torch.finfo(x.dtype).eps
    if not errors["rms_norm"] <= bound or not errors["prms_norm"] <= 4 * bound:
        raise RuntimeError(f"wrong result at {list(x.shape)} {x.dtype}: errors {errors}")
    return errors


def _add_peers(
    found: dict[str, Norm], direction: Direction, data: Sequence[Tensor]
) -> dict[str, str]:
    """Adds the other projects' kernels that work on this case; the others' errors by name."""
    failed = {}
    for name, (peer, norm) in present().items():
        if direction != "forward" and not peer.backward:
            continue
        x, w, _, dy = data
        try:
            y = norm(x, w)
            if peer.backward:
                torch.autograd.grad(y, (x, w), dy)
        except Exception as error:  # whatever a peer raises: it is shown, not hidden
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            found[name] = lambda x, w, b, norm=norm: norm(x, w)  # type: ignore[misc]
    return failed


def _contender(name: str, norm: Norm, direction: Direction, data: Sequence[Any]) -> Contender:
    """``data``: per input x, w, b, dy. LayerNorm's bias is differentiated, the others have none."""

    def leaves(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return (x, w, b) if name == "torch_layer_norm" else (x, w)

    def forward(d: Any) -> Tensor:
        with torch.no_grad():
            return norm(*d[:3])

    def both(d: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(norm(*d[:3]), leaves(*d[:3]), d[3])

    def backward(d: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(d[0], d[1], d[2], retain_graph=True)

    if direction == "backward":
        graphs = [(norm(*d[:3]), leaves(*d[:3]), d[3]) for d in data]
        return Contender(name, backward, graphs)
    return Contender(name, forward if direction == "forward" else both, data)


def time_case(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    """One entry of the results: sizes, minimal bytes, errors and a Timing per contender."""
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        return _time_case(case, device, seconds)
    finally:
        torch.set_num_threads(threads)


def _time_case(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    rows, n = case.rows, case.n
    size = torch.finfo(case.dtype).bits // 8
    tensor_bytes = rows * n * size
    random = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=random).to(case.dtype)

    # Small cases stay where they are meant to be (L1, L2); on a GPU inputs rotate past its L2.
    sets = 4 if tensor_bytes < 1 << 20 else 2
    if device.type == "cuda" and tensor_bytes > 1 << 22:
        sets = max(2, -(-(128 << 20) // tensor_bytes))
    weight, bias = ((1 + 0.1 * randn(n)).to(case.dtype).requires_grad_(), randn(n).requires_grad_())
    data = [(randn(rows, n).requires_grad_(), weight, bias, randn(rows, n)) for _ in range(sets)]
    found = norms(n, case.compiled)
    failed = _add_peers(found, case.direction, data[0]) if device.type == "cuda" else {}
    errors = _errors({k: f for k, f in found.items() if k != "flashinfer"}, *data[0])
    contenders = [_contender(name, f, case.direction, data) for name, f in found.items()]
    plain = [d[0].detach() for d in data]
    contenders.append(Contender("clone", torch.clone, plain))
    stream = nt_clone()
    if device.type == "cpu" and stream and tensor_bytes >= 1 << 20:
        contenders.append(Contender("nt_copy", stream, plain))
    timer = time_cuda if device.type == "cuda" else time_host
    bytes_ = minimal_bytes(rows, n, size, case.direction)
    not_graphed: dict[str, str] = {}
    if device.type == "cuda" and bytes_ < GRAPHED_BELOW:
        contenders, not_graphed = graphed(contenders)
    times = measure(contenders, seconds=seconds, timer=timer)
    return {
        "rows": rows,
        "n": n,
        "dtype": str(case.dtype).removeprefix("torch."),
        "direction": case.direction,
        "threads": case.threads,
        "bytes": bytes_,
        "copy_bytes": 2 * tensor_bytes,
        "errors": errors,
        "failed": failed,
        "not_graphed": not_graphed,
        "times": times,
    }


def time_latency(seconds: float) -> dict[str, dict[str, Any]]:
    """Host time of the smallest calls, 1 x 128 fp32 on one CPU thread: functions and modules.

    key -> entry, as of :func:`time_case`.
    """
    from torch import nn

    import fused_rmsnorm as ours

    n = 128
    x, dy = torch.randn(1, n, requires_grad=True), torch.randn(1, n)
    w, b = torch.ones(n, requires_grad=True), torch.zeros(n, requires_grad=True)

    def affine(norm: Norm) -> Callable[[Tensor], Tensor]:
        return lambda x: norm(x, w, b)

    calls: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
        "function": {k: affine(f) for k, f in norms(n, False).items()},
        "module": {
            "rms_norm": ours.RMSNorm(n, EPS),
            "prms_norm": ours.PRMSNorm(n, P, EPS),
            "torch_layer_norm": nn.LayerNorm(n, EPS),
            "torch_rms_norm": nn.RMSNorm(n, EPS),
        },
    }
    entries: dict[str, dict[str, Any]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for kind, found in calls.items():
            for mode in ("no grad", "recording grad", "forward+backward"):
                contenders = [Contender(k, _latency(f, mode, dy), [x]) for k, f in found.items()]
                with torch.set_grad_enabled(mode != "no grad"):
                    times: dict[str, Timing] = measure(contenders, seconds=seconds)
                entries[f"latency/{kind}/{mode}"] = {"kind": kind, "mode": mode, "times": times}
    finally:
        torch.set_num_threads(threads)
    return entries


def _latency(call: Callable[[Tensor], Tensor], mode: str, dy: Tensor) -> Callable[[Any], object]:
    if mode == "forward+backward":
        return lambda x: call(x).backward(dy)
    return call
