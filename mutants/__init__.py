"""Planted faults, and which tests notice them: ``make mutants``.

A mutant is a small fault that a change could make: a text of the sources, and what stands there
instead. C++ mutants are expressions, and all of them are planted at once, each behind a switch
(:mod:`.planting`): one build serves all, and a mutant costs no more than the tests that run under
it. Python mutants are edits of a file, one after the other.

cpu, cuda, binding, python   the faults, by layer
planting                     a copy of the sources with the faults in it
builds                       what is built of the copy, and how tests run on it
report                       docs/mutants.md
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Layer", "Mutant"]


@dataclass(frozen=True)
class Mutant:
    """In ``file``, ``new`` in place of ``old``, a text that stands there exactly once."""

    file: str
    old: str
    new: str
    what: str
    tests: tuple[str, ...] = ()  # of the layer's, those that are tried first
    why: str = ""  # for one that no test can notice: the reason


@dataclass(frozen=True)
class Layer:
    """Mutants that are tested in one way. ``tests``: tried in turn, until one fails."""

    name: str
    folder: str  # of the files
    tests: tuple[str, ...]
    mutants: tuple[Mutant, ...] = field(repr=False)

    def path(self, mutant: Mutant) -> str:
        return f"{self.folder}/{mutant.file}"
