"""What a row costs in the compiled kernels is what benchmarks/results/compiled says: a change that
costs instructions, sectors or bank conflicts is seen, and one that saves them is written down.

Where this fails and the change is meant: ``python -m benchmarks.compiled`` counts anew.
"""

import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import pytest
from ptx import build
from ptx.build import Build

from benchmarks.compiled import RESULTS
from benchmarks.compiled.count import compile_together
from benchmarks.compiled.grid import GRID, HELD
from benchmarks.compiled.worker import begin, counts_of

FILE = RESULTS / "counts.json"
WRITTEN: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
# The counts depend on nothing but the PTX, so they repeat exactly. Half a percent lets a compiler's
# patch pass.
TOLERANCE = 0.005
EXACT = ("kernel", "threads of a block", "cluster", "bytes read", "bytes written")
HELD_COUNTS = (
    *("sectors", "sectors stored", "sectors read once", "wavefronts"),
    *("bytes in flight per thread", "shared bytes"),
)


def why_not() -> str | None:
    if reason := build.why_not():
        return reason
    if not WRITTEN:
        return "there are no counts yet: python -m benchmarks.compiled"
    made_by = WRITTEN["nvcc"]
    return None if build.compiler() == made_by else f"the counts are those of {made_by}"


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(scope="module")
def counted() -> Iterator[dict[str, "Future[dict[str, Any]]"]]:
    held = [c for c in GRID if c.name in HELD]
    together = compile_together(Build(), GRID, [90])  # as the benchmark does
    workers = ProcessPoolExecutor(
        os.cpu_count(), multiprocessing.get_context("spawn"), begin, (together,)
    )
    with workers as pool:
        yield {c.name: pool.submit(counts_of, c, 90) for c in held}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", HELD)
def test_counts(counted: dict[str, "Future[dict[str, Any]]"], name: str) -> None:
    got, want = counted[name].result(), WRITTEN["counts"]["sm_90"][name]
    assert {k: got[k] for k in EXACT} == {k: want[k] for k in EXACT}
    assert {k: got[k] for k in HELD_COUNTS} == pytest.approx(
        {k: want[k] for k in HELD_COUNTS}, rel=TOLERANCE
    )
    assert got["ptx"] == pytest.approx(want["ptx"], rel=TOLERANCE, abs=0.05)
    assert got["sectors"] >= got["least sectors"]


def test_the_results_are_of_this_grid() -> None:
    grid = [c.name for c in GRID]
    for table in (*WRITTEN["counts"].values(), *WRITTEN["models"].values()):
        assert list(table) == [name for name in grid if name in table]
    assert set(HELD) <= set(WRITTEN["counts"]["sm_90"])
