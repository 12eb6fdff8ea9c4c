"""What the kernels are called with: every plan's edges, dtypes, options, layouts."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .kernels import SIZE, Kernels
from .machine import Options

# x, w, y, llama: what norm.h says is instantiated.
TYPES = (
    *(("f32", "f32", "f32", False), ("f32", "f32", "f32", True), ("f64", "f64", "f64", False)),
    *(("f16", "f16", "f16", False), ("f16", "f16", "f16", True), ("f16", "f32", "f16", False)),
    *(("f16", "f32", "f32", True), ("bf16", "bf16", "bf16", False)),
    *(("bf16", "bf16", "bf16", True), ("bf16", "f32", "bf16", False)),
    ("bf16", "f32", "f32", True),
)
DIRECTIONS = ("forward", "backward")
GATES = ("", "last", "first")  # as enum Gate
T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    x: str = "f32"
    w: str = "f32"
    y: str = "f32"  # and dy
    rows: int = 3
    n: int = 128
    k: int = 0  # 0: n
    llama: bool = False
    weight: bool = True
    bias: bool = False
    residual: bool = False  # the forward's residual, the backward's dsum
    rstd: bool = True
    offset: float = 0.0
    inner: int = 1  # heads of a token
    gap: int = 0  # elements between tokens
    head_gap: int = 0  # and between heads
    x_shift: int = 0  # elements past a multiple of 256 bytes; also of residual, dy, dsum
    w_shift: int = 0
    out_shift: int = 0
    dx: bool = True
    dw: bool = True
    db: bool = False
    weight_rows: int = 1
    weight_share: int = 1  # rows that follow each other under the same of them
    weight_has_rows: bool = False
    gate: str = ""
    sigmoid: bool = False
    far: bool = False  # most of z lies where exp(-z) nears the ends of fp32's range
    in_place: bool = False  # y over x and sum over residual; dx over dsum, or over dy without
    max_grid: int = 0  # 0: the plan's
    seed: int = 0

    @property
    def general(self) -> bool:
        """Whether it takes the kernels of weights of several rows and of gates."""
        return self.weight_has_rows or bool(self.gate)

    @property
    def weight_row(self) -> NDArray[np.int64]:
        """The row of the weight that each row takes."""
        return np.arange(self.rows) // self.weight_share % self.weight_rows

    @property
    def columns(self) -> int:
        return self.k or self.n

    @property
    def head(self) -> int:
        """Elements from one head to the next."""
        return self.n + self.head_gap

    @property
    def token(self) -> int:
        return self.inner * self.head + self.gap

    def places(self) -> NDArray[np.int64]:
        """Where each element of each row lies."""
        m = np.arange(self.rows)
        starts = m // self.inner * self.token + m % self.inner * self.head
        return starts[:, None] + np.arange(self.n)

    def __str__(self) -> str:
        plain, shown = Case(), ("x", "w", "y", "rows", "n")
        more = (
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if f.name not in shown and getattr(self, f.name) != getattr(plain, f.name)
        )
        head = f"{self.x}/{self.w}/{self.y} rows={self.rows} n={self.n}"
        return " ".join([head, *more])


def longest(kernels: Kernels, x: str, arch: int, general: bool = False) -> list[int]:
    """The longest row of each plan of either direction, by asking; and one of the last plan."""
    found: list[int] = []
    n, most = 1, 1 << 18

    def kind(n: int) -> list[tuple[int, ...]]:
        plans = (kernels.plan(n, x, dy, arch, general) for dy in (None, x))
        return [(p["family"], p["shape"], p["threads"], p["cluster"]) for p in plans]

    while True:
        step = 1
        while kind(n + step) == kind(n) and n + step < most:  # doubling, then bisection
            step *= 2
        low, high = n + step // 2, n + step
        if kind(high) == kind(n):
            return [*found, n + 16 // SIZE[x]]
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if kind(middle) == kind(n) else (low, middle)
        found.append(low)
        n = high


def lengths(kernels: Kernels, x: str, arch: int, general: bool = False) -> list[int]:
    """N at the edges of every plan."""
    v, ends = 16 // SIZE[x], longest(kernels, x, arch, general)
    edges = (n + more for n in ends for more in (-v, -1, 0, 1))
    return sorted({1, 2, 3, v, v + 1, *(n for n in edges if n > 0)})


class Draw:
    """Random cases and ways to run them."""

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)

    def chance(self, percent: int) -> bool:
        return bool(self.random.integers(100) < percent)

    def below(self, n: int) -> int:
        return int(self.random.integers(n))

    def one_of(self, things: list[T]) -> T:
        return things[self.below(len(things))]

    def shift(self, vector: int) -> int:
        """Often none, sometimes whole vectors."""
        if self.chance(50):
            return 0
        return vector * self.below(4) if self.chance(30) else self.below(4 * vector)

    def case(self, types: tuple[str, str, str, bool], n: int) -> Case:
        x, w, y, llama = types
        v = 16 // SIZE[x]
        aligned = self.chance(35)
        gap = v * self.below(9) if aligned else self.below(70)
        inner = 1 << 33 if self.chance(5) else 1
        return Case(
            *(x, w, y),
            llama=llama,
            n=n,
            rows=1 + self.below(2 if n > 20000 else 9),
            k=0 if self.chance(60) else 1 + self.below(n),
            weight=not self.chance(15),
            residual=self.chance(35),
            rstd=not self.chance(20),
            offset=1.0 if self.chance(25) else 0.0,
            inner=1 + self.below(3) if self.chance(25) else inner,
            gap=gap if self.chance(25) else 0,
            head_gap=self.below(10) if not aligned and self.chance(20) else 0,
            x_shift=0 if aligned else self.shift(v),
            w_shift=0 if aligned else self.shift(v),
            out_shift=0 if aligned else self.shift(v),
            dx=not self.chance(15),
            dw=not self.chance(20),
            db=self.chance(30),
            max_grid=1 + self.below(2) if self.chance(40) else 0,
            seed=self.below(1 << 30),
        )

    def general(self, types: tuple[str, str, str, bool], n: int, gate: str | None = None) -> Case:
        """A case under a weight of several rows, a gate, or both."""
        case = self.case(types, n)
        if gate is None:
            gate = GATES[self.below(len(GATES))] if case.x != "f64" else ""
        if types[2] != types[0] and gate == "last":  # its product has x's dtype
            gate = "first"
        rows = 1 + self.below(3) if not gate or self.chance(50) else 1
        share = 1 + self.below(2) if rows > 1 else 1
        return replace(
            case,
            gate=gate,
            sigmoid=self.chance(40),
            weight_rows=rows,
            weight_share=share,
            weight_has_rows=rows > 1 or not gate,
            rows=rows * share * (1 + self.below(2 if n > 3000 else 4)),
            residual=case.residual and not gate,
            far=self.chance(25),
        )

    def usual(self, case: Case) -> Case:
        """The same as is_usual() of rows.h asks, if n is whole vectors. Its dtypes are its own."""
        case = replace(case, weight=True, k=0, residual=False, head_gap=0, gap=0)
        case = replace(case, x_shift=0, w_shift=0, out_shift=0)
        return replace(case, sigmoid=False, db=False) if case.gate else case

    def options(self, races: bool) -> Options:
        return Options(late=self.chance(50), descending=self.chance(25), races=races)


def types_of(x: str) -> Iterator[tuple[str, str, str, bool]]:
    return (t for t in TYPES if t[0] == x)
