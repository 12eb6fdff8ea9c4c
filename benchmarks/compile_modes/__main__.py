"""What torch.compile makes of the norms in context: ``python -m benchmarks.compile_modes``.

Ours keeps its fused operator (opaque) or hands Inductor plain operations (``compile_mode="fuse"``);
nn.RMSNorm and nn.LayerNorm are compiled beside it, and all run in eager mode too. Timed:

block      a Llama block with QK-norm
add        residual add, then norm: both results are wanted, as between two blocks
gelu       norm, then GELU
linear     norm, then a linear layer

each forward under no_grad, and forward with backward, as training does; the optimiser's part, the
same for all, is left out. Before anything is timed, every RMSNorm's output is compared with that
of nn.RMSNorm in eager mode.

Writes benchmarks/results/<hardware>/compile_modes.json and compile_modes.md; most of the time goes
into compiling. Ctrl-C keeps what is done; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..harness.environment import environment, hardware_slug, keep_freed_memory
from ..harness.optional import progress_bar
from ..harness.results import RESULTS, Results
from ..harness.timing import Contender, measure, time_cuda, time_host
from ..paper.models import llama_block
from ..paper.norms import EPS, MakeNorm, make_norm
from . import report

__all__ = ["CONTEXTS", "DIRECTIONS", "main", "time_context"]

DIRECTIONS = ("forward", "forward+backward")
# Relative difference that one RMSNorm may have from another: fusion rounds elsewhere.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}


def _ours(n: int, affine: bool = True, mode: Any = "opaque", add: bool = False) -> nn.Module:
    from fused_rmsnorm import AddRMSNorm, RMSNorm

    return (AddRMSNorm if add else RMSNorm)(n, EPS, affine, compile_mode=mode)


# name -> how the norm is made, and whether the model is compiled
VARIANTS: dict[str, tuple[MakeNorm, bool]] = {
    "rms_norm_eager": (_ours, False),
    "rms_norm_opaque": (_ours, True),
    "rms_norm_fuse": (functools.partial(_ours, mode="fuse"), True),
    "torch_rms_norm_eager": (make_norm("torch_rms_norm"), False),
    "torch_rms_norm_compiled": (make_norm("torch_rms_norm"), True),
    "torch_layer_norm_eager": (make_norm("layer_norm"), False),
    "torch_layer_norm_compiled": (make_norm("layer_norm"), True),
}
# of the residual add only: ours in one pass
ADD_VARIANTS: dict[str, tuple[MakeNorm, bool]] = {
    "add_rms_norm_eager": (functools.partial(_ours, add=True), False),
    "add_rms_norm_opaque": (functools.partial(_ours, add=True), True),
    "add_rms_norm_fuse": (functools.partial(_ours, mode="fuse", add=True), True),
}


class Block(nn.Module):
    """A Llama block on [batch, length, width]; returns what the next block would be given."""

    def __init__(self, norm: MakeNorm, sizes: llama_block.Sizes) -> None:
        super().__init__()
        self.model = llama_block.LlamaBlocks(norm, sizes)
        self.model.norm = nn.Identity()  # the last norm, which follows the last block only

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        (block,) = self.model.blocks
        return (block(x, self.model.cos, self.model.sin),)


class AddThenNorm(nn.Module):
    def __init__(self, norm: MakeNorm, sizes: llama_block.Sizes) -> None:
        super().__init__()
        self.norm = norm(sizes.width)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        s = x + residual
        return self.norm(s), s


class AddNorm(AddThenNorm):
    """Of a norm that adds by itself."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        return self.norm(x, residual)


class NormThenGELU(AddThenNorm):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return (F.gelu(self.norm(x)),)


class NormThenLinear(nn.Module):
    def __init__(self, norm: MakeNorm, sizes: llama_block.Sizes) -> None:
        super().__init__()
        self.norm = norm(sizes.width)
        self.linear = nn.Linear(sizes.width, sizes.width, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.linear(self.norm(x)),)


# name -> module and how many inputs it takes
CONTEXTS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "block": (Block, 1),
    "add": (AddThenNorm, 2),
    "gelu": (NormThenGELU, 1),
    "linear": (NormThenLinear, 1),
}


def _call(
    model: Callable[..., Any], parameters: list[Tensor], grads: Sequence[Tensor], backward: bool
) -> Callable[[Any], Any]:
    def forward(inputs: Sequence[Tensor]) -> Any:
        with torch.no_grad():
            return model(*inputs)

    def both(inputs: Sequence[Tensor]) -> Any:
        return torch.autograd.grad(model(*inputs), (*inputs, *parameters), grads)

    return both if backward else forward


