"""Gated, grouped and per-head norms beside what people write: ``python -m benchmarks.gated``.

mamba2    y = w * norm(x * silu(z)), in groups of a row; Zamba 2, Bamba, Nemotron-H
qwen3     y = w * norm(x) * silu(z), rows of 128; Qwen3-Next
heads     queries or keys under a weight per head, without a gate
adaptive  AdaLN's scale and shift of each sample, without a gate

Each eager and through torch.compile, forward under no_grad and forward with backward; on a GPU also
mamba_ssm's kernel (mamba2) and flash-linear-attention's (qwen3), if they are installed. Writes
benchmarks/results/<hardware>/gated.json and gated.md.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..harness import tables
from ..harness.timing import Contender, measure, time_cuda, time_host
from . import command
from .command import DIRECTIONS

__all__ = ["CASES", "main", "markdown", "time_case"]

EPS = 1e-6
NAMES = ("fused", "eager", "compiled")
# Relative difference of a result from that of the eager operations: one of them rounds otherwise.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def _norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def _mamba2(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    rows = x.float() * silu(z.float())
    return w * _norm(rows.unflatten(-1, (8, -1))).flatten(-2).to(x.dtype)


def _mamba2_fused(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    from fused_rmsnorm.functional import rms_norm_gated

    return rms_norm_gated(
        x, z, w.numel(), w, EPS, norm_before_gate=False, group_size=w.numel() // 8,
        casting_mode="llama",
    )  # fmt: skip


def _qwen3(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    return ((w * _norm(x.float()).to(x.dtype)) * silu(z.float())).to(x.dtype)


def _qwen3_fused(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    from fused_rmsnorm.functional import rms_norm_gated

    return rms_norm_gated(x, z, w.numel(), w, EPS, casting_mode="llama")


def _heads(x: Tensor, w: Tensor) -> Tensor:
    return w * _norm(x.float()).to(x.dtype)


def _heads_fused(x: Tensor, w: Tensor) -> Tensor:
    from fused_rmsnorm.functional import rms_norm

    return rms_norm(x, x.shape[-1], w, EPS, casting_mode="llama")


def _adaptive(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return (_norm(x.float()) * (1 + scale.float()) + shift.float()).to(x.dtype)


def _adaptive_fused(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    from fused_rmsnorm.functional import rms_norm

    return rms_norm(x, x.shape[-1], scale, EPS, bias=shift, weight_offset=1.0)


Norm = Callable[..., Tensor]
Shapes = Callable[[int], tuple[tuple[int, ...], ...]]
# name -> (what people write, ours, shapes of the inputs for so many tokens)
CASES: dict[str, tuple[Norm, Norm, Shapes]] = {
    "mamba2": (_mamba2, _mamba2_fused, lambda t: ((t, 4096), (t, 4096), (4096,))),
    "qwen3": (_qwen3, _qwen3_fused, lambda t: ((t, 32, 128), (t, 32, 128), (128,))),
    "heads": (_heads, _heads_fused, lambda t: ((t, 32, 128), (32, 128))),
    "adaptive": (
        _adaptive,
        _adaptive_fused,
        lambda t: ((8, t // 2, 1152), (8, 1, 1152), (8, 1, 1152)),
    ),
}


def _mamba_ssm(module: Any) -> Norm:
    return lambda x, z, w: module.rmsnorm_fn(
        x, w, None, z=z, eps=EPS, group_size=w.numel() // 8, norm_before_gate=False
    )


def _fla(module: Any) -> Norm:
    return lambda x, z, w: module.rms_norm_gated(x, z, w, None, eps=EPS)


# case -> (name, module, the norm in it): Triton kernels of other projects, for a GPU.
PEERS = {
    "mamba2": ("mamba_ssm", "mamba_ssm.ops.triton.layernorm_gated", _mamba_ssm),
    "qwen3": ("fla", "fla.modules.fused_norm_gate", _fla),
}


def peer_of(case: str) -> tuple[str, Norm] | None:
    """The peer of a case, if it can be imported."""
    if case not in PEERS:
        return None
    name, module, make = PEERS[case]
    try:
        return name, make(importlib.import_module(module))
    except Exception as error:  # a package that is not there, or not for this torch
        print(f"peer absent: {name} ({type(error).__name__}: {error})")
        return None


def _call(norm: Norm, dy: Tensor | None) -> Callable[[Sequence[Tensor]], object]:
    if dy is None:

        def forward(tensors: Sequence[Tensor]) -> object:
            with torch.no_grad():
                return norm(*tensors)

        return forward
    return lambda tensors: torch.autograd.grad(norm(*tensors), tensors, dy)


def time_case(
    case: str, direction: str, dtype: torch.dtype, device: torch.device, seconds: float, tokens: int
) -> dict[str, Any]:
    """An entry of the results. RuntimeError if the contenders are not the same function."""
    composed, fused, shapes_for = CASES[case]
    shapes = shapes_for(tokens)
    torch.manual_seed(0)
    tensors = [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes]
    dy = torch.randn(shapes[0], device=device).to(dtype)
    torch._dynamo.reset()
    norms = {
        "fused": fused,
        "eager": composed,
        "compiled": torch.compile(composed, dynamic=False),
    }
    if device.type == "cuda" and (peer := peer_of(case)):
        norms[peer[0]] = peer[1]
    expected = composed(*tensors).detach()
    backward = direction == DIRECTIONS[1]
    contenders = []
    for name in norms:
        call = _call(norms[name], dy if backward else None)
        with torch.set_grad_enabled(backward):  # the graph that is timed
            found = norms[name](*tensors).detach()
        difference = (found - expected).abs().max() / expected.abs().max()
        if not difference <= TOLERANCE[dtype]:
            raise RuntimeError(f"{case}, {dtype}: {name} is not the same function: {difference}")
        contenders.append(Contender(name, call, [tensors]))
    timer = time_cuda if device.type == "cuda" else time_host
    return {
        "case": case,
        "direction": direction,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shapes[0]),
        "times": measure(contenders, seconds=seconds, timer=timer),
    }


def markdown(data: dict[str, Any]) -> str:
    """The tables of a results file."""
    entries = list(data["entries"].values())
    others = [*NAMES[1:], *sorted({n for e in entries for n in e["times"]} - set(NAMES))]
    header = ["norm", "dtype", "shape", "direction", "fused, ms", *others]
    rows = []
    for e in entries:
        times = tables.times_of(e)
        ratios = [
            f"{times[name].median / times['fused'].median:.1f}" if name in times else ""
            for name in others
        ]
        shape = " x ".join(map(str, e["shape"]))
        fused = tables.spread(times["fused"], 1e3, 2)
        rows.append([e["case"], e["dtype"], shape, e["direction"], fused, *ratios])
    lines = ["# Gated, grouped and per-head norms", "", tables.conditions(data), ""]
    lines += [
        "Eager and compiled: what people write, its time divided by that of the fused norm.",
        *(["The others: their time divided by that of the fused norm."] if others[2:] else []),
        "",
    ]
    return "\n".join([*lines, *tables.table(header, rows, 4), ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 130 stopped."""
    parser = command.options("benchmarks.gated", __doc__, seconds=5.0)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args(argv)

    def entries(device: torch.device) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        for case, dtype, direction in itertools.product(args.cases, args.dtypes, DIRECTIONS):
            yield (
                f"{case}/{dtype}/{direction}",
                functools.partial(
                    time_case, case, direction, getattr(torch, dtype), device, args.seconds,
                    args.tokens,
                ),
            )  # fmt: skip

    kept = {"dtypes": args.dtypes, "tokens": args.tokens, "seconds": args.seconds}
    return command.run("gated", args, kept, entries, markdown)


if __name__ == "__main__":
    sys.exit(main())
