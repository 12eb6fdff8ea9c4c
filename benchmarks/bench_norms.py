"""The main benchmark: ``python -m benchmarks.bench_norms [--full]`` (``make bench``).

1. speed of the norms alone, against F.layer_norm, F.rms_norm, torch.compile of it, and copies;
2. host latency of the smallest calls;
3. the same character language models trained with LayerNorm, RMSNorm and pRMSNorm.

Writes benchmarks/results/<hardware>/norms.json and, from it, norms.md and plots. Ctrl-C keeps what
is done; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import report
from .harness import RESULTS, Results, environment, hardware_slug, keep_freed_memory
from .language import LANGUAGE_MODELS, train_side_by_side
from .norms_speed import (
    FULL_SHAPES,
    GPU_SHAPES,
    QUICK_COMPILED,
    QUICK_SHAPES,
    cases,
    time_case,
    time_latency,
)

LEARNED = ("layer_norm", "rms_norm", "prms_norm")
QUICK_STEPS = {"gru": 150, "transformer": 250}
FULL_STEPS = {"gru": 2000, "transformer": 4000}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_norms", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--full", action="store_true", help="more shapes, one and all threads, longer training")
    add("--gpu", action="store_true", help="the grid for GPUs instead of the one for CPUs")
    add("--only", nargs="+", choices=("speed", "latency", "learning"), metavar="PART")
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
    grid = GPU_SHAPES if args.gpu else FULL_SHAPES if args.full else QUICK_SHAPES
    shapes = [tuple(int(v) for v in s.split("x")) for s in args.shapes or ()] or list(grid)
    compiled = [] if args.no_compile else shapes if long else list(QUICK_COMPILED)
    return {
        "full": args.full,
        "parts": args.only or ["speed", "latency", "learning"],
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "shapes": [list(s) for s in shapes],
        "compiled": [list(s) for s in compiled],
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
    device = torch.device(options["device"])
    grid = list(
        cases(
            [(rows, n) for rows, n in options["shapes"]],
            [getattr(torch, name) for name in options["dtypes"]],
            options["threads"],
            options["directions"],
            [(rows, n) for rows, n in options["compiled"]],
        )
    )
    parts = options["parts"]
    units = len(grid) * ("speed" in parts) + ("latency" in parts)
    units += sum(options["steps"].values()) // 10 * ("learning" in parts)
    with tqdm(total=units, unit="", bar_format="{l_bar}{bar}| {elapsed}<{remaining}") as bar:
        if "latency" in parts:
            bar.set_description("host latency, 1 x 128")
            if "latency/module/forward+backward" not in results:
                for key, entry in time_latency(options["seconds"]).items():
                    results.put(key, entry)
            bar.update()
        for case in grid if "speed" in parts else ():
            bar.set_description(case.key.removeprefix("speed/"))
            results.run(case.key, lambda: time_case(case, device, options["seconds"]))  # noqa: B023
            bar.update()
        for name in LANGUAGE_MODELS if "learning" in parts else ():
            bar.set_description(f"training, {name}")
            steps = options["steps"][name]

            def train(name: str = name, steps: int = steps) -> dict[str, Any]:
                return train_side_by_side(
                    name, LEARNED, steps, device, progress=lambda: bar.update(0.1)
                )

            results.run(f"learning/{name}", train)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 130 stopped."""
    args = parse(argv)
    keep_freed_memory()
    options = options_of(args)
    folder = args.out or RESULTS / hardware_slug(environment())
    results = Results(folder / "norms.json", "norms", options, resume=not args.fresh)
    if results.entries:
        print(f"going on from {len(results.entries)} entries of a run that was stopped")
    try:
        run(results, options)
    except KeyboardInterrupt:
        print(f"\nstopped: {len(results.entries)} entries kept in {results.partial}")
        return 130
    path = results.finish()
    print()
    print(report.write(path))
    print(f"written to {path.parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