def _difference(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def time_context(
    context: str,
    direction: str,
    dtype: torch.dtype,
    sizes: llama_block.Sizes,
    device: torch.device,
    seconds: float,
    *,
    compiled: bool = True,
) -> dict[str, Any]:
    """One entry of the results: a Timing per variant, all with the same weights and inputs.

    Args:
        context: of ``CONTEXTS``.
        compiled: False: eager variants only, to try the rest without waiting for Inductor.
    """
    # Past its limit of graphs per function, the compiler would go on in eager mode and not say so.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        return _time_context(context, direction, dtype, sizes, device, seconds, compiled)


def _time_context(
    context: str,
    direction: str,
    dtype: torch.dtype,
    sizes: llama_block.Sizes,
    device: torch.device,
    seconds: float,
    compiled: bool,
) -> dict[str, Any]:
    torch.compiler.reset()
    make, count = CONTEXTS[context]
    backward = "backward" in direction
    random = torch.Generator().manual_seed(0)
    shape = (sizes.batch, sizes.length, sizes.width)

    def randn() -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    inputs = [randn().requires_grad_() for _ in range(count)]
    grads = [randn() for _ in range(count)]  # as many results as inputs
    contenders, differences = [], {}
    expected: Tensor | None = None
    variants = {**VARIANTS, **(ADD_VARIANTS if context == "add" else {})}
    # The one that the others are compared with comes first.
    for name in sorted(variants, key=lambda name: name != "torch_rms_norm_eager"):
        norm, is_compiled = variants[name]
        if is_compiled and not compiled:
            continue
        torch.manual_seed(0)
        made = AddNorm if name in ADD_VARIANTS else make
        model = made(norm, sizes).to(device, dtype)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # a norm's weight: 1 would hide that it is not used
                nn.init.normal_(parameter, 1, 0.1)
        run: Any = torch.compile(model, dynamic=False) if is_compiled else model
        call = _call(run, list(model.parameters()), grads, backward)
        contenders.append(Contender(name, call, [inputs]))
        if "layer_norm" not in name:
            with torch.set_grad_enabled(backward):  # the graph that is timed
                y = run(*inputs)[0].detach()
            expected = y if expected is None else expected
            differences[name] = _difference(y, expected)
    worst = max(differences.values())
    if not worst <= TOLERANCE[dtype]:
        raise RuntimeError(f"{context}, {dtype}: not the same function: {differences}")
    timer = time_cuda if device.type == "cuda" else time_host
    times = measure(contenders, seconds=seconds, timer=timer)
    return {
        "context": context,
        "direction": direction,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
        "differences": differences,
        "times": times,
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_modes", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--contexts", nargs="+", choices=CONTEXTS, default=list(CONTEXTS))
    add("--dtypes", nargs="+", default=["float32", "bfloat16"])
    add("--batch", type=int, default=1)
    add("--length", type=int, default=512)
    add("--seconds", type=float, default=5.0, help="per case, all variants together")
    add("--no-compile", action="store_true", help="eager variants only")
    add("--fresh", action="store_true", help="do not resume a run that was stopped")
    add("--out", type=Path, help="folder of the results")
    return parser.parse_args(argv)


def run(
    results: Results, args: argparse.Namespace, sizes: llama_block.Sizes, device: torch.device
) -> None:
    """Everything that ``args`` asks for and ``results`` does not have yet."""
    todo = list(itertools.product(args.contexts, args.dtypes, DIRECTIONS))
    with progress_bar(len(todo)) as bar:
        for context, dtype, direction in todo:
            bar.set_description(f"{context}, {dtype}, {direction}")
            results.run(
                f"compile/{context}/{dtype}/{direction}",
                functools.partial(
                    time_context,
                    context,
                    direction,
                    getattr(torch, dtype),
                    sizes,
                    device,
                    args.seconds,
                    compiled=not args.no_compile,
                ),
            )
            bar.update()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 130 stopped."""
    args = parse(argv)
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = llama_block.Sizes(layers=1, batch=args.batch, length=args.length)
    options = {k: v for k, v in vars(args).items() if k not in ("fresh", "out", "contexts")}
    folder = args.out or RESULTS / hardware_slug(environment())
    results = Results(
        folder / "compile_modes.json", "compile_modes", options, resume=not args.fresh
    )
    return results.complete(functools.partial(run, results, args, sizes, device), report.write)


if __name__ == "__main__":
    sys.exit(main())
