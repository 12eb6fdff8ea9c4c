"""Installs what is missing of requirements files: python requirements/ensure.py FILE...

Where all is there, nothing is asked of pip or the network. A line may end in "# optional: WHAT IS
LOST": if such a package cannot be installed, that is said, and the rest goes on without it.
"""

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple


class Requirement(NamedTuple):
    """``lost``: what goes missing without it; None if nothing works without it."""

    line: str
    name: str
    operator: str
    version: str
    lost: "str | None"


def read(path: Path) -> "list[Requirement]":
    """Lines "name", "name>=1.2", "name==1.2" and "-r other.txt" are understood, others an error."""
    found = []
    for text in path.read_text().splitlines():
        line, _, comment = (part.strip() for part in text.partition("#"))
        if line.startswith("-r "):
            found += read(path.parent / line[3:].strip())
        elif line:
            match = re.fullmatch(r"([\w.-]+)(?:(>=|==)([\d.]+))?", line)
            if not match:
                raise SystemExit(f"{path}: cannot read {line!r}")
            lost = comment.removeprefix("optional:").strip() if "optional:" in comment else None
            found.append(Requirement(line, match[1], match[2] or "", match[3] or "", lost))
    return found


def numbers(version: str) -> "tuple[int, ...]":
    """ "3.24.1rc2" -> (3, 24, 1)."""
    return tuple(int(n) for n in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))  # type: ignore[index]


def present(r: Requirement) -> bool:
    """As a Python package or, for build tools, as a program on the PATH."""
    try:
        version = metadata.version(r.name)
    except metadata.PackageNotFoundError:
        if r.name not in ("cmake", "ninja") or not shutil.which(r.name):
            return False
        said = subprocess.run([r.name, "--version"], capture_output=True, text=True, check=False)
        found = re.search(r"\d+\.\d+[\d.]*", said.stdout)
        version = found[0] if found else "0"
    if r.operator == "==":
        return version == r.version
    return not r.operator or numbers(version) >= numbers(r.version)


def main(paths: "list[str]") -> int:
    """Exit status: 0, or 1 if something is missing that is not optional."""
    wanted = {r.name: r for path in paths for r in read(Path(path))}
    missing = [r for r in wanted.values() if not present(r)]
    if not missing:
        return 0
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*pip, *(r.line for r in missing)], check=False).returncode == 0:
        return 0
    needed = [r for r in missing if r.lost is None]
    if needed and len(needed) < len(missing):
        subprocess.run([*pip, *(r.line for r in needed)], check=False)
        needed = [r for r in needed if not present(r)]
    for r in missing:
        if r.lost is not None:
            print(f"{r.line} is missing and cannot be installed: {r.lost}", flush=True)
    if needed:
        print(
            f"missing for {sys.executable}, and pip cannot install it (offline?): "
            f"{', '.join(r.line for r in needed)}\n"
            "Carry the wheels here: pip install --no-index --find-links FOLDER PACKAGE.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
