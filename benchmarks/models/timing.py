"""A model against itself with its norms swapped, in eager mode and compiled, side by side."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fused_rmsnorm import RMSNorm, replace_rms_norm_

from ..harness.memory import saved_bytes
from ..harness.timing import Contender, measure, time_cuda, time_host
from .works import WORKS, loss_of

__all__ = ["COMPILED", "EAGER", "TOLERANCE", "norms_left", "swap", "time_work"]

# original, swapped
EAGER = ("original", "swapped")
COMPILED = ("original_compiled", "swapped_compiled")

# How far the result of one variant may be from the original's, relative: a swap gives the same
# numbers but for the order of sums, and the compiler rounds elsewhere. In bf16 a prefill of Qwen3
# differs by 0.4 % after the swap and by 1 % after the compiler.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}


def swap(model: nn.Module) -> tuple[nn.Module, dict[str, RMSNorm]]:
    """The same model with fused norms, over the very same parameters; and the norms by name."""
    parameters: dict[int, Any] = {id(p): p for p in model.parameters()}
    twin = copy.deepcopy(model, parameters)
    return twin, dict(replace_rms_norm_(twin))


def norms_left(model: nn.Module) -> list[str]:
    """Classes of the norms that a swap did not take."""
    left = {type(m).__name__ for m in model.modules() if not isinstance(m, RMSNorm)}
    return sorted(name for name in left if "norm" in name.lower())


def _difference(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def time_work(
    name: str,
    models: dict[str, nn.Module],
    tokens: Tensor,
    seconds: float,
    backend: str | None,
) -> dict[str, Any]:
    """One entry of the results: a Timing per variant and, of training, the bytes that each keeps.

    Args:
        name: of ``WORKS``.
        models: ``original`` and ``swapped``, of one dtype, with the same parameters.
        seconds: of measuring, for all variants together; warm-up and compiling come on top.
        backend: of torch.compile; None: eager variants only.

    Raises:
        RuntimeError: a variant does not compute what the original does.
    """
    # Past its limit of graphs per function, the compiler would go on in eager mode and not say so.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        return _time_work(name, models, tokens, seconds, backend)


def _time_work(
    name: str,
    models: dict[str, nn.Module],
    tokens: Tensor,
    seconds: float,
    backend: str | None,
) -> dict[str, Any]:
    torch.compiler.reset()
    dtype = next(models["original"].parameters()).dtype
    variants: dict[str, tuple[nn.Module, Any]] = {k: (models[k], models[k]) for k in EAGER}
    if backend is not None:
        for plain, compiled in zip(EAGER, COMPILED, strict=True):
            run = torch.compile(models[plain], backend=backend, dynamic=False)
            variants[compiled] = (models[plain], run)
    contenders, differences = [], {}
    expected: Tensor | None = None
    for variant, (model, run) in variants.items():
        model.train(name == "train")
        call = WORKS[name](model, run, tokens)
        result = call(None).detach()
        expected = result if expected is None else expected
        differences[variant] = _difference(result, expected)
        contenders.append(Contender(variant, call, [None]))
    if not max(differences.values()) <= TOLERANCE[dtype]:
        raise RuntimeError(f"{name}, {dtype}: not the same function: {differences}")
    timer = time_cuda if tokens.is_cuda else time_host
    entry: dict[str, Any] = {
        "work": name,
        "tokens": list(tokens.shape),
        "differences": differences,
        "times": measure(contenders, seconds=seconds, timer=timer),
    }
    if name == "train":
        alive = [*models["original"].parameters(), *models["original"].buffers(), tokens]
        alive += [p.grad for p in models["original"].parameters() if p.grad is not None]
        entry["saved"] = {
            variant: saved_bytes(lambda: loss_of(run, tokens), alive)  # noqa: B023
            for variant, (_, run) in variants.items()
        }
    return entry
