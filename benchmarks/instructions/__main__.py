"""Instructions per element of the CPU kernels, counted, not timed.

python -m benchmarks.instructions           counts and compares with the numbers that are kept
python -m benchmarks.instructions --write   keeps what it counts
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from .count import COUNTED, DRIVER, KEPT, build, compiler, count, missing


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.instructions",
        description=__doc__.splitlines()[0] if __doc__ else None,
    )
    parser.add_argument("--write", action="store_true", help=f"keep the counts in {KEPT.name}")
    args = parser.parse_args(argv)
    folder = DRIVER.parents[2] / "build" / "cpu-kernels-plain"
    driver = build(folder)
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for kernels in COUNTED:
        if why := missing(driver, kernels):
            print(f"{kernels}: not counted, {why}")
            continue
        with tempfile.TemporaryDirectory() as scratch:
            now = count(driver, kernels, Path(scratch))
        before = kept.get(kernels, {})
        for name, value in now.items():
            print(f"{kernels:7} {name:28} {value:6.3f}   kept {before.get(name, '-')}")
        kept[kernels] = now
    if args.write:
        kept = {"compiler": compiler(folder), **{k: kept[k] for k in COUNTED if k in kept}}
        KEPT.parent.mkdir(parents=True, exist_ok=True)
        KEPT.write_text(json.dumps(kept, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
