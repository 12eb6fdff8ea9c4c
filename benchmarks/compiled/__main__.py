"""``python -m benchmarks.compiled``: counts every kernel of the grid, models every GPU.

Needs nvcc, ptxas, g++ and nvdisasm (``pip install nvidia-cuda-nvdisasm``), no GPU. Where
``make test`` has left its PTX in build/ptx that is used; else each kernel is compiled on its own.
What was made is kept for the next run.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from ptx import build
from ptx.build import Build

from . import RESULTS
from .count import compile_together
from .grid import GRID, HELD
from .machine_code import disassembler
from .report import write_tables
from .worker import begin, work

ARCHITECTURES = (90, 80)


def main(argv: list[str] | None = None) -> None:
    """Writes counts.json and counts.md into ``--output``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__)
    parser.add_argument("--only", default="", help="names that hold this text")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if missing := build.why_not():
        sys.exit(f"benchmarks.compiled {missing}")
    if not disassembler():
        sys.exit("benchmarks.compiled needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    grid = [c for c in GRID if args.only in c.name]
    together = compile_together(Build(), grid, ARCHITECTURES)
    # Those that a test holds come first. What there is is written each time.
    jobs = [(c, arch) for c in grid for arch in ARCHITECTURES]
    jobs.sort(key=lambda job: (job[0].name not in HELD, -job[1]))
    found: dict[tuple[str, int], dict[str, Any]] = {}
    begun = time.monotonic()
    workers = ProcessPoolExecutor(
        os.cpu_count(), multiprocessing.get_context("spawn"), begin, (together,)
    )
    with workers as pool:
        for (counted, arch), result in zip(jobs, pool.map(work, jobs), strict=True):
            found[counted.name, arch] = result
            write(found, args.output)
            print(f"{time.monotonic() - begun:5.0f} s  sm_{arch}  {counted.name}", flush=True)


def write(found: dict[tuple[str, int], dict[str, Any]], folder: Path) -> None:
    """counts.json and counts.md, in the order of the grid."""
    results: dict[str, Any] = {"nvcc": build.compiler(), "counts": {}, "models": {}}
    for arch in ARCHITECTURES:
        for name in (c.name for c in GRID if (c.name, arch) in found):
            counts, models = (found[name, arch][k] for k in ("counts", "models"))
            results["counts"].setdefault(f"sm_{arch}", {})[name] = counts
            for gpu, times in models.items():
                results["models"].setdefault(gpu, {})[name] = times
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "counts.json").write_text(json.dumps(results, indent=1) + "\n")
    write_tables(results, folder)


if __name__ == "__main__":
    main()
