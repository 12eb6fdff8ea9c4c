"""A results file: kept on disk after each entry, so that a run can be stopped and resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .environment import environment

__all__ = ["RESULTS", "SCHEMA", "Results", "load"]

SCHEMA = 1
RESULTS = Path(__file__).parents[1] / "results"


def _fingerprint(env: dict[str, Any]) -> str:
    """What must be the same for two halves of a run to be one run (clocks move by themselves)."""
    cpu = {k: v for k, v in env["cpu"].items() if k != "clock_mhz"}
    gpu = env["gpu"] and {k: v for k, v in env["gpu"].items() if not k.startswith("clocks")}
    return json.dumps({**env, "cpu": cpu, "gpu": gpu}, sort_keys=True)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A results file.

    Raises:
        ValueError: written by another schema.
    """
    data = json.loads(Path(path).read_text())
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {data.get('schema')}, this code reads {SCHEMA}")
    return data


class Results:
    """A results file that grows entry by entry.

    Until ``finish`` it is ``<name>.partial.json``. If one is there from a run that was stopped,
    with the same options on the same machine and build, its entries are kept. One of other options
    is set aside as ``<name>.partial.old.json``. ``note`` says which of these happened, "" if none.

    Args:
        path: of the finished file.
        kind: what wrote it, e.g. "norms"; decides how it is reported.
        options: of the run; entries of other options are not reused.
        resume: False: start anew.
    """

    def __init__(
        self, path: Path, kind: str, options: dict[str, Any], *, resume: bool = True
    ) -> None:
        self.path = path
        self.partial = path.with_suffix(".partial.json")
        self.note = ""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": kind,
            "started": now,
            "options": options,
            "environment": environment(),
            "complete": False,
            "entries": {},
        }
        if resume and self.partial.exists():
            if (old := self._usable()) is not None:
                self.data = old
                self.note = f"going on from {len(self.entries)} entries of a run that was stopped"
            else:
                aside = path.with_suffix(".partial.old.json")
                os.replace(self.partial, aside)
                self.note = f"a run that was stopped differs from this one: kept as {aside.name}"

    def _usable(self) -> dict[str, Any] | None:
        """What a stopped run left, if it is this run's."""
        try:
            old = load(self.partial)
        except ValueError:
            return None
        new = json.loads(json.dumps(self.data))
        same = all(old[k] == new[k] for k in ("kind", "options"))
        same &= _fingerprint(old["environment"]) == _fingerprint(new["environment"])
        return old if same else None

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        return self.data["entries"]

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def put(self, key: str, entry: dict[str, Any]) -> None:
        """Keeps ``entry`` and writes the file. Timings may be given as such."""
        self.entries[key] = json.loads(json.dumps(entry, default=asdict))
        self._write(self.partial)

    def run(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The entry, made now unless it is there from before."""
        if key not in self:
            self.put(key, make())
        return self.entries[key]

    def finish(self) -> Path:
        """Puts the finished file in its place."""
        self.data["complete"] = True
        self.data["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._write(self.partial)
        os.replace(self.partial, self.path)
        return self.path

    def complete(self, work: Callable[[], None], report: Callable[[Path], str]) -> int:
        """Does the work, which fills this file, and reports it. Exit status: 0, or 130 stopped."""
        if self.note:
            print(self.note)
        try:
            work()
        except KeyboardInterrupt:
            print(f"\nstopped: {len(self.entries)} entries kept in {self.partial}")
            return 130
        path = self.finish()
        print(f"\n{report(path)}\nwritten to {path.parent}")
        return 0

    def _write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(temporary, path)
