"""The cost of a row in a kernel: the difference of two calls with different numbers of rows."""

import os
import re
import subprocess
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

from .flight import bytes_in_flight
from .grid import Counted

__all__ = ["Together", "compile_together", "count", "launched", "machine"]

Together = dict[tuple[str, int], list[str]]  # unit and architecture: kernels

_STREAMS = ("x", "residual", "z", "dy", "dsum")
_USED = re.compile(r"Used (\d+) registers")


def _rows(kernels: Kernels, counted: Counted, arch: int) -> tuple[int, int, int]:
    """(fewer, more, largest grid): whole turns of the kernel's loop, its first and last left
    out."""
    c, backward = counted.case, counted.direction == "backward"
    plan = kernels.plan(c.n, c.x, c.y if backward else None, arch, c.general)
    side = plan["rows_per_block"]
    if plan["cluster"] > 1 or c.n > 100000:
        return (side * 2, side * 3, 1) if backward else (side, side * 2, 0)
    if backward and plan["family"] != 2:
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


def count(kernels: Kernels, counted: Counted, arch: int) -> dict[str, Any]:
    """Per row, and what decides how many rows are under way. Launches whose work does not grow
    with the rows (the sum of the partials) cancel out; all that do are added up.

    Args:
        arch: 80 or 90.
    """
    fewer, more, grid = _rows(kernels, counted, arch)
    first, second = (_run(kernels, counted, arch, rows, grid) for rows in (fewer, more))
    c, unit = counted.case, f"{counted.direction}_{counted.case.x}"
    vectors = c.n * SIZE[c.x] / 16
    ptx: dict[str, float] = {}
    estimate: dict[str, float] = {}
    memory: dict[str, float] = {}
    touched = 0.0
    grown: list[float] = []
    for (launch, before), (_, after) in zip(first, second, strict=True):
        program = kernels.programs[unit, arch, launch.kernel]
        if launch.kernel.startswith("void fused_rmsnorm::cuda::finalize"):
            grown.append(0.0)
            continue  # as many partials in both, or, of few rows, one more
        old, new = before.instructions(program), after.instructions(program)
        grown.append(sum(m for _, m in new.values()) - sum(m for _, m in old.values()))
        for kind, (number, machine_) in new.items():
            n, m = old.get(kind, (0, 0.0))
            ptx[kind] = ptx.get(kind, 0) + (number - n) / (more - fewer)
            estimate[kind] = estimate.get(kind, 0) + (machine_ - m) / (more - fewer)
        for key, value in after.memory.items():
            name = " ".join(key)
            per = (value - before.memory[key]) / (more - fewer)
            memory[name] = memory.get(name, 0) + per
        read = len(after.touched["read"]) - len(before.touched["read"])
        touched += read / (more - fewer)
    launch, counts = second[grown.index(max(grown))]  # the one that most of the work is in
    program = kernels.programs[unit, arch, launch.kernel]
    flight = bytes_in_flight(program, counts.trace, counts.arrays, _STREAMS)
    read, written = bytes_of_row(c, counted.direction)
    per_vector = 32 / vectors  # counts are of warps, vectors of threads
    return {
        "kernel": launch.kernel,
        "instructions": _rounded({k: v * per_vector for k, v in estimate.items() if v}),
        "ptx instructions": round(sum(v for k, v in ptx.items() if k != "param") * per_vector, 2),
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


def _total(memory: dict[str, float], what: str) -> float:
    return round(sum(v for k, v in memory.items() if k.split(" ", 1)[1] == what), 2)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {k: round(v, 2) for k, v in sorted(values.items(), key=lambda kv: -kv[1])}


def machine(
    kernels: Kernels, unit: str, virtual: int, kernel: str, target: int
) -> dict[str, float]:
    """What ptxas makes of a kernel: registers, and how many instructions for one that is estimated.

    The latter counts every path alike, run or not: good to perhaps 20 %.
    """
    program = kernels.programs[unit, virtual, kernel]
    path = kernels.single(unit, virtual, kernel)
    cubin, report = kernels.build.cubin(path, target), kernels.build.report(path, target)
    used = _USED.search(report)
    assert used, report
    estimated = sum(e for b in program.blocks for _, e in b.costs.values())
    return {"registers": int(used[1]), "scale": round(_code(cubin) / 16 / estimated, 3)}


def _code(cubin: Any) -> int:
    """Bytes of machine code, 16 an instruction."""
    text = subprocess.run(
        ["readelf", "-SW", str(cubin)], capture_output=True, text=True, check=True
    )
    sizes = [
        int(line.split("PROGBITS")[1].split()[2], 16)
        for line in text.stdout.splitlines()
        if " .text." in line
    ]
    return sum(sizes)
