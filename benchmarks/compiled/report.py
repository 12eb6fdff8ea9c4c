"""Tables of the counts and of the model, as Markdown."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .gpus import GPUS, L2_BYTES, LATENCY, MEMORY_SHARE
from .model import RESOURCES

__all__ = ["write_tables"]

_INTRODUCTION = f"""# What the compiled kernels cost, by count

Made by `python -m benchmarks.compiled` with {{nvcc}}. What is counted and how the model works:
[docs/compiled.md](../../../docs/compiled.md).

**Nothing here was measured on a GPU.** The counts are exact for the PTX, and for the machine code
that ptxas makes of it as far as every instruction can be traced to the PTX that was executed. The
times are a model of what the code allows if one resource alone took time, with {MEMORY_SHARE:.1%}
of the published memory bandwidth, {L2_BYTES} bytes of L2 per clock and multiprocessor (a B200:
more), and {LATENCY * 1e6:.1f} µs for a read of memory on a busy device.
"""
_MODEL = """
## What binds

The share of a copy's speed that the code allows: the time of memory over the largest of the times.
And which resource that is, where it is not memory.

"""
_COUNTS = """
## Counts, {arch}

Per 16-byte vector of x: instructions of PTX, machine instructions{of}, and the
largest classes of them. Of a row: 32-byte sectors of global memory over the least possible,
wavefronts of shared memory over the least possible. Bytes of x (and residual, dy) that a thread has
on their way at once.

| kernel | PTX | machine | of which | sectors | wavefronts | bytes in flight a thread |
|---|--:|--:|---|--:|--:|--:|
"""
_TIMES = """
## Times, {gpu}

Nanoseconds a row on the whole GPU, if nothing else took time.

"""


def _ratio(counts: Mapping[str, Any], what: str) -> str:
    least = counts[f"least {what}"]
    return f"{counts[what] / least:.2f}" if least else "–"


def _counts(name: str, c: Mapping[str, Any], machine: Mapping[str, float]) -> str:
    kinds = [f"{kind} {value:.1f}" for kind, value in list(machine.items())[:4]]
    ptx = sum(number for kind, number in c["ptx"].items() if kind != "param")
    cells = (
        *(name, f"{ptx:.1f}", f"{sum(machine.values()):.1f}"),
        *(", ".join(kinds), _ratio(c, "sectors"), _ratio(c, "wavefronts")),
        str(c["bytes in flight per thread"]),
    )
    return f"| {' | '.join(cells)} |"


def _share(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    share = f"{found['share of memory']:.2f}"
    return share if found["binds"] == "memory" else f"{share} {found['binds']}"


def write_tables(results: Mapping[str, Any], folder: Path) -> None:
    """``results``: as in counts.json."""
    parts = [_INTRODUCTION.format(nvcc=results["nvcc"])]
    models = results["models"]
    names = list(next(iter(results["counts"].values())))
    gpus = [g.name for g in GPUS if g.name in models]
    parts.append(_MODEL + f"| kernel | {' | '.join(gpus)} |\n|---|{'--:|' * len(gpus)}\n")
    for name in names:
        cells = (_share(models[gpu].get(name)) for gpu in gpus)
        parts.append(f"| {name} | {' | '.join(cells)} |\n")
    for arch, counts in results["counts"].items():
        gpu = next(g.name for g in GPUS if f"sm_{g.arch}" == arch)
        parts.append(_COUNTS.format(arch=arch, of=f" of a kernel for the {gpu}"))
        made = models[gpu]
        parts += [_counts(name, c, made[name]["instructions"]) + "\n" for name, c in counts.items()]
    for gpu in gpus:
        head = f"| kernel | {' | '.join(RESOURCES)} | registers | blocks | KB in flight |\n"
        parts.append(_TIMES.format(gpu=gpu) + head + f"|---|{'--:|' * (len(RESOURCES) + 3)}\n")
        for name, found in models[gpu].items():
            times = " | ".join(f"{found['ns'][r]:.2f}" for r in RESOURCES)
            more = f"{found['registers']} | {found['blocks']} | {found['KB in flight']:.0f}"
            parts.append(f"| {name} | {times} | {more} |\n")
    (folder / "counts.md").write_text("".join(parts))
