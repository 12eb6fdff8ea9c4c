"""Time of a training step of each model with each norm, and the share of it that is normalisation.

A step is forward, loss, backward and Adam. Adam's own time, which no norm changes, is measured
beside it. All contenders live in one process and take turns (benchmarks.harness.timing.measure).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..harness.timing import Contender, measure, time_cuda, time_host
from .models import MODELS
from .norms import make_norm

__all__ = ["OPTIMISER", "normalisation_shares", "norms_among", "time_model"]

OPTIMISER = "optimiser"  # the contender that is Adam's step alone

# So small that hundreds of steps on random data leave the model where it was initialised: what is
# timed must not diverge, and the network without a norm would.
RATE = 1e-7

Batch = tuple[Tensor, ...]
Step = Callable[[Batch], None]

# Names of the profiler's events that are a fused normalisation, forward and backward, with the
# autograd nodes around the kernels. LayerNorm of elementary operations has none of its own.
NORM_EVENTS = ("layer_norm", "LayerNorm", "fused_rmsnorm", "RmsNormBackward")
FORWARD_EVENTS = ("aten::native_layer_norm", "fused_rmsnorm::rms_norm_fwd")
PROFILED = ("layer_norm", "rms_norm", "prms_norm")


def time_model(
    name: str, norms: Sequence[str], scale: float, device: torch.device, seconds: float
) -> dict[str, Any]:
    """One entry of the results: sizes, a Timing per norm and of Adam alone, shares of the step.

    Args:
        name: of a model in MODELS.
        norms: names of benchmarks.paper.norms.
        scale: of batch, length and vocabulary; 1 is the size of the publication.
        seconds: of measuring, for all norms together; warm-up comes on top.
    """
    spec = MODELS[name]
    sizes = spec.scaled(scale)
    random = torch.Generator().manual_seed(0)
    batches = [tuple(t.to(device) for t in spec.batch(sizes, random)) for _ in range(2)]
    steps: dict[str, Step] = {}
    parameters: dict[str, int] = {}
    for norm in norms:
        torch.manual_seed(0)
        model = spec.model(make_norm(norm), sizes).to(device)
        parameters[norm] = sum(p.numel() for p in model.parameters())
        optimiser = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)

        def step(batch: Batch, model: Any = model, optimiser: Any = optimiser) -> None:
            optimiser.zero_grad()
            model(*batch).backward()
            optimiser.step()

        steps[norm] = step
    contenders = [Contender(norm, step, batches) for norm, step in steps.items()]
    # Last, so that in the warm-up its model has taken a step and has gradients.
    contenders.append(Contender(OPTIMISER, lambda _: optimiser.step(), [None]))
    timer = time_cuda if device.type == "cuda" else time_host
    times = measure(contenders, seconds=seconds, timer=timer)
    profiled = {norm: steps[norm] for norm in PROFILED if norm in steps}
    shares = normalisation_shares(profiled, batches[0], device)
    return {
        "model": name,
        "device": device.type,
        "sizes": asdict(sizes),
        "parameters": parameters,
        "times": times,
        "shares": shares,
    }


def normalisation_shares(
    steps: Mapping[str, Step], batch: Batch, device: torch.device, repeats: int = 9
) -> dict[str, dict[str, float]]:
    """How much of each step the fused norms are, forward and backward, by torch.profiler.

    The steps take turns, so that what disturbs the machine for a while disturbs all of them.

    Returns:
        For each step, medians of the repeats, on the GPU where there is one. ``share``: own time of
        the norms' events over that of all events, 0 to 1; ``microseconds``: their own time for one
        norm, forward and backward; ``calls``: of norms, forward, per step.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    calls = dict.fromkeys(steps, 0)
    for _ in range(repeats):
        for name, step in steps.items():
            norms, total, calls[name] = norms_among(_events(step, batch, device))
            share = norms / total if total else 0.0
            found[name].append((share, norms / max(1, calls[name])))
    shares = {}
    for name in steps:
        share, microseconds = map(statistics.median, zip(*found[name], strict=True))
        shares[name] = {"share": share, "microseconds": microseconds, "calls": calls[name]}
    return shares


def _events(step: Step, batch: Batch, device: torch.device) -> list[tuple[str, float, int]]:
    """Name, own time and count of what one step runs."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        step(batch)
        if cuda:
            torch.cuda.synchronize()
    return [
        (e.key, e.self_device_time_total if cuda else e.self_cpu_time_total, e.count)
        for e in profiler.key_averages()
        if e.device_type == DeviceType.CPU  # not the kernels: their operators have their time
    ]


def norms_among(events: Iterable[tuple[str, float, int]]) -> tuple[float, float, int]:
    """Time of the norms, time of all, and calls of norms forward, of (name, own time, count)."""
    norms = total = 0.0
    calls = 0
    for name, own, count in events:
        total += own
        if any(part in name for part in NORM_EVENTS):
            norms += own
            calls += count * (name in FORWARD_EVENTS)
    return norms, total, calls
