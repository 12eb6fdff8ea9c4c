"""The numbers and gradients that a norm is compared by, and how close they have to be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn

from .belongings import bare_copy
from .modes import in_mode
from .operations import parameters_of

__all__ = ["Probe", "agree", "gated", "probes_of"]

_HALF = (torch.float16, torch.bfloat16)
_DTYPES = (torch.float32, *_HALF)


@dataclass
class Probe:
    """An input (and a gate) and a weight, and what is asked for: the result, or the gradients."""

    x: Tensor
    w: Tensor
    training: bool
    gradients: bool = False
    mode: str = ""
    gate: Tensor | None = None

    def run(self, norm: nn.Module) -> list[Tensor]:
        """Raises what ``norm`` raises, and ValueError if it writes into its input."""
        names = parameters_of(norm)
        values = {name: self.w if name == "weight" else self.w.flip(0) for name in names}
        copy = bare_copy(norm, values, self.training)
        given = [t for t in (self.x, self.gate) if t is not None]
        mode = self.mode or ("gradients" if self.gradients else "no gradients")
        with torch.device("cpu"), in_mode(mode):
            inputs = [t.clone().requires_grad_(self.gradients) for t in given]
            y = copy.forward(*inputs)  # not by its __call__, which global hooks would see
        if not self.gradients:
            if not all(map(torch.equal, inputs, given)):
                raise ValueError("it writes into its input")
            return [y.detach()]
        dy = _numbers(self.x.shape[:1], tuple(self.x.shape[1:]), 8, 1e-4)[0]
        return list(torch.autograd.grad(y, [*inputs, *copy.parameters()], dy))


def probes_of(shape: tuple[int, ...], all_eps: list[float | None]) -> list[Probe]:
    """``all_eps``: those that it could have; some rows are so small that each of them shows."""
    low = min(math.sqrt(max(eps, 1e-30)) for eps in (*all_eps, 1e-14) if eps)

    def numbers(lead: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
        return _numbers(lead, shape, seed, low)

    x, w = numbers((8,), 0)
    probes = [Probe(x.to(a), w.to(b), False) for a, b in product(_DTYPES, _DTYPES)]
    leads = ((), (1,), (1, 1), (5,), (2, 3), (4, 1, 2), (2, 3, 2, 2))
    for seed, (lead, dtype) in enumerate(product(leads, (torch.float32, torch.float64))):
        x, w = (t.to(dtype) for t in numbers(lead, seed))
        probes += [Probe(x, w, training) for training in (True, False)]
    x, w = numbers((2, 3), 9)
    half, full = torch.bfloat16, torch.float32
    for mode, training in (("autocast", True), ("autocast", False), ("inference", False)):
        for a, b in ((full, full), (half, full), (half, half)):
            probes.append(Probe(x.to(a), w.to(b), training, mode=mode))
    x, w = numbers((3, 5), 7)
    probes += [Probe(x, w, training, gradients=True) for training in (True, False)]
    return [*probes, Probe(x, w, True, gradients=True, mode="autocast")]


def gated(probe: Probe) -> Iterator[Probe]:
    """The probe with a gate of numbers to both sides of 0, in its dtype and in another."""
    rows = torch.linspace(-3, 3, probe.x.numel(), device="cpu").view(probe.x.shape)
    gate = rows + probe.x.float().sign()
    yield replace(probe, gate=gate.to(probe.x.dtype))
    if probe.x.dtype in _HALF:
        yield replace(probe, gate=gate)


def _numbers(
    lead: tuple[int, ...], shape: tuple[int, ...], seed: int, low: float
) -> tuple[Tensor, Tensor]:
    """Input and weight, of both signs.

    The rows are of all magnitudes from ``low`` on, so that eps decides in the first; in every
    other row one number stands out, as it does in models.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, *shape, generator=generator, device="cpu", dtype=torch.float32)
    rows = x.view(-1, math.prod(shape))
    if len(rows) > 1:
        scales = torch.logspace(math.log10(low), 2, len(rows), device="cpu", dtype=torch.float32)
        rows *= scales.unsqueeze(-1)
        rows[1::2, seed % rows.shape[1]] *= 30
    w = torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32) + 0.5
    signs = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).sign()
    return x, w * signs


def agree(got: list[Tensor], want: list[Tensor], probe: Probe) -> bool:
    """The same but for how a sum is added up."""
    return all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and (_same_gradient if probe.gradients else _same_result)(a, b, probe)
        for a, b in zip(got, want, strict=True)
    )


def _same_gradient(got: Tensor, want: Tensor, probe: Probe) -> bool:
    # Sums of terms that cancel: judged by the largest of the row.
    allowed = 1e-3 * want.abs() + 1e-4 * want.abs().amax(-1, keepdim=True)
    return bool(_apart(got, want).le(allowed).all())


def _same_result(got: Tensor, want: Tensor, probe: Probe) -> bool:
    """Another order of a sum turns one rounding to 16 bits in ten thousand, by one step or two.

    Another order of rounding changes a fifth of all results by such a step.
    """
    bias = probe.w.flip(0).abs().float()  # if there is one: what is left after it may be small
    rtol, atol = 1e-4, 2.5e-7 + 1e-6 * bias  # 2.5e-7: four of fp16's least steps
    off, size = _apart(got, want), want.abs().float()
    near = off <= atol + rtol * size
    if probe.x.dtype not in _HALF and probe.w.dtype not in _HALF:
        return bool(near.all())
    step = max(torch.finfo(t.dtype).eps for t in (probe.x, probe.w))
    turned = off <= atol + 4 * step * size
    return bool(turned.all()) and bool((~near).float().mean() <= 0.02)


def _apart(got: Tensor, want: Tensor) -> Tensor:
    equal = (got == want) | (got.isnan() & want.isnan())
    return torch.where(equal, 0, (got.float() - want.float()).abs())
