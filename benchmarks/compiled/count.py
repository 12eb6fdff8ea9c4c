"""The cost of a row in a kernel: the difference of two calls with different numbers of rows."""

import os
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from ptx.build import Build
from ptx.call import call
from ptx.cases import Case
from ptx.counters import Counts
from ptx.kernels import SIZE, Kernels
from ptx.machine import Launch, Options
from ptx.parse import Module

from . import machine_code
from .flight import bytes_in_flight
from .grid import Counted

__all__ = ["Blocks", "Together", "compile_together", "count", "launched", "machine"]

Together = dict[tuple[str, int], list[str]]  # unit and architecture: kernels

Blocks = dict[str, dict[int, float]]  # kernel: basic block: warps that run it, for a row

_STREAMS = ("x", "residual", "z", "dy", "dsum")


def _rows(kernels: Kernels, counted: Counted, arch: int) -> tuple[int, int, int]:
    """(fewer, more, largest grid): whole turns of the kernel's loop, its first and last left
    out."""
    c, backward = counted.case, counted.direction == "backward"
    plan = kernels.plan(c.n, c.x, c.y if backward else None, arch, c.general)
    side = plan["rows_per_block"]
    if plan["cluster"] > 1 or c.n > 100000:
        return (side * 2, side * 3, 1) if backward else (side, side * 2, 0)
    if (backward or c.general) and plan["family"] != 2:
        return side * 8, side * 16, 1
    return side * 2, side * 4, 0


class _Listing(Kernels):
    """Notes what would be launched instead of running it."""

    def call(self, kind: str, dtype: str, struct: bytes, arch: int, *more: Any) -> Any:
        raise _Listed([launch.kernel for launch in self.launches(kind, struct, arch)])


class _Listed(Exception):
    pass


def compile_together(build: Build, grid: Iterable[Counted], archs: Iterable[int]) -> Together:
    """Compiles the kernels of the grid on all cores, unless all PTX is there already."""
    grid = list(grid)
    together = {
        (unit, arch): names for arch in archs for unit, names in launched(build, grid, arch).items()
    }
    if not build.has_all():
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = sorted(together, key=lambda key: -len(together[key]))
            list(pool.map(lambda key: build.ptx_of_kernels(key[0], key[1], together[key]), jobs))
    return together


def launched(build: Build, grid: Iterable[Counted], arch: int) -> dict[str, list[str]]:
    """The kernels that the grid needs, by translation unit."""
    listing = _Listing(build, alone=True)
    found: defaultdict[str, set[str]] = defaultdict(set)
    for counted in grid:
        try:
            call(listing, replace(counted.case, rows=1), arch, counted.direction, Options())
        except _Listed as told:
            found[f"{counted.direction}_{counted.case.x}"] |= set(told.args[0])
    return {unit: sorted(names) for unit, names in found.items()}


def _run(
    kernels: Kernels, counted: Counted, arch: int, rows: int, grid: int
) -> list[tuple[Launch, Counts]]:
    case = replace(counted.case, rows=rows, max_grid=grid)
    options = Options(count=True, races=False)
    return call(kernels, case, arch, counted.direction, options).launched


def bytes_of_row(c: Case, direction: str) -> tuple[int, int]:
    """(read, written), the least that a row needs: rstd and the weight's share left out."""
    x, y = c.n * SIZE[c.x], c.n * SIZE[c.y]
    second = x if c.residual or c.gate else 0
    if direction == "forward":
        return x + second, y + (x if c.residual else 0)
    return x + y + second, (2 * x if c.gate else x) if c.dx else 0


def count(kernels: Kernels, counted: Counted, arch: int) -> tuple[dict[str, Any], Blocks]:
    """Per row, and what decides how many rows are under way. Launches whose work does not grow
    with the rows (the sum of the partials) cancel out; all that do are added up.

    Args:
        arch: 80 or 90.
    """
    fewer, more, grid = _rows(kernels, counted, arch)
    first, second = (_run(kernels, counted, arch, rows, grid) for rows in (fewer, more))
    c, unit = counted.case, f"{counted.direction}_{counted.case.x}"
    vectors = c.n * SIZE[c.x] / 16
    ptx: defaultdict[str, float] = defaultdict(float)
    memory: defaultdict[str, float] = defaultdict(float)
    blocks: Blocks = {}
    touched = 0.0
    grown: list[float] = []
    for (launch, before), (_, after) in zip(first, second, strict=True):
        program = kernels.programs[unit, arch, launch.kernel]
        if launch.kernel.startswith("void fused_rmsnorm::cuda::finalize"):
            grown.append(0.0)
            continue  # as many partials in both, or, of few rows, one more
        ran = {b: (n - before.blocks[b]) / (more - fewer) for b, n in after.blocks.items()}
        blocks[launch.kernel] = ran
        grown.append(0.0)
        for block, warps in ran.items():
            for kind, number in program.blocks[block].classes.items():
                ptx[kind] += warps * number
                grown[-1] += warps * number
        for key, value in after.memory.items():
            memory[" ".join(key)] += (value - before.memory[key]) / (more - fewer)
        read = len(after.touched["read"]) - len(before.touched["read"])
        touched += read / (more - fewer)
    launch, counts = second[grown.index(max(grown))]  # the one that most of the work is in
    program = kernels.programs[unit, arch, launch.kernel]
    flight = bytes_in_flight(program, counts.trace, counts.arrays, _STREAMS)
    read, written = bytes_of_row(c, counted.direction)
    found = {
        "kernel": launch.kernel,
        "ptx": _per_vector(ptx, vectors),
        "sectors": _total(memory, "sectors"),
        "least sectors": _total(memory, "least sectors"),
        "sectors stored": round(memory.get("st.global sectors", 0), 2),
        "sectors read once": round(touched, 2),
        "wavefronts": _total(memory, "wavefronts"),
        "least wavefronts": _total(memory, "least wavefronts"),
        "vectors": vectors,
        "bytes read": read,
        "bytes written": written,
        "bytes in flight per thread": flight,
        "threads of a block": launch.cta_threads,
        "shared bytes": launch.shared + program.static_shared,
        "cluster": launch.cluster,
    }
    return found, blocks


def _total(memory: dict[str, float], what: str) -> float:
    return round(sum(v for k, v in memory.items() if k.split(" ", 1)[1] == what), 2)


def _per_vector(of_warps: dict[str, float], vectors: float) -> dict[str, float]:
    """Counts of warps, for a row, as of threads, for a vector. The largest first."""
    values = {k: round(v * 32 / vectors, 2) for k, v in of_warps.items() if v}
    return dict(sorted(values.items(), key=lambda kv: -kv[1]))


def machine(
    kernels: Kernels, unit: str, virtual: int, counts: dict[str, Any], blocks: Blocks, target: int
) -> dict[str, Any]:
    """What ptxas makes of a call's kernels for an architecture: registers of the main one, and
    machine instructions per 16-byte vector of x, by class.

    Args:
        counts, blocks: of count()
    """
    total: defaultdict[str, float] = defaultdict(float)
    registers = 0
    for kernel, ran in blocks.items():
        path = kernels.single(unit, virtual, kernel)
        module = Module(path.read_text())
        entry = module.entry(next(iter(module.starts)))
        program = kernels.programs[unit, virtual, kernel]
        lines = machine_code.runs_of_lines(entry, program, ran)
        found = machine_code.instructions(kernels.build, path, lines, target)
        for kind, number in found.items():
            total[kind] += number
        if kernel == counts["kernel"]:
            registers = machine_code.registers(kernels.build, path, lines, target)
    return {"registers": registers, "instructions": _per_vector(total, counts["vectors"])}
