"""What the runs found, kept from one to the next, and docs/mutants.md from it."""

from __future__ import annotations

import datetime
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from . import Layer, Mutant

__all__ = ["Outcome", "Outcomes", "markdown"]

Outcome = tuple[Layer, Mutant, str | None]  # caught by what; None: a survivor


class Outcomes:
    """By mutant, in a JSON file. A mutant that is written differently is another one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, str | None] = json.loads(path.read_text()) if path.exists() else {}

    def put(self, mutant: Mutant, by: str | None) -> None:
        self.found[repr(mutant)] = by
        self.path.write_text(json.dumps(self.found, indent=1))

    def all(self, layers: Sequence[Layer]) -> list[Outcome]:
        """KeyError for one that has not been tried."""
        return [(layer, m, self.found[repr(m)]) for layer in layers for m in layer.mutants]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _commit(root: Path) -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()


def markdown(outcomes: Sequence[Outcome], root: Path) -> str:
    caught = [o for o in outcomes if o[2]]
    explained = [o for o in outcomes if not o[2] and o[1].why]
    day = datetime.date.today().isoformat()
    lines = [
        "# Planted faults",
        "",
        "`make mutants` plants each of these faults, which a change could make, into a copy of the",
        "sources, and runs the tests named for it. A test that passes over a fault is too weak.",
        "",
        f"{day}, commit {_commit(root)}: {len(outcomes)} faults, {len(caught)} caught"
        + (f", {len(explained)} that no test can notice" if explained else "")
        + f", {len(outcomes) - len(caught) - len(explained)} that survive.",
        "",
        "| where | fault | caught by |",
        "| --- | --- | --- |",
    ]
    for layer, mutant, by in outcomes:
        found = by or (f"cannot be noticed: {mutant.why}" if mutant.why else "**nothing**")
        lines.append(f"| {layer.path(mutant)} | {_cell(mutant.what)} | {_cell(found)} |")
    return "\n".join([*lines, ""])
