"""The CUDA kernels as nvcc compiles them, executed on the CPU by the interpreter in ptx.

Every kernel that a launch plan can choose runs on sm_80 and sm_90, under a schedule drawn at
random, with every access checked. Results are held against float64 within derived bounds, and
against the bits of the emulator in simt, which runs the sources. `-m ptx_long` runs every
random case.
"""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import pytest
from ptx import build
from ptx.build import Build
from ptx.checks import Report, chosen, run
from ptx.kernels import Kernels

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
ARCHITECTURES = (80, 90)
DTYPES = ("bf16", "f16", "f32", "f64")  # those with the most kernels first
PERCENT = 3  # of the random cases, in the short form


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    made = Build()
    made.everything()
    return Kernels(made, alone=False)


Parts = dict[tuple[str, int], "Future[Report]"]


def start(percent: int, *sections: str) -> Iterator[Parts]:
    """All parts, in processes that do not share the interpreter's lock."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        yield {
            (x, arch): pool.submit(run, x, arch, percent, sections)
            for arch in reversed(ARCHITECTURES)  # the long ones first: those with clusters
            for x in DTYPES
        }
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def parts(kernels: Kernels) -> Iterator[Parts]:
    yield from start(PERCENT, "each", "general", "values", "bits", "in_place")


@pytest.fixture(scope="module")
def long_parts(kernels: Kernels) -> Iterator[Parts]:
    yield from start(100, "general", "values", "bits", "in_place")


def show(report: Report) -> None:
    print(f"{report.calls} calls of {len(report.kernels)} kernels")
    print("largest errors, as parts of their bounds:", report.worst)
    print("instructions that ran, of those of the kernels that ran:", report.coverage)
    assert not report.failures, "\n".join(report.failures[:20])


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("x", DTYPES)
def test_results_and_every_access(parts: Parts, kernels: Kernels, x: str, arch: int) -> None:
    report = parts[x, arch].result()
    show(report)
    assert not chosen(kernels, x, arch) - report.kernels


@pytest.mark.ptx_long
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("x", DTYPES)
def test_every_random_case(long_parts: Parts, x: str, arch: int) -> None:
    show(long_parts[x, arch].result())
