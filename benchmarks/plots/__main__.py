"""``python -m benchmarks.plots [NAME...]``: draws the plots of the documentation."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import compiled, models, norms
from .style import NotMeasured

PLOTS = {**norms.PLOTS, **models.PLOTS, **compiled.PLOTS}
FOLDER = Path(__file__).parents[2] / "docs" / "plots"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PLOTS)}; all, if none is given")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder, docs/plots if not given")
    options = parser.parse_args()
    if unknown := set(options.names) - PLOTS.keys():
        parser.error(f"no such plot: {', '.join(sorted(unknown))}")
    options.out.mkdir(parents=True, exist_ok=True)
    for name, draw in PLOTS.items():
        if not options.names or name in options.names:
            try:
                draw(options.out / f"{name}.svg")
            except NotMeasured as why:
                print(f"not drawn: {why}")
            else:
                print(options.out / f"{name}.svg")


if __name__ == "__main__":
    main()
