"""The main benchmark: ``python -m benchmarks.norms [--full]`` (``make bench``).

speed      the norms alone, against F.layer_norm, F.rms_norm, torch.compile of it, and copies
           (--full: also of packed queries; --gpu: and with fp32 weights)
add        residual add and norm in one pass, against the add and each norm after it
latency    host time of the smallest calls
memory     bytes kept for the backward
learning   the same character language models trained with LayerNorm, RMSNorm and pRMSNorm

Writes benchmarks/results/<hardware>/norms.json and, from it, norms.md and plots. Ctrl-C keeps what
is done; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..harness.environment import environment, hardware_slug, keep_freed_memory
from ..harness.optional import progress_bar
from ..harness.results import RESULTS, Results
from ..paper.language import LANGUAGE_MODELS, train_side_by_side
from . import report
from .cases import (
    FULL_ADD,
    FULL_SHAPES,
    FULL_VARIANTS,
    GPU_ADD,
    GPU_GRIDS,
    GPU_VARIANTS,
    QUICK_ADD,
    QUICK_COMPILED,
    QUICK_SHAPES,
    Kind,
    beyond_caches,
    cases,
    variants,
)
from .latency import time_latency
from .memory import MEMORY_SHAPES, memory_case, memory_key
from .speed import time_case

PARTS = ("speed", "add", "latency", "memory", "learning")
LEARNED = ("layer_norm", "rms_norm", "prms_norm")
QUICK_STEPS = {"gru": 150, "transformer": 250}
FULL_STEPS = {"gru": 2000, "transformer": 4000}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.norms", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--full", action="store_true", help="more shapes, one and all threads, longer training")
    add("--gpu", action="store_true", help="the grids for GPUs instead of the one for CPUs")
    add("--grid", nargs="+", choices=list(GPU_GRIDS), help="with --gpu: these only (default: core)")
    add("--only", nargs="+", choices=PARTS, metavar="PART", help="the file then has these alone")
    add("--shapes", nargs="+", metavar="ROWSxN", help="instead of the grid, e.g. 80x1000")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"])
    add("--threads", nargs="+", type=int, help="default: all; with --full: 1 and all")
    add("--seconds", type=float, help="per case, all contenders together")
    add("--steps", type=int, help="of training")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--fresh", action="store_true", help="do not resume a run that was stopped")
    add("--out", type=Path, help="folder of the results")
    return parser.parse_args(argv)


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The run, spelt out; recorded in the results."""
    every = torch.get_num_threads()
    long = args.full or args.gpu
    varied: Sequence[tuple[Any, ...]] = ()
    if args.shapes:
        shapes = added = [tuple(int(v) for v in s.split("x")) for s in args.shapes]
    elif args.gpu:
        grids = args.grid or ["core"]
        shapes = list({shape: None for name in grids for shape in GPU_GRIDS[name]})
        added, varied = (list(GPU_ADD), GPU_VARIANTS) if "core" in grids else ([], ())
    elif args.full:
        beyond = beyond_caches()
        shapes, added = [*FULL_SHAPES, *beyond], [*FULL_ADD, *beyond]
        varied = FULL_VARIANTS
    else:
        shapes, added = list(QUICK_SHAPES), list(QUICK_ADD)
    compiled = sorted({*shapes, *added, *(v[:2] for v in varied)}) if long else QUICK_COMPILED
    return {
        "full": args.full,
        "parts": args.only or list(PARTS),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "shapes": {
            "speed": [list(s) for s in shapes],
            "add": [list(s) for s in added],
            "memory": [list(s) for s in (shapes if args.shapes else MEMORY_SHAPES)],
        },
        "variants": [list(v) for v in varied if "bfloat16" in args.dtypes],
        "compiled": [] if args.no_compile else [list(s) for s in compiled],
        "dtypes": args.dtypes,
        "threads": args.threads or (sorted({1, every}) if args.full else [every]),
        "directions": ["forward", "forward+backward", *(["backward"] if long else [])],
        "seconds": args.seconds or (3.0 if args.full else 1.2),
        "steps": {
            k: args.steps or v for k, v in (FULL_STEPS if args.full else QUICK_STEPS).items()
        },
    }


def run(results: Results, options: dict[str, Any]) -> None:
    """Everything that ``options`` asks for and ``results`` does not have yet."""
    device, seconds, parts = torch.device(options["device"]), options["seconds"], options["parts"]
    dtypes = [getattr(torch, name) for name in options["dtypes"]]
    shapes = {kind: [(rows, n) for rows, n in grid] for kind, grid in options["shapes"].items()}
    compiled = [(rows, n) for rows, n in options["compiled"]]
    kinds: tuple[Kind, ...] = ("speed", "add")
    grid = [
        case
        for kind in kinds
        for case in cases(
            kind, shapes[kind], dtypes, options["threads"], options["directions"], compiled
        )
        if kind in parts
    ]
    if "speed" in parts:
        grid += variants([tuple(v) for v in options["variants"]], options["threads"], compiled)
    models = LANGUAGE_MODELS if "learning" in parts else ()
    units = len(grid) + ("latency" in parts) + ("memory" in parts)
    units += sum(options["steps"][name] for name in models) // 10
    with progress_bar(units) as bar:
        if "latency" in parts:
            bar.set_description("host latency, 1 x 128")
            if "latency/module/forward+backward" not in results:
                for key, entry in time_latency(seconds).items():
                    results.put(key, entry)
            bar.update()
        if "memory" in parts:
            bar.set_description("memory")
            for kind, dtype, (rows, n) in itertools.product(kinds, dtypes, shapes["memory"]):
                args = (kind, rows, n, dtype, device, bool(compiled))
                results.run(memory_key(*args[:4]), partial(memory_case, *args))
            bar.update()
        for case in grid:
            bar.set_description(case.key)
            results.run(case.key, partial(time_case, case, device, seconds, options["full"]))
            bar.update()
        for name in models:
            bar.set_description(f"training, {name}")
            train = partial(train_side_by_side, name, LEARNED, options["steps"][name], device)
            results.run(f"learning/{name}", partial(train, progress=lambda: bar.update(0.1)))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 130 stopped."""
    args = parse(argv)
    keep_freed_memory()
    options = options_of(args)
    folder = args.out or RESULTS / hardware_slug(environment())
    results = Results(folder / "norms.json", "norms", options, resume=not args.fresh)
    return results.complete(partial(run, results, options), report.write)


if __name__ == "__main__":
    sys.exit(main())
