"""python -m fuzz: random calls of everything public, or a soak. See --help and docs/broken.md."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="number of the first call")
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=600, help="time limit")
    parser.add_argument("--call", help="one call, as a report prints it")
    parser.add_argument(
        "--sanitize", action="store_true", help="under AddressSanitizer and UBSan (builds them)"
    )
    parser.add_argument("--soak", action="store_true", help="train a small model for --seconds")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.sanitize and "FUZZ_SANITIZED" not in os.environ:
        from . import sanitized

        environment = {**os.environ, **sanitized.environment(sanitized.build())}
        environment["PYTHONPATH"] += os.pathsep + str(ROOT)
        environment |= {"FUZZ_SANITIZED": "1", "FUZZ_HANG": "300"}
        again = [sys.executable, "-m", "fuzz", *sys.argv[1:]]
        return subprocess.run(again, env=environment, cwd=ROOT, check=False).returncode
    sys.path.insert(0, str(ROOT / "tests" / "support"))  # cases.py asks for reference
    if options.soak:
        from . import soak

        return soak.run(options.seconds, options.seed)
    from . import server

    if options.call:
        call = json.loads(options.call)
        text = server.once(call)
        print(text or "nothing wrong")
        return bool(text)
    begin = time.monotonic()
    counts, findings = server.run(options.seed, options.calls, options.seconds)
    server.report(findings)
    print(
        f"\n{counts['calls']} calls of {server.kinds(counts)} in {time.monotonic() - begin:.0f} s, "
        f"{counts['skipped']} that torch cannot make; seeds {options.seed} to "
        f"{options.seed + counts['calls'] + counts['skipped'] - 1}"
        f"{', under AddressSanitizer and UBSan' if options.sanitize else ''}: "
        f"{len(findings)} failed"
    )
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
