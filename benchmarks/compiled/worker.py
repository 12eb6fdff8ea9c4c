"""What each process of ``python -m benchmarks.compiled`` does."""

from typing import Any

from ptx.build import Build
from ptx.kernels import Kernels

from .count import Together, count, machine
from .gpus import GPUS
from .grid import Counted
from .model import model

__all__ = ["begin", "counts_of", "work"]

_kernels: Any = None  # of this process


def begin(together: Together) -> None:
    """Of a process. ``together``: kernels that are compiled at once, where not all PTX is there."""
    global _kernels
    _kernels = Kernels(Build())
    _kernels.together = together


def counts_of(counted: Counted, arch: int) -> dict[str, Any]:
    return count(_kernels, counted, arch)[0]


def work(job: tuple[Counted, int]) -> dict[str, Any]:
    """Counts one kernel, and models the GPUs that run it so."""
    counted, arch = job
    counts, blocks = count(_kernels, counted, arch)
    unit = f"{counted.direction}_{counted.case.x}"
    models = {}
    for gpu in (g for g in GPUS if g.virtual == arch):
        made = machine(_kernels, unit, arch, counts, blocks, gpu.arch)
        models[gpu.name] = model(gpu, counts, made)
    return {"counts": counts, "models": models}
