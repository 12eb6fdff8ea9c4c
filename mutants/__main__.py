"""Plants the faults, runs the tests, says what survives: ``python -m mutants``.

Exit status: 0 if every fault is caught or known not to be noticeable, else 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import Layer, Mutant
from .binding import BINDING
from .builds import FASTER, build, run
from .cpu import CPU
from .cuda import CUDA
from .planting import SWITCH, copied, only_once, planted
from .python import PYTHON
from .report import Outcomes, markdown

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (CPU, CUDA, BINDING, PYTHON)


def numbered(layers: Sequence[Layer]) -> dict[int, tuple[Layer, Mutant]]:
    every = [(layer, mutant) for layer in layers for mutant in layer.mutants]
    return dict(enumerate(every, start=1))


def texts(mutants: dict[int, tuple[Layer, Mutant]], root: Path) -> dict[str, str]:
    """File -> its text with the C++ mutants planted. ValueError if one's place is not found."""
    files: dict[str, dict[int, Mutant]] = {}
    for number, (layer, mutant) in mutants.items():
        path = layer.path(mutant)
        if layer.name == "python":
            only_once((root / path).read_text(), mutant, path)
        else:
            files.setdefault(path, {})[number] = mutant
    found = {path: planted((root / path).read_text(), own, path) for path, own in files.items()}
    text = (root / FASTER.file).read_text()
    only_once(text, FASTER, FASTER.file)
    found[FASTER.file] = text.replace(FASTER.old, FASTER.new)
    return found


class Runner:
    """Tests on the copy. A test that passes unharmed in t seconds has 60 + 10 t under a mutant."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self.limits: dict[tuple[str, str], float] = {}

    def unharmed(self, layer: Layer, test: str) -> None:
        start = time.monotonic()
        failure = run(layer, self.tree, test, 0, 1200)
        if failure:
            raise SystemExit(f"{layer.name}: {test} fails without any mutant: {failure}")
        self.limits[layer.name, test] = 60 + 10 * (time.monotonic() - start)

    def caught(self, layer: Layer, number: int, mutant: Mutant) -> str | None:
        tests = dict.fromkeys((*mutant.tests, *layer.tests))
        path = self.tree / layer.path(mutant)
        before = path.read_text()
        if layer.name == "python":
            path.write_text(before.replace(mutant.old, mutant.new))
        try:
            for test in tests:
                how = run(layer, self.tree, test, number, self.limits[layer.name, test])
                if how:
                    return how if layer.name in ("binding", "python") else f"{test}: {how}"
            return None
        finally:
            if layer.name == "python":
                path.write_text(before)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mutants", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = [layer.name for layer in LAYERS]
    parser.add_argument("--layers", nargs="+", choices=names, default=names)
    parser.add_argument("--only", help="those whose file or description has this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--write", action="store_true", help="docs/mutants.md, of this run and those before"
    )
    args = parser.parse_args(argv)
    tree = ROOT / "build" / "mutants"
    mutants = numbered(LAYERS)
    copied(ROOT, tree, texts(mutants, ROOT), without=("docs/", "benchmarks/results/"))
    switch = tree / "switch.h"
    if not switch.exists() or switch.read_text() != SWITCH:  # else all would be compiled again
        switch.write_text(SWITCH)

    runner, outcomes = Runner(tree), Outcomes(tree / "outcomes.json", ROOT)
    survivors = tried = 0
    for layer in LAYERS:
        own = {
            number: mutant
            for number, (of, mutant) in mutants.items()
            if of is layer and (not args.only or args.only in f"{mutant.file} {mutant.what}")
        }
        if layer.name not in args.layers or not own:
            continue
        build(layer, tree, args.jobs)
        for test in dict.fromkeys((*layer.tests, *(t for m in own.values() for t in m.tests))):
            runner.unharmed(layer, test)
        jobs = 1 if layer.name == "python" else args.jobs  # one edit at a time
        with ThreadPoolExecutor(jobs) as pool:
            found = {n: pool.submit(runner.caught, layer, n, m) for n, m in own.items()}
            for number, mutant in own.items():
                by = found[number].result()
                outcomes.put(layer, mutant, by)
                tried, survivors = tried + 1, survivors + (not by and not mutant.why)
                said = by or mutant.why or "SURVIVES"
                print(f"{layer.path(mutant)}: {mutant.what}: {said}", flush=True)
    print(f"{tried} faults, {survivors} survive")
    if args.write:
        (ROOT / "docs" / "mutants.md").write_text(markdown(outcomes.all(LAYERS)))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
