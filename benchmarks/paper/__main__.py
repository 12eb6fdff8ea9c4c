"""The paper's benchmark: ``python -m benchmarks.paper`` (``make paper``).

time        a training step of each model with each norm, and the share that is normalisation
quality     small real tasks: final metric and learning curve of each norm, several seeds
properties  the paper's Table 1 in numbers; gradients when few elements are in the statistic

Writes paper.json into benchmarks/results/<hardware>/ and, from it, paper.md and plots; at a --scale
that is not the device's default paper_scale_1.json and so on. Ctrl-C keeps what is done; the same
command goes on from there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..harness.environment import environment, hardware_slug, keep_freed_memory
from ..harness.optional import progress_bar
from ..harness.results import RESULTS, Results
from . import report
from .models import MODELS
from .norms import NORMS, PARTIAL, TIMED
from .properties import gradient_norms, invariance
from .quality import train_task
from .step_time import time_model
from .tasks import TASKS

PARTS = ("properties", "time", "quality")
TRAINED = ("none", "layer_norm", "rms_norm", *PARTIAL)

# On a CPU a step of any model takes some 0.05 ... 0.5 s on two cores; at 1, up to ten seconds.
CPU_SCALE = 0.1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    add("--norms", nargs="+", choices=NORMS, metavar="NORM", help="instead of each part's own")
    add(
        "--scale",
        type=float,
        help="of batch, length and vocabulary in time, never of a width; 1: the "
        f"models' own sizes (default {CPU_SCALE} on a CPU, 1 on a GPU)",
    )
    add("--seconds", type=float, default=50.0, help="of measuring per model (default 50)")
    add("--steps", type=int, help="of training, instead of each task's own")
    add("--seeds", type=int, default=3, help="how many (default 3)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--fresh", action="store_true", help="do not resume a run that was stopped")
    add("--out", type=Path, help="folder of the results")
    return parser.parse_args(argv)


def default_scale(device: str) -> float:
    return CPU_SCALE if torch.device(device).type == "cpu" else 1.0


def file_name(options: dict[str, Any]) -> str:
    """The default scale's results are not overwritten by those of another."""
    if options["scale"] == default_scale(options["device"]):
        return "paper.json"
    return f"paper_scale_{options['scale']:g}.json"


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The run, spelt out; recorded in the results."""
    scale = default_scale(args.device) if args.scale is None else args.scale
    if not 0 < scale <= 1:
        raise SystemExit(f"--scale must be in (0, 1], but got {scale}")
    return {
        "parts": args.only,
        "models": args.models,
        "tasks": args.tasks,
        "timed": args.norms or list(TIMED),
        "trained": args.norms or list(TRAINED),
        "scale": scale,
        "seconds": args.seconds,
        "steps": {name: args.steps or TASKS[name].steps for name in args.tasks},
        "seeds": args.seeds,
        "device": args.device,
    }


def run(results: Results, options: dict[str, Any]) -> None:
    """Everything that ``options`` asks for and ``results`` does not have yet."""
    device, parts = torch.device(options["device"]), options["parts"]
    models = options["models"] if "time" in parts else []
    tasks = options["tasks"] if "quality" in parts else []
    units = 2 * ("properties" in parts) + len(models) + len(tasks) * options["seeds"]
    with progress_bar(units) as bar:
        if "properties" in parts:
            bar.set_description("invariances")
            results.run("properties/invariance", lambda: invariance(device))
            bar.update()
            bar.set_description("gradients")
            results.run("properties/gradients", lambda: gradient_norms(device))
            bar.update()
        for name in models:
            bar.set_description(f"time, {name}")
            results.run(
                f"time/{name}",
                lambda: time_model(
                    name,  # noqa: B023
                    options["timed"],
                    options["scale"],
                    device,
                    options["seconds"],
                ),
            )
            bar.update()
        # Seed by seed: a run that is stopped has something of every task.
        for seed in range(options["seeds"]):
            for name in tasks:
                bar.set_description(f"{name}, seed {seed}")
                _train(results, options, name, seed, device, bar)


def _train(
    results: Results, options: dict[str, Any], name: str, seed: int, device: torch.device, bar: Any
) -> None:
    steps, start = options["steps"][name], bar.n
    results.run(
        f"quality/{name}/{seed}",
        lambda: train_task(
            name, options["trained"], seed, steps, device, lambda: bar.update(1 / steps)
        ),
    )
    bar.update(start + 1 - bar.n)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 130 stopped."""
    options = options_of(args := parse(argv))
    keep_freed_memory()
    folder = args.out or RESULTS / hardware_slug(environment())
    results = Results(folder / file_name(options), "paper", options, resume=not args.fresh)
    return results.complete(partial(run, results, options), report.write)


if __name__ == "__main__":
    sys.exit(main())
