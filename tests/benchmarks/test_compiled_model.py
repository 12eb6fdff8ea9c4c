"""The model of benchmarks/compiled by hand-made examples; its counts: test_ptx_counts.py."""

from typing import Any

import numpy as np
import pytest
from ptx.machine import Options
from ptx.parse import Module
from ptx.program import Program
from ptx.snippet import ENTRY, run_snippet

from benchmarks.compiled.flight import bytes_in_flight
from benchmarks.compiled.gpus import GPUS, LATENCY, resident
from benchmarks.compiled.model import model

GPU = {g.name: g for g in GPUS}


@pytest.mark.parametrize(
    ("gpu", "threads", "registers", "shared", "blocks"),
    [
        ("H100", 256, 32, 0, 8),  # 2048 threads
        ("H100", 128, 64, 0, 8),  # 65536 registers: 8 a warp's 2048 and four warps
        ("H100", 128, 65, 0, 7),  # given in lots of 256 a warp: 72 each
        ("H100", 32, 16, 0, 32),  # blocks
        ("H100", 512, 64, 100 << 10, 2),  # 228 KB, of which each takes 1 KB more
        ("A100", 512, 64, 100 << 10, 1),
        ("RTX PRO 6000", 1024, 32, 0, 1),  # 1536 threads
        ("RTX PRO 6000", 128, 32, 48 << 10, 2),
        ("RTX PRO 6000", 128, 32, 50 << 10, 1),
    ],
)
def test_resident_blocks(gpu: str, threads: int, registers: int, shared: int, blocks: int) -> None:
    assert resident(GPU[gpu], threads, registers, shared) == blocks


def counts(**changed: Any) -> dict[str, Any]:
    """A row of 4096 bf16 that is read and written once: 512 vectors, 16 warps' worth."""
    plain = {
        "threads of a block": 128,
        "shared bytes": 0,
        "vectors": 512,
        "bytes in flight per thread": 64,
        "bytes read": 8192,
        "bytes written": 8192,
        "sectors": 512.0,
        "sectors stored": 256.0,
        "sectors read once": 256.0,
        "wavefronts": 0.0,
    }
    return plain | changed


MADE: dict[str, Any] = {"registers": 64, "instructions": {"float": 40.0, "load.global": 1.0}}


def test_times_of_each_resource() -> None:
    h100, made = GPU["H100"], MADE
    found = model(h100, counts(), made)
    clocks = 132 * 1.755e9
    want = {
        "memory": 16384 / (0.896 * 3.35e12),
        "L2": 512 * 32 / (27.5 * clocks),
        "L1": 128 / clocks,
        "issue": 41 * 16 / (4 * clocks),
        "latency": 8192 * LATENCY / (64 * 128 * 8 * 132),
    }
    assert found["ns"] == pytest.approx({k: v * 1e9 for k, v in want.items()}, abs=1e-3)
    assert (found["binds"], found["share of memory"], found["blocks"]) == ("memory", 1.0, 8)


@pytest.mark.parametrize(
    ("binds", "changed", "made"),
    [
        ("issue", {}, {"instructions": {"float": 400.0}}),
        ("L2", {"sectors stored": 2048.0}, {}),
        ("L1", {"wavefronts": 3000.0}, {}),
        ("latency", {"bytes in flight per thread": 4}, {}),
    ],
)
def test_what_binds(binds: str, changed: dict[str, Any], made: dict[str, Any]) -> None:
    found = model(GPU["H100"], counts(**changed), MADE | made)
    assert found["binds"] == binds
    share = found["ns"]["memory"] / found["ns"][binds]
    assert found["share of memory"] == pytest.approx(share, abs=1e-3)


LOAD = "ld.global.v2.u32 {{{0}, {1}}}, [%in+{2}];"
FIRST, SECOND = LOAD.format("%r1", "%r2", 0), LOAD.format("%r3", "%r4", 8)
COPY = "cp.async.ca.shared.global [%r10+{0}], [%in+{0}], 8; cp.async.commit_group;"


@pytest.mark.parametrize(
    ("body", "most"),
    [
        (f"{FIRST} {SECOND} add.u32 %r5, %r1, %r3;", 16),
        (f"{FIRST} add.u32 %r5, %r1, %r2; {SECOND} add.u32 %r5, %r5, %r3;", 8),
        # A move is no use, and its copy is the load's, too.
        (f"{FIRST} mov.u32 %r9, %r2; {SECOND} add.u32 %r5, %r9, %r3;", 16),
        (f"{FIRST} mov.u32 %r9, %r2; add.u32 %r5, %r9, 1; {SECOND}", 8),
        (f"{FIRST} mov.b32 {{%h1, %h2}}, %r2; {SECOND} add.u32 %r5, %r1, %r3;", 16),
        ("mov.u32 %r10, 1024;" + COPY.format(0) + COPY.format(8) + "cp.async.wait_group 0;", 16),
        (
            "mov.u32 %r10, 1024;"
            + COPY.format(0)
            + "cp.async.wait_group 0;"
            + COPY.format(8)
            + "cp.async.wait_group 0;",
            8,
        ),
    ],
)
def test_bytes_in_flight(body: str, most: int) -> None:
    body += " st.global.u32 [%out], 1;"
    options = Options(count=True, races=False)
    _, counted = run_snippet(body, np.zeros((32, 4), np.uint32), shared=64, options=options)
    program = Program(Module(ENTRY.format(body=body, size_in=16, size_out=4)).entry("snippet"))
    assert bytes_in_flight(program, counted.trace, counted.arrays, ["in"]) == most
    assert bytes_in_flight(program, counted.trace, counted.arrays, ["other"]) == 0
