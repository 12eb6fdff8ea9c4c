"""Speed of the norms alone: every contender on a case of norms/cases.py.

Two operations: the norm, and the residual add with the norm after it. LayerNorm has weight and
bias, as torch.nn.LayerNorm; every RMSNorm has a weight. Weights are in the input's dtype but for
the cases with fp32 weights, with which F.rms_norm leaves its faster path. Results are checked
against the definition in fp64 before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from ..harness.copies import COPIES, copy_by
from ..harness.environment import where_it_fits
from ..harness.timing import Contender, graphed, measure, threads, time_cuda, time_host
from .cases import HEADS, Case, Direction, Kind, minimal_bytes
from .peers import Peer, present
from .peers_cpu import present_cpu

__all__ = ["EPS", "Inputs", "P", "add_norms", "norms", "time_case"]

Norm = Callable[..., Any]  # (x, w, b) -> y; (x, residual, w, b) -> (y, sum)

EPS = 1e-6
P = 0.0625
# Bytes that a GPU moves in some 50 us: below, a launch costs as much, so calls are replayed from
# CUDA graphs, and the host's latency is shown apart.
GRAPHED_BELOW = 100 << 20


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
    """In fp64; a sum of two inputs has the value that their dtype can hold."""
    x, *others, w, _ = args
    for residual in others:
        x = x + residual.double()
        x = x + (x.to(residual.dtype).double() - x).detach()
    y = x * torch.rsqrt(x[..., :k].square().mean(-1, keepdim=True) + EPS) * w.double()
    return (y, x) if others else (y,)


def _own(data: Inputs) -> Inputs:
    """Copies, for a call that overwrites its arguments."""
    return Inputs(tuple(t.detach().clone() for t in data.args), data.grads)


def _errors(
    found: dict[str, Norm], forward_only: Collection[str], data: Inputs
) -> dict[str, float]:
    """Largest error of y and dx over the largest value, against fp64; raises if ours is wrong.

    Ours may be off by what F.rms_norm is off, and an ulp. Neither LayerNorm, another function, nor
    the compiled one, which would be compiled for these few rows too, is looked at.
    """
    x, *_, w, b = data.args
    n = x.size(-1)

    def few(dtype: torch.dtype) -> Inputs:
        """Rows as they lie, so that a view is one here, too; in fp64 copies."""
        leaf = x[:64].detach().to(dtype).requires_grad_()
        others = (t[:64].detach() for t in data.args[1:-2])
        return Inputs((leaf, *others, w, b), tuple(g[:64] for g in data.grads))

    errors = {}
    for name, norm in found.items():
        if name in ("torch_layer_norm", "compiled_rms_norm"):
            continue
        k = -(-n // 16) if name == "prms_norm" else n
        results = []
        for f, dtype in ((norm, x.dtype), (lambda *args: _definition(*args, k=k), torch.double)):  # noqa: B023
            args, grads = few(dtype) if name not in forward_only else _own(few(dtype))
            outs = _outputs(f(*args))
            values = [outs[0].detach().double()]
            if name not in forward_only:
                grads = tuple(g.to(y.dtype) for g, y in zip(grads, outs, strict=True))
                values.append(torch.autograd.grad(outs, args[0], grads)[0].double())
            results.append(values)
        pairs = zip(*results, strict=True)
        errors[name] = max(((a - e).abs().max() / e.abs().max()).item() for a, e in pairs)
    bound = 2 * errors["torch_rms_norm"] + torch.finfo(x.dtype).eps
    slack = {"rms_norm": 1, "add_rms_norm": 1, "prms_norm": 4}
    if not all(e <= slack[k] * bound for k, e in errors.items() if k in slack):
        raise RuntimeError(f"wrong result at {list(x.shape)} {x.dtype}: errors {errors}")
    return errors


def _peers(
    kind: Kind, device: torch.device, runtimes: bool = False
) -> dict[str, tuple[Peer, Norm]]:
    """Other projects' kernels: name -> the peer and f(x, [residual,] w, b). ``runtimes``: on a CPU
    those of other runtimes, which have the norm alone."""

    def without_bias(norm: Norm) -> Norm:
        return lambda *args: norm(*args[:-1])

    found = present(kind) if device.type == "cuda" else {}
    if runtimes and device.type == "cpu" and kind == "speed":
        found = present_cpu()
    return {name: (peer, without_bias(norm)) for name, (peer, norm) in found.items()}


def _failure(norm: Norm, leaves: int, backward: bool, data: Inputs) -> str:
    """The error of a call and of its gradients by the first ``leaves`` arguments; "" if none."""
    try:
        outs = _outputs(norm(*data.args))
        if backward:
            torch.autograd.grad(outs, data.args[:leaves], data.grads)
    except Exception as error:  # whatever a peer raises: it is shown, not hidden
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


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
    """torch.clone; of contiguous CPU tensors memcpy and (from 1 MiB) non-temporal stores, too."""
    yield Contender("clone", torch.clone, sources)
    if sources[0].device.type != "cpu" or not sources[0].is_contiguous():
        return
    to = torch.zeros_like(sources[0])
    for name in COPIES:
        copy = copy_by(name)
        if copy and (name == "memcpy" or to.nbytes >= 1 << 20):
            yield Contender(name, copy, [(to, source) for source in sources])


def time_case(
    case: Case, device: torch.device, seconds: float, runtimes: bool = False
) -> dict[str, Any]:
    """One entry of the results: sizes, minimal bytes, errors and a Timing per contender.
    ``runtimes``: on a CPU against ONNX Runtime and OpenVINO, too, in fp32 forward."""
    # A backward alone is timed on one graph again and again, whose buffers must not be given away.
    donated = torch._functorch.config.patch(donated_buffer=case.direction != "backward")
    with threads(case.threads), donated:
        return _time_case(case, device, seconds, runtimes)


def _sets(rows: int, tensor_bytes: int, device: torch.device) -> int:
    """How many inputs take turns: small ones stay where they are meant to be, in L1 or L2.

    On a GPU they rotate past its L2, except fewer than 1024 rows of 4 MiB at most: there latency
    decides, and in inference, which they stand for, the kernel before has left them in L2. What no
    cache of a CPU holds need not rotate.
    """
    if device.type == "cuda" and (rows >= 1024 or tensor_bytes > 1 << 22):
        return min(256, max(2, -(-(128 << 20) // tensor_bytes)))
    if device.type == "cpu" and where_it_fits(2 * tensor_bytes, 1) == "memory":
        return 1
    return 4 if tensor_bytes < 1 << 20 else 2


def _inputs(case: Case, device: torch.device, sets: int) -> list[Inputs]:
    """Random, with one weight and bias for all."""
    random = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, device=device, generator=random).to(dtype)

    def rows() -> Tensor:
        if case.layout == "packed":
            return randn(case.rows // HEADS, 3, HEADS, case.n)[:, 0]
        return randn(case.rows, case.n)

    weight = 1 + 0.1 * randn(case.n, dtype=case.weight_dtype)
    affine = (weight.requires_grad_(), randn(case.n, dtype=case.weight_dtype).requires_grad_())
    each = 2 if case.kind == "add" else 1  # x and residual; y and their sum
    made = []
    for _ in range(sets):
        leaves = [rows().requires_grad_() for _ in range(each)]
        made.append(Inputs((*leaves, *affine), tuple(randn(*x.shape) for x in leaves)))
    return made


def _time_case(case: Case, device: torch.device, seconds: float, runtimes: bool) -> dict[str, Any]:
    rows, n, each = case.rows, case.n, 2 if case.kind == "add" else 1
    tensor_bytes = rows * n * case.dtype.itemsize
    sets = _sets(rows, tensor_bytes, device)
    data = _inputs(case, device, sets)
    found = (add_norms if case.kind == "add" else norms)(n, case.compiled)
    failed = {}
    if case.weight != "same":  # which torch's LayerNorm does not take on every device
        error = _failure(found["torch_layer_norm"], each + 2, True, data[0])
        if error:
            failed["torch_layer_norm"] = error
            del found["torch_layer_norm"]
    plain = (case.dtype, case.weight, case.layout) == (torch.float32, "same", "contiguous")
    peers = _peers(case.kind, device)
    if runtimes and plain and case.direction == "forward":
        peers = _peers(case.kind, device, runtimes=True)
    in_place = [name for name, (peer, _) in peers.items() if peer.in_place]
    forward_only = [name for name, (peer, _) in peers.items() if not peer.backward]
    for name, (peer, norm) in peers.items():
        if case.direction != "forward" and not peer.backward:
            continue
        first = _own(data[0]) if peer.in_place else data[0]
        error = _failure(norm, each + 1, peer.backward, first)
        if error:
            failed[name] = error
        else:
            found[name] = norm
    errors = _errors(found, forward_only, data[0])
    contenders = [
        _contender(name, f, case.direction, [_own(d) for d in data] if name in in_place else data)
        for name, f in found.items()
    ]
    contenders += _copies([d.args[0].detach() for d in data])
    timer = time_cuda if device.type == "cuda" else time_host
    bytes_ = minimal_bytes(case)
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
        "weight": case.weight,
        "layout": case.layout,
        "threads": case.threads,
        "bytes": bytes_,
        "copy_bytes": 2 * tensor_bytes,
        "fits": where_it_fits(touched * tensor_bytes, case.threads, device.type),
        "errors": errors,
        "failed": failed,
        "not_graphed": not_graphed,
        "times": measure(contenders, seconds=seconds, timer=timer),
    }
