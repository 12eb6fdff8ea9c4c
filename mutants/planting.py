"""A copy of the sources with all C++ mutants in it, each behind a switch.

``old`` becomes ``(fused_rmsnorm_mutant(7) ? (new) : (old))``, and the environment variable MUTANT
says at run time which number is wanted. So both are expressions of one type, evaluated
at run time: neither template arguments nor constants.
"""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from . import Mutant

__all__ = ["SWITCH", "VARIABLE", "copied", "only_once", "planted"]

VARIABLE = "MUTANT"
# Included before everything else. Static: translation units for different processors share nothing.
SWITCH = f"""#pragma once
#include <cstdlib>
static const int fused_rmsnorm_chosen_mutant =
    std::getenv("{VARIABLE}") ? std::atoi(std::getenv("{VARIABLE}")) : 0;
[[maybe_unused]] static inline bool fused_rmsnorm_mutant(int i) {{
  return fused_rmsnorm_chosen_mutant == i;
}}
"""


def only_once(text: str, mutant: Mutant, path: str) -> None:
    """ValueError where the mutant's text is not there, or not alone."""
    count = text.count(mutant.old)
    if count != 1:
        raise ValueError(f"{path} has {count} times, not once: {mutant.old!r}")


def planted(text: str, mutants: Mapping[int, Mutant], path: str) -> str:
    """``text``, of the file ``path``, with the mutants by their numbers behind their switches."""
    places = []
    for number, mutant in mutants.items():
        only_once(text, mutant, path)
        start = text.index(mutant.old)
        choice = f"(fused_rmsnorm_mutant({number}) ? ({mutant.new}) : ({mutant.old}))"
        places.append((start, start + len(mutant.old), choice))
    places.sort()
    for (_, end, _), (start, _, choice) in itertools.pairwise(places):
        if start < end:
            raise ValueError(f"{path}: two mutants overlap at {choice}")
    for start, end, choice in reversed(places):
        text = text[:start] + choice + text[end:]
    return text


def copied(root: Path, to: Path, changed: Mapping[str, str], without: Iterable[str] = ()) -> None:
    """The files of the checkout ``root`` in ``to``, some with another text.

    Only what differs is written, so that a second build compiles only that.
    """
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=root, check=True, capture_output=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    skipped = tuple(without)
    for name in names:
        source = root / name
        if not name or name.startswith(skipped) or not source.is_file():
            continue
        content = changed[name].encode() if name in changed else source.read_bytes()
        target = to / name
        if not target.exists() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            target.chmod(source.stat().st_mode)
