"""What the norms are timed on: the grids of (rows, N), their variants, and a case of them.

A variant is a case with fp32 weights under half-precision inputs, as mixed precision without
autocast has them, or with an input that is a view of packed tokens, as QK-norm has it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..harness.environment import cache_bytes

__all__ = [
    "FULL_ADD",
    "FULL_SHAPES",
    "FULL_VARIANTS",
    "GPU_ADD",
    "GPU_GRIDS",
    "GPU_VARIANTS",
    "HEADS",
    "QUICK_ADD",
    "QUICK_COMPILED",
    "QUICK_SHAPES",
    "Case",
    "Direction",
    "Kind",
    "Variant",
    "beyond_caches",
    "cases",
    "minimal_bytes",
    "variants",
]

Kind = Literal["speed", "add"]  # the norm; the residual add and the norm
Direction = Literal["forward", "backward", "forward+backward"]
Weight = Literal["same", "float32"]  # dtype: the input's
Layout = Literal["contiguous", "packed"]  # packed: queries [tokens, HEADS, N] of packed Q, K, V
Variant = tuple[int, int, Weight, Layout]  # rows, N, and see Case

HEADS = 24

# rows, N. One row of an RNN step, in L1, in L2, the paper's GRU, memory, memory with odd N.
QUICK_SHAPES = ((1, 128), (32, 512), (80, 1000), (512, 1024), (4096, 4096), (4096, 4097))
QUICK_ADD = ((32, 512), (4096, 4096))
FULL_SHAPES = (
    *QUICK_SHAPES,
    *((1, 1023), (1, 1024), (1, 4096), (8, 4096), (64, 1024), (64, 1023), (80, 3000), (128, 2048)),
    *((8192, 128), (131072, 64), (65536, 128), (16384, 512), (16384, 1000), (16384, 1024)),
    *((8192, 2048), (2048, 8192), (1024, 16384), (128, 131072)),
)
FULL_ADD = ((1, 1024), (32, 512), (80, 1000), (512, 1024), (4096, 4096), (4096, 4097))
# core: memory-bound rows of every launch plan, QK-norm, an odd N, and two that latency decides.
# The others look closer at one use, and take many minutes each where torch.compile takes part.
GPU_GRIDS: dict[str, tuple[tuple[int, int], ...]] = {
    "core": (
        *((32768, n) for n in (256, 512, 1024, 2048, 4096, 8192, 16384)),
        *((16384, 32768), (8192, 65536), (4096, 131072), (2048, 262144)),
        *((1 << 20, 64), (27030 * 24, 128), (32768, 4097), (1, 4096), (99, 4096)),
    ),
    "qk": tuple((27030 * heads, n) for heads in (4, 24) for n in (64, 128, 256, 512)),
    "training": (
        *itertools.product((1024, 4096, 16384), (1024, 4096, 8192, 32768)),
        *itertools.product((4096, 65536), (512, 1536, 6144, 7168)),
    ),
    "inference": tuple(itertools.product((1, 16, 99, 989), (500, 1024, 3072, 3584, 8192, 16384))),
    "edges": ((71, 229), (29, 541), (32768, 129), (65536, 1023), (8192, 16385), (1024, 300001)),
}
GPU_ADD = ((32768, 1024), (32768, 4096), (16384, 32768), (32768, 4097), (99, 4096))
GPU_VARIANTS: tuple[Variant, ...] = (
    *((32768, n, "float32", "contiguous") for n in (4096, 8192)),
    *((27030 * HEADS, n, "same", "packed") for n in (64, 128)),
)
FULL_VARIANTS: tuple[Variant, ...] = ((2048 * HEADS, 128, "same", "packed"),)
# Compilation takes about 10 s per shape and direction: the quick run compiles these only.
QUICK_COMPILED = ((32, 512), (4096, 4096))


def beyond_caches() -> tuple[tuple[int, int], ...]:
    """Even and odd rows whose fp32 input alone fills the last-level cache of this machine's CPU."""
    last = list(cache_bytes().values())[-1:]
    return tuple((-(-size // (4 * n)), n) for size in last for n in (4096, 4097))


@dataclass(frozen=True)
class Case:
    """``weight``: its dtype, "same" as the input's. ``layout``: of the input; "packed" takes a
    number of rows that HEADS divides.
    """

    kind: Kind
    rows: int
    n: int
    dtype: torch.dtype
    direction: Direction
    threads: int
    compiled: bool  # also time torch.compile
    weight: Weight = "same"
    layout: Layout = "contiguous"

    def __post_init__(self) -> None:
        if self.layout == "packed" and self.rows % HEADS:
            raise ValueError(f"rows of a packed case must be a multiple of {HEADS}: {self.rows}")

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.dtype if self.weight == "same" else torch.float32

    @property
    def key(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        key = f"{self.kind}/{self.threads}t/{dtype}/{self.rows}x{self.n}/{self.direction}"
        key += "" if self.weight == "same" else f"/weight-{self.weight}"
        return key + ("" if self.layout == "contiguous" else f"/{self.layout}")


def cases(
    kind: Kind,
    shapes: Sequence[tuple[int, int]],
    dtypes: Sequence[torch.dtype],
    threads: Sequence[int],
    directions: Sequence[Direction],
    compiled: Sequence[tuple[int, int]],
) -> Iterator[Case]:
    for t, dtype, (rows, n), direction in itertools.product(threads, dtypes, shapes, directions):
        yield Case(kind, rows, n, dtype, direction, t, (rows, n) in compiled)


def variants(
    chosen: Sequence[Variant],
    threads: Sequence[int],
    compiled: Sequence[tuple[int, int]],
) -> Iterator[Case]:
    """Of the norm alone, in bfloat16; the backward within forward+backward only."""
    directions: tuple[Direction, ...] = ("forward", "forward+backward")
    for t, (rows, n, weight, layout), d in itertools.product(threads, chosen, directions):
        yield Case("speed", rows, n, torch.bfloat16, d, t, (rows, n) in compiled, weight, layout)


def minimal_bytes(case: Case) -> int:
    """What must cross the memory bus once: x, weight, results and gradients, in their dtypes."""
    row_set = case.rows * case.n * case.dtype.itemsize
    weight, rstd = case.n * case.weight_dtype.itemsize, 4 * case.rows
    row_sets = (4, 4) if case.kind == "add" else (2, 3)  # x, residual, sum, y; sum, dy, d(sum), dx
    forward = row_sets[0] * row_set + weight
    backward = row_sets[1] * row_set + rstd + 2 * weight
    both = forward + rstd + backward
    return {"forward": forward, "backward": backward, "forward+backward": both}[case.direction]
