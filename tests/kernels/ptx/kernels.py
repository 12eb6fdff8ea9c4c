"""The project's kernels: fills its argument structs, asks its launch code (launches.cpp) what a
call would launch, and runs that."""

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arithmetic import bf16_bits, bf16_value
from .build import Build
from .counters import Counts
from .isa import GLOBAL_BASE
from .machine import Launch, Options, run
from .memory import Global
from .parse import Module
from .program import Program

DTYPES = ("f32", "f16", "bf16", "f64")  # as enum Dtype
SIZE = {"f32": 4, "f16": 2, "bf16": 2, "f64": 8}
RAW: dict[str, Any] = {"f32": np.float32, "f64": np.float64, "f16": np.float16, "bf16": np.uint16}
PLAN = ("family", "shape", "vector", "threads", "cluster", "rows_per_block", "max_grid")
Array = NDArray[Any]


def encode(values: Array, dtype: str) -> Array:
    """Numbers as they lie in memory."""
    if dtype == "bf16":
        return bf16_bits(np.asarray(values, np.float32))
    return np.asarray(values).astype(RAW[dtype])


def decode(raw: Array, dtype: str) -> Array:
    """float64."""
    return (bf16_value(raw) if dtype == "bf16" else raw).astype(np.float64)


class Kernels:
    """With `alone`, kernels are compiled when they are run: each on its own in seconds, or those
    that are `together` at once. Else with all of their translation unit, in a minute. By default:
    alone, unless all PTX is there already."""

    def __init__(self, build: Build, alone: bool | None = None):
        self.build, self.alone = build, not build.has_all() if alone is None else alone
        self.together: dict[tuple[str, int], list[str]] = {}  # unit and architecture: kernels
        self.host = ctypes.CDLL(str(build.host_library()))
        for name in ("name_of", "layout", "launches_forward", "launches_backward", "plan"):
            getattr(self.host, name).restype = ctypes.c_char_p
        self.host.workspace.restype = ctypes.c_int64
        self.fields: dict[str, tuple[int, int]] = {}  # offset, bytes
        for line in self.host.layout().decode().splitlines():
            field, offset, size = line.split()
            self.fields[field] = int(offset), int(size)
        self.fresh: dict[str, bytes] = {}
        for kind in ("Forward", "Backward"):
            make = getattr(self.host, f"fresh_{kind.lower()}")
            make.restype = ctypes.c_char_p
            self.fresh[kind] = bytes.fromhex(make().decode())
        self._modules: dict[Any, tuple[Module, dict[str, str]]] = {}
        self.programs: dict[tuple[str, int, str], Program] = {}

    def module(self, unit: str, arch: int, kernel: str = "") -> tuple[Module, dict[str, str]]:
        """PTX, and the kernels' names in it by their names in C++."""
        some = self.together.get((unit, arch), [])
        some = some if kernel in some else [kernel]
        path = (
            self.build.ptx_of_kernels(unit, arch, some)
            if self.alone
            else self.build.ptx(unit, arch)
        )
        if path not in self._modules:
            m = Module(path.read_text())
            names = {self.host.name_of(n.encode()).decode(): n for n in m.starts}
            self._modules[path] = m, names
        return self._modules[path]

    def single(self, unit: str, arch: int, kernel: str) -> Path:
        """PTX of this kernel only, for ptxas."""
        module, names = self.module(unit, arch, kernel)
        return self.build.keep(module.extract(names[kernel]), f"{unit}-compute_{arch}")

    def program(self, unit: str, arch: int, kernel: str) -> Program:
        key = (unit, arch, kernel)
        if key not in self.programs:
            module, names = self.module(*key)
            self.programs[key] = Program(module.entry(names[kernel]))
        return self.programs[key]

    def plan(
        self, n: int, x: str, dy: str | None, arch: int, general: bool = False
    ) -> dict[str, int]:
        """The forward's without dy; see csrc/cuda/plan.h."""
        codes = DTYPES.index(x), DTYPES.index(dy) if dy else -1
        numbers = self.host.plan(ctypes.c_int64(n), *codes, arch, general).split()
        return dict(zip(PLAN, map(int, numbers), strict=True))

    def struct(self, kind: str, fields: Mapping[str, Any], moved: int = 0) -> bytes:
        """The bytes of a Forward or Backward. Addresses of the device's memory are `moved`."""
        data = bytearray(self.fresh[kind])

        def put(at: int, size: int, value: Any) -> None:
            if isinstance(value, float):
                data[at : at + size] = np.float64(value).tobytes()
                return
            number = DTYPES.index(value) if isinstance(value, str) else int(value)
            number += moved if number >= GLOBAL_BASE else 0
            data[at : at + size] = number.to_bytes(size, "little", signed=True)

        for name, value in fields.items():
            at, size = self.fields[f"{kind}.{name}"]
            if isinstance(value, dict):  # Rows
                for part, number in value.items():
                    offset, size = self.fields[f"Rows.{part}"]
                    put(at + offset, size, number)
            else:
                put(at, size, value)
        return bytes(data)

    def launches(
        self, kind: str, struct: bytes, arch: int, max_grid: int = 0, emulate: bool = False
    ) -> list[Launch]:
        """What a call launches. Or, given addresses of the host, the project's emulator runs it.

        Raises:
            RuntimeError: the launch code has refused.
        """
        call = getattr(self.host, f"launches_{kind.lower()}")
        said = call(struct, arch, ctypes.c_int64(max_grid), emulate).decode()
        out = []
        for line in said.splitlines():
            if "|" not in line:
                raise RuntimeError(said)
            name, blocks, threads, shared, cluster, *args = line.split("|")
            out.append(
                Launch(
                    name[name.index("&(") + 2 : name.rindex(")>")],
                    *(int(blocks), int(threads), int(shared), int(cluster)),
                    tuple(bytes.fromhex(a) for a in args),
                )
            )
        return out

    def call(
        self,
        kind: str,
        dtype: str,
        struct: bytes,
        arch: int,
        memory: Global,
        options: Options,
        max_grid: int = 0,
    ) -> list[tuple[Launch, Counts]]:
        """Runs what the call launches; dtype: x's."""
        unit = f"{kind.lower()}_{dtype}"
        return [
            (launch, run(self.program(unit, arch, launch.kernel), memory, launch, options))
            for launch in self.launches(kind, struct, arch, max_grid)
        ]
