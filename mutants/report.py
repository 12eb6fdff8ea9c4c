"""What the runs found, kept from one to the next, and docs/mutants.md from it."""

from __future__ import annotations

import datetime
import json
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import Layer, Mutant

__all__ = ["Outcome", "Outcomes", "markdown"]


class Outcome(NamedTuple):
    layer: Layer
    mutant: Mutant
    by: str | None  # what caught it; None: a survivor
    tried: str  # day and commit


class Outcomes:
    """By mutant, in a JSON file. A mutant that is written differently is another one."""

    def __init__(self, path: Path, root: Path) -> None:
        self.path = path
        self.tried = f"{datetime.date.today().isoformat()}, commit {_commit(root)}"
        self.found: dict[str, list[str | None]] = {}
        if path.exists():
            self.found = json.loads(path.read_text())

    def put(self, layer: Layer, mutant: Mutant, by: str | None) -> None:
        self.found[f"{layer.name} {mutant!r}"] = [by, self.tried]
        self.path.write_text(json.dumps(self.found, indent=1))

    def all(self, layers: Sequence[Layer]) -> list[Outcome]:
        """SystemExit if one has not been tried."""
        found = []
        for layer in layers:
            for mutant in layer.mutants:
                by, tried = self.found.get(f"{layer.name} {mutant!r}", (None, None))
                if tried is None:
                    why = f"--write: some faults of the layer {layer.name} have not been tried yet"
                    raise SystemExit(why)
                found.append(Outcome(layer, mutant, by, tried))
        return found


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _commit(root: Path) -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()


def markdown(outcomes: Sequence[Outcome]) -> str:
    caught = [o for o in outcomes if o.by]
    explained = [o for o in outcomes if not o.by and o.mutant.why]
    tried = Counter((o.layer.name, o.tried) for o in outcomes)
    lines = [
        "# Planted faults",
        "",
        "`make mutants` plants each of these faults, which a change could make, into a copy of the",
        "sources, and runs the tests named for it. A test that passes over a fault is too weak.",
        "",
        f"{len(outcomes)} faults, {len(caught)} caught"
        + (f", {len(explained)} that no test can notice" if explained else "")
        + f", {len(outcomes) - len(caught) - len(explained)} that survive.",
        "",
        *(f"- {name}: {count}, tried {when}" for (name, when), count in tried.items()),
        "",
        "| where | fault | caught by |",
        "| --- | --- | --- |",
    ]
    for layer, mutant, by, _ in outcomes:
        found = by or (f"cannot be noticed: {mutant.why}" if mutant.why else "**nothing**")
        lines.append(f"| {layer.path(mutant)} | {_cell(mutant.what)} | {_cell(found)} |")
    return "\n".join([*lines, ""])
