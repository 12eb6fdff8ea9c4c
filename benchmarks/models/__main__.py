"""What a swap of the norms is worth in real models: ``python -m benchmarks.models``.

Models of transformers with random weights, at published widths (nothing is downloaded): the
original against what replace_rms_norm_ makes of it, each in eager mode and under torch.compile:

prefill    the pass of a prompt, for the next token's logits (of T5 the encoder's, and a token's)
decode     one token after that prompt, with a static cache
train      forward, loss, backward and Adam on one sequence; also the bytes kept for the backward

Only the rows in bf16 are compiled; --compiled float32 bfloat16 compiles all of them. All variants
share their parameters, live in one process and take turns. In the rows in bf16 the whole model and
Adam's state are in bf16.

Writes models.json into benchmarks/results/<hardware>/ and, from it, models.md and models.png.
Ctrl-C keeps what is done; the same command goes on from there.
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
from .families import FAMILIES, LAYERS, transformers
from .timing import norms_left, swap, time_work
from .works import WORKS

__all__ = ["main"]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--models", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="MODEL")
    add("--works", nargs="+", choices=WORKS, default=list(WORKS), metavar="WORK")
    add("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    add("--layers", type=int, default=LAYERS, help=f"of each model (default {LAYERS})")
    add("--length", type=int, default=128, help="tokens of the prompt (default 128)")
    add("--seconds", type=float, default=8.0, help="of measuring per row (default 8)")
    add(
        "--compiled",
        nargs="*",
        default=["bfloat16"],
        metavar="DTYPE",
        help="dtypes whose rows "
        "are also run compiled, which takes most of the time (default bfloat16)",
    )
    add("--backend", default="inductor", help="of torch.compile (default inductor)")
    add("--small", action="store_true", help="tiny widths: to try the command, not to measure")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--fresh", action="store_true", help="do not resume a run that was stopped")
    add("--out", type=Path, help="folder of the results")
    return parser.parse_args(argv)


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The run, spelt out; recorded in the results."""
    options = {k: v for k, v in vars(args).items() if k not in ("fresh", "out")}
    return {**options, "transformers": transformers().__version__}


def run(results: Results, options: dict[str, Any]) -> None:
    """Everything that ``options`` asks for and ``results`` does not have yet."""
    device, small = torch.device(options["device"]), options["small"]
    todo = [(dtype, model) for model in options["models"] for dtype in options["dtypes"]]
    with progress_bar(len(todo) * len(options["works"])) as bar:
        for dtype, model in todo:
            keys = {work: f"models/{model}/{dtype}/{work}" for work in options["works"]}
            if any(key not in results for key in keys.values()):
                family = FAMILIES[model]
                original = family.make(small, options["layers"]).to(device, getattr(torch, dtype))
                swapped, norms = swap(original)
                models = {"original": original, "swapped": swapped}
                shared = {
                    "model": model,
                    "dtype": dtype,
                    "norms": len(norms),
                    "widths": sorted({norm.normalized_shape[0] for norm in norms.values()}),
                    "left": norms_left(swapped),
                    "parameters": sum(p.numel() for p in original.parameters()),
                }
                random = torch.Generator().manual_seed(0)
                tokens = torch.randint(3, 64, (1, options["length"]), generator=random).to(device)
            for work, key in keys.items():
                bar.set_description(f"{model}, {dtype}, {work}")
                results.run(
                    key,
                    lambda: {
                        **shared,  # noqa: B023
                        **time_work(
                            work,  # noqa: B023
                            models,  # noqa: B023
                            tokens,  # noqa: B023
                            options["seconds"],
                            options["backend"] if dtype in options["compiled"] else None,  # noqa: B023
                        ),
                    },
                )
                bar.update()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 130 stopped."""
    options = options_of(args := parse(argv))
    keep_freed_memory()
    folder = args.out or RESULTS / hardware_slug(environment())
    results = Results(folder / "models.json", "models", options, resume=not args.fresh)
    return results.complete(partial(run, results, options), report.write)


if __name__ == "__main__":
    sys.exit(main())
