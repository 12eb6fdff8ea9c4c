"""The one way everything here is timed.

``measure`` runs contenders in turn, in random order, each twice per round. The first run of a
round against the second is the contender against itself: what that ratio's median may be by chance
is the noise, and ``speedup`` refuses to give a ratio inside it.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = [
    "UNKNOWN",
    "Contender",
    "Timing",
    "graphed",
    "measure",
    "noise_of",
    "speedup",
    "summarise",
    "threads",
    "time_cuda",
    "time_host",
]

UNKNOWN = 99.0  # a noise that no ratio is outside of; JSON has no infinity

Call = Callable[[Any], object]
Timer = Callable[[Call, Iterator[Any], int], float]


@dataclass(frozen=True)
class Contender:
    """``call(inputs[i])`` is what is timed; the inputs are taken in turn, so data is fresh.

    ``repeats``: how many calls one ``call`` stands for; times are per call.
    """

    name: str
    call: Call
    inputs: Sequence[Any]
    repeats: int = 1


@dataclass(frozen=True)
class Timing:
    """Seconds per call.

    p20, p80: of the samples, each the mean of ``calls_per_sample`` calls, so a single call's
    spread is wider. noise: relative, 0.02 means that 2 % is not a difference; it holds within one
    process and does not know what differs between processes (placement in memory, clocks).
    """

    median: float
    p20: float
    p80: float
    noise: float
    samples: int
    calls_per_sample: int

    @classmethod
    def from_json(cls, d: dict[str, Any]) -> Timing:
        return cls(**{k: d[k] for k in cls.__dataclass_fields__})


def time_host(call: Call, inputs: Iterator[Any], calls: int) -> float:
    """Seconds of the host for ``calls`` calls; waits for a GPU if there is one."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
    start = time.perf_counter_ns()
    for data in itertools.islice(inputs, calls):
        call(data)
    if gpu:
        torch.cuda.synchronize()
    return (time.perf_counter_ns() - start) * 1e-9


def time_cuda(call: Call, inputs: Iterator[Any], calls: int) -> float:
    """Seconds of the GPU for ``calls`` calls, by events: host overhead hides behind the queue."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for data in itertools.islice(inputs, calls):
        call(data)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's threads on the CPU, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def graphed(
    contenders: Sequence[Contender], calls: int = 32
) -> tuple[list[Contender], dict[str, str]]:
    """A CUDA graph per contender; and by name why some cannot be captured.

    A graph holds at least ``calls`` calls, on the inputs in turn: to replay a graph costs the host
    more than a short kernel takes, so graphs of one call would be timed by the host, too.
    """
    made, failed = [], {}
    for c in contenders:
        rounds = -(-calls // len(c.inputs))
        graph = torch.cuda.CUDAGraph()
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for data in c.inputs:
                    for _ in range(3):
                        c.call(data)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                for _ in range(rounds):
                    for data in c.inputs:
                        c.call(data)
        except Exception as error:  # whatever capture raises: it is shown, not hidden
            failed[c.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            made.append(c)
        else:
            kept = [(graph, c.inputs)]  # what was captured points into the inputs
            made.append(Contender(c.name, lambda g: g[0].replay(), kept, rounds * len(c.inputs)))
    return made, failed


def noise_of(first: np.ndarray, second: np.ndarray) -> float:
    """How far from 1 the ratio of two medians of the same thing may be: 95 % by bootstrap.

    Each median here is over half the samples of a contender, so the ratio of two contenders by all
    their samples keeps inside the larger of their noises more often than 95 %: in simulations of
    5 to 200 rounds, normal and heavy-tailed, with and without a common drift, fewer than 1 % of
    equal contenders came out different. Fewer than 3 rounds say nothing: ``UNKNOWN``.
    """
    if len(first) < 3:
        return UNKNOWN
    rng = np.random.default_rng(0)
    pick = rng.integers(0, len(first), (400, len(first)))
    ratios = np.median(first[pick], axis=1) / np.median(second[pick], axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(max(abs(math.log(low)), abs(math.log(high))))


def summarise(samples: np.ndarray, calls: int) -> Timing:
    """``samples``: shape [rounds, 2], seconds per call, two runs of one contender per round."""
    p20, median, p80 = np.quantile(samples, (0.2, 0.5, 0.8))
    return Timing(
        float(median),
        float(p20),
        float(p80),
        noise_of(samples[:, 0], samples[:, 1]),
        samples.size,
        calls,
    )


@contextmanager
def _no_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def measure(
    contenders: Sequence[Contender],
    *,
    seconds: float = 1.0,
    min_rounds: int = 5,
    max_rounds: int = 400,
    sample_seconds: float = 3e-4,
    timer: Timer = time_host,
    seed: int = 0,
) -> dict[str, Timing]:
    """Times all contenders against each other, in one process, interleaved at random.

    Args:
        contenders: names must differ.
        seconds: for all of them together, warm-up not counted.
        min_rounds, max_rounds: a round times every contender twice.
        sample_seconds: calls are repeated until one sample lasts this long.
        timer: ``time_host`` or ``time_cuda``.
        seed: of the order.
    """
    if len({c.name for c in contenders}) != len(contenders):
        raise ValueError(f"contenders need different names, got {[c.name for c in contenders]}")
    inputs = {c.name: itertools.cycle(c.inputs) for c in contenders}
    calls: dict[str, int] = {}
    samples: dict[str, list[tuple[float, ...]]] = {c.name: [] for c in contenders}
    order = random.Random(seed)
    with _no_gc():
        for c in contenders:
            for _ in c.inputs:  # compiles, allocates, faults in every input's pages
                timer(c.call, inputs[c.name], 1)
            calls[c.name] = 1
            # Far above it, no more of what may take seconds: once was enough to know.
            if timer(c.call, inputs[c.name], 1) < 100 * sample_seconds:
                once = min(timer(c.call, inputs[c.name], 2) / 2 for _ in range(2))
                calls[c.name] = max(1, math.ceil(sample_seconds / max(once, 1e-9)))
                timer(c.call, inputs[c.name], calls[c.name])
        deadline = time.perf_counter() + seconds
        for done in range(max_rounds):
            if done >= min_rounds and time.perf_counter() > deadline:
                break
            now: dict[str, list[float]] = {c.name: [] for c in contenders}
            turns = [*contenders, *contenders]
            order.shuffle(turns)
            for c in turns:
                took = timer(c.call, inputs[c.name], calls[c.name])
                now[c.name].append(took / (calls[c.name] * c.repeats))
            for name, pair in now.items():
                order.shuffle(pair)
                samples[name].append(tuple(pair))
    return {
        c.name: summarise(np.array(samples[c.name]), calls[c.name] * c.repeats) for c in contenders
    }


def speedup(ours: Timing, theirs: Timing) -> float | None:
    """``theirs / ours`` by the medians: above 1, ours is faster. None: inside the noise."""
    ratio = theirs.median / ours.median
    return None if abs(math.log(ratio)) <= max(ours.noise, theirs.noise) else ratio
