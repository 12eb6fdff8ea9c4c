"""A call with random data, held against what is expected."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import expected
from .cases import GATES, Case
from .counters import Counts
from .isa import GLOBAL_BASE, Trap
from .kernels import RAW, SIZE, Kernels, decode, encode
from .machine import Launch, Options
from .memory import Global

Array = NDArray[Any]


class Mismatch(AssertionError):
    """A result that is not what it has to be."""


class Call:
    """One of each: the device's memory is filled as the call needs it. `emulated`: the project's
    emulator runs the same call, on a copy of that memory, and has to leave the same bytes."""

    def __init__(self, kernels: Kernels, case: Case, arch: int, options: Options, emulated: bool):
        self.kernels, self.case, self.arch = kernels, case, arch
        self.options, self.emulated = options, emulated
        c = case
        self.extent = int(c.places().max()) + 1
        tensors = 8 * (self.extent * SIZE[c.x] + c.rows * c.n * 8)
        vectors = 400 * c.weight_rows * c.n * 8  # with the partials of dw and db
        self.memory = Global(tensors + vectors + (1 << 20), options.races)
        self.acc = "f64" if c.x == "f64" else "f32"
        self.given: dict[str, Array] = {}
        self.outputs: dict[str, tuple[int, str, tuple[int, int]]] = {}
        self.launched: list[tuple[Launch, Counts]] = []
        self.worst: dict[
            str, float
        ] = {}  # the largest error of each result, as a part of its bound

    def _numbers(self, name: str, limit: float, count: int, low: float | None = None) -> Array:
        """By a seed and a name alone: the same rows in every layout, whatever their number."""
        random = np.random.default_rng([self.case.seed, *name.encode()])
        numbers = random.uniform(-limit if low is None else low, limit, count)
        if name == "z" and self.case.far:
            # Beyond 86.5 exp(-z) may be less exact; z itself must not make fp16 overflow.
            return np.clip(40 * numbers, -86.5, 86.5 if self.case.sigmoid else 6)
        return numbers

    def _rows(self, name: str, dtype: str, limit: float) -> dict[str, int]:
        """Rows as a slice of wider tokens; what lies between them is outside."""
        c, size, places = self.case, SIZE[dtype], self.case.places()
        own = encode(self._numbers(name, limit, c.rows * c.n), dtype)
        raw = np.zeros(self.extent, RAW[dtype])
        raw[places.reshape(-1)] = own
        at = self.memory.new(self.extent * size, name, c.x_shift * size, raw, writable=c.in_place)
        unused = np.ones(self.extent, bool)
        unused[places.reshape(-1)] = False
        start = at - GLOBAL_BASE
        self.memory.state[start : start + self.extent * size][np.repeat(unused, size)] = 0
        self.given[name] = decode(own, dtype).reshape(c.rows, c.n)
        return {
            "data": at,
            "inner": c.inner,
            "outer_stride": c.token,
            "inner_stride": c.head if c.inner > 1 else 0,
        }

    def _vector(self, name: str, dtype: str, values: Array, shift: int = 0) -> int:
        raw = encode(values, dtype)
        self.given[name] = decode(raw, dtype)
        return self.memory.new(raw.nbytes, name, shift * SIZE[dtype], raw)

    def _affine(self, name: str) -> int:
        c = self.case
        numbers = self._numbers(name, 2, c.weight_rows * c.n)
        numbers[2::7] = -0.0  # whose sign an offset of +0 would change
        at = self._vector(name, c.w, numbers, c.w_shift)
        self.given[name] = self.given[name].reshape(c.weight_rows, c.n)[c.weight_row]
        return at

    def _output(self, name: str, dtype: str, shape: tuple[int, int], over: int = 0) -> int:
        """Its address; `over`: that of an input that is overwritten."""
        size, shifted = SIZE[dtype], name in ("y", "sum", "dx", "dz")
        shift = self.case.out_shift * size if shifted else 0
        at = over or self.memory.new(shape[0] * shape[1] * size, name, shift, writable=True)
        self.outputs[name] = at, dtype, shape
        return at

    def forward(self) -> None:
        c = self.case
        rows, none = (c.rows, c.n), {"data": 0}
        x = self._rows("x", c.x, 3)
        residual = self._rows("residual", c.x, 3) if c.residual else none
        over_x, over_residual = (r["data"] if c.in_place else 0 for r in (x, residual))
        self._run(
            "Forward",
            {
                "eps": 1e-6,
                "y_dtype": c.y,
                "x": x,
                "residual": residual,
                "weight": self._affine("weight") if c.weight else 0,
                "bias": self._affine("bias") if c.bias else 0,
                "z": self._rows("z", c.x, 6) if c.gate else none,
                "y": self._output("y", c.y, rows, over_x),
                "sum": self._output("sum", c.x, rows, over_residual) if c.residual else 0,
                "rstd": self._output("rstd", self.acc, (c.rows, 1)) if c.rstd else 0,
            },
        )
        plan = self.kernels.plan(c.n, c.x, None, self.arch, c.general)
        self._compare(expected.forward(c, plan, self.given))

    def backward(self) -> None:
        c = self.case
        dy, x = self._rows("dy", c.y, 2), self._rows("x", c.x, 3)
        dsum = self._rows("dsum", c.x, 2) if c.residual else {"data": 0}
        over = (dsum if c.residual else dy)["data"] if c.in_place else 0
        rstd = self._vector("rstd", self.acc, self._numbers("rstd", 1.5, c.rows, 0.3))
        fields = {
            "dy_dtype": c.y,
            "dy": dy,
            "x": x,
            "dsum": dsum,
            "z": self._rows("z", c.x, 6) if c.gate else {"data": 0},
            "weight": self._affine("weight") if c.weight else 0,
            "bias": self._affine("bias") if c.weight and c.bias and c.gate else 0,
            "rstd": rstd,
            "dx": self._output("dx", c.x, (c.rows, c.n), over) if c.dx else 0,
            "dz": self._output("dz", c.x, (c.rows, c.n)) if c.dx and c.gate else 0,
            "dw": self._output("dw", c.w, (c.weight_rows, c.n)) if c.dw else 0,
            "db": self._output("db", c.w, (c.weight_rows, c.n)) if c.db else 0,
        }
        struct = self.kernels.struct("Backward", self._common() | fields)
        size = self.kernels.host.workspace(struct, self.arch)
        if size:
            fields["workspace"] = self.memory.new(size, "workspace", writable=True)
        self._run("Backward", fields)
        plan = self.kernels.plan(c.n, c.x, c.y, self.arch, c.general)
        self._compare(expected.backward(c, plan, self.given))

    def _common(self) -> dict[str, Any]:
        c = self.case
        same = {"rows": c.rows, "n": c.n, "k": c.columns, "weight_offset": c.offset}
        same |= {"weight_rows": c.weight_rows, "weight_share": c.weight_share}
        same |= {"weight_has_rows": c.weight_has_rows, "gate": GATES.index(c.gate)}
        same |= {"sigmoid": c.sigmoid, "llama": c.llama}
        return same | {"x_dtype": c.x, "w_dtype": c.w}

    def _run(self, kind: str, fields: dict[str, Any]) -> None:
        kernels, c, memory = self.kernels, self.case, self.memory
        fields = self._common() | fields
        twin = memory.data[: memory.end].copy() if self.emulated else np.zeros(0, np.uint8)
        struct = kernels.struct(kind, fields)
        self.launched = kernels.call(kind, c.x, struct, self.arch, memory, self.options, c.max_grid)
        if not self.emulated:
            return
        moved = kernels.struct(kind, fields, twin.ctypes.data - GLOBAL_BASE)
        kernels.launches(kind, moved, self.arch, c.max_grid, emulate=True)
        for name, at, size in memory.arrays:
            other = np.flatnonzero(twin[at : at + size] != memory.data[at : at + size])
            if name != "workspace" and len(other):
                what = f"{len(other)} of {size} bytes, the first at {other[0]}"
                raise Mismatch(f"{name} is not the emulator's: {what}")

    def raw(self, name: str) -> Array:
        """An output as it lies in memory."""
        at, dtype, shape = self.outputs[name]
        found = self.memory.read(at, shape[0] * shape[1] * SIZE[dtype], RAW[dtype])
        return found.reshape(shape)

    def _compare(self, want: dict[str, expected.Want]) -> None:
        for name, (value, bound_) in want.items():
            got, bound = decode(self.raw(name), self.outputs[name][1]), bound_
            bound = np.broadcast_to(bound, value.shape)
            off = np.abs(got - value)
            wrong = ~(off <= bound)
            if wrong.any():
                at = tuple(int(i) for i in np.argwhere(wrong)[0])
                what = f"got {got[at]!r}, want {value[at]!r} within {bound[at]:.3g}"
                count = f"{int(wrong.sum())} of {value.size} wrong"
                raise Mismatch(f"{name}{list(at)}: {what}; {count}")
            self.worst[name] = float((off / np.maximum(bound, 1e-300)).max())


def call(
    kernels: Kernels,
    case: Case,
    arch: int,
    direction: str,
    options: Options,
    emulated: bool = False,
) -> Call:
    """Runs and compares it.

    Raises:
        Trap, Mismatch: with the case.
    """
    c = Call(kernels, case, arch, options, emulated)
    try:
        getattr(c, direction)()
    except (Trap, Mismatch) as e:
        raise type(e)(f"{direction} sm_{arch} {case}: {e}") from e
    return c
