"""What the compiled kernels are put through, in parts that run side by side: one per dtype and
architecture.

each     every kernel that a launch plan can choose: against float64, and the emulator's bits
general  the same of weights of several rows and of gates, and N at their plans' edges
values   N at every plan's edges and random options: against float64, and the emulator's bits
bits     a row's results do not depend on alignment, its place, the grid or the schedule
in_place outputs over inputs
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from .build import Build
from .call import Call, Mismatch, call
from .cases import DIRECTIONS, GATES, Case, Draw, lengths, longest, types_of
from .isa import GLOBAL_BASE, Trap
from .kernels import SIZE, Kernels

# From here on, races are not looked for: that would take the most time.
LONG = 20000


@dataclass
class Report:
    calls: int = 0
    failures: list[str] = field(default_factory=list)
    kernels: set[str] = field(default_factory=set)
    worst: dict[str, float] = field(default_factory=dict)  # errors, as parts of their bounds
    coverage: dict[str, tuple[int, int]] = field(default_factory=dict)  # instructions run, and all


@dataclass
class Part:
    """Runs cases of one dtype of x on one architecture. `percent` of the random ones."""

    kernels: Kernels
    x: str
    arch: int
    percent: int = 100
    report: Report = field(default_factory=Report)

    def __post_init__(self) -> None:
        self.draw = Draw(self.arch)
        self.vector = 16 // SIZE[self.x]
        self.lengths = lengths(self.kernels, self.x, self.arch)

    def attempt(
        self, case: Case, direction: str, races: bool = True, emulated: bool = True
    ) -> Call | None:
        self.report.calls += 1
        options = self.draw.options(races)
        try:
            found = call(self.kernels, case, self.arch, direction, options, emulated)
        except (Trap, Mismatch) as e:
            self.report.failures.append(str(e))
            return None
        self.report.kernels |= {launch.kernel for launch, _ in found.launched}
        for name, error in found.worst.items():
            self.report.worst[name] = max(error, self.report.worst.get(name, 0.0))
        return found

    def each(self) -> None:
        """Every plan's longest row, aligned and not, with and without the fused add, with and
        without db."""
        v = self.vector
        whole = sorted({-(-n // v) * v for n in longest(self.kernels, self.x, self.arch)})
        # Llama mode is a flag of a kernel, not another.
        kinds = sorted({types[:3] for types in types_of(self.x)})
        for kind, n in itertools.product(kinds, whole):
            modes = [types for types in types_of(self.x) if types[:3] == kind]
            types = modes[self.draw.below(len(modes))]
            for aligned, second in itertools.product((True, False), repeat=2):
                case = replace(self.draw.case(types, n), residual=second, db=second)
                case = replace(case, head_gap=0, gap=0, rows=min(case.rows, 3), dx=True, dw=True)
                if aligned:
                    case = replace(case, x_shift=0, w_shift=0, out_shift=0)
                else:
                    case = replace(case, x_shift=1 + self.draw.below(v - 1))
                for direction in DIRECTIONS:
                    self.attempt(case, direction, races=n < LONG)

    def general(self) -> None:
        """The longest row of every plan by whole vectors, under each gate and none, as models
        have it and otherwise; others by chance."""
        v = self.vector
        ends = sorted({-(-n // v) * v for n in longest(self.kernels, self.x, self.arch, True)})
        gates = GATES if self.x != "f64" else GATES[:1]
        all_types = list(types_of(self.x))
        narrow = [types for types in all_types if types[2] == types[0]]
        for n, gate, usual in itertools.product(ends, gates, (True, False)):
            # The product of a last gate has x's dtype.
            types = self.draw.one_of(narrow if usual or gate == "last" else all_types)
            case = replace(self.draw.general(types, n, gate), dx=True, dw=True)
            if usual:
                case = self.draw.usual(case)
            else:
                case = replace(case, x_shift=1 + self.draw.below(v - 1))
            self.attempt_general(case)
        for types, n in itertools.product(
            all_types, sorted({*ends, *lengths(self.kernels, self.x, self.arch, True)})
        ):
            for _ in range(2):
                if not self.draw.chance(self.percent):
                    continue
                case = self.draw.general(types, n)
                usual = types in narrow and n % v == 0 and self.draw.chance(50)
                self.attempt_general(self.draw.usual(case) if usual else case)

    def attempt_general(self, case: Case) -> None:
        for direction in DIRECTIONS:
            bias = case.weight and case.db and (direction == "forward" or bool(case.gate))
            self.attempt(replace(case, bias=bias), direction, races=case.n < LONG)

    def values(self) -> None:
        for types, n in itertools.product(types_of(self.x), self.lengths):
            for _ in range(1 if n > 3000 else 2):
                case = self.draw.case(types, n)
                if not self.draw.chance(self.percent):
                    continue
                for direction in DIRECTIONS:
                    bias = direction == "forward" and case.weight and case.db
                    self.attempt(replace(case, bias=bias), direction, races=n < LONG)

    def layouts(self, base: Case) -> Iterator[Case]:
        """The same rows elsewhere in memory, and the first of them alone."""
        v, draw = self.vector, self.draw
        yield base
        yield replace(base, x_shift=1, w_shift=1)
        yield replace(base, out_shift=1 + draw.below(2 * v))
        yield replace(base, x_shift=draw.below(v), gap=draw.below(9), inner=2)
        yield replace(base, rows=1, max_grid=0, x_shift=draw.below(v), out_shift=draw.below(v))

    def bits(self) -> None:
        v = self.vector
        for types, n in itertools.product(types_of(self.x), self.lengths):
            if not self.draw.chance(self.percent):
                continue
            n = -(-n // v) * v
            base = replace(
                Case(*types[:3], llama=types[3], n=n, rows=2 if n > 5000 else 5, db=True),
                k=0 if self.draw.chance(50) else 1 + self.draw.below(n),
                residual=self.draw.chance(50),
                max_grid=self.draw.below(2),
                seed=self.draw.below(1 << 30),
            )
            for direction in DIRECTIONS:
                case = replace(base, bias=direction == "forward")
                first: Call | None = None
                for layout in self.layouts(case):
                    found = self.attempt(layout, direction, races=False, emulated=False)
                    if found and first:
                        self.same(first, found, f"{direction} sm_{self.arch} {layout}")
                    first = first or found

    def same(self, first: Call, other: Call, what: str) -> None:
        for name in first.outputs:
            a, b = first.raw(name), other.raw(name)
            if name in ("dw", "db"):
                if other.case.rows != first.case.rows:
                    continue
            else:
                a = a[: len(b)]
            if a.tobytes() != b.tobytes():
                self.report.failures.append(f"{name} has other bits: {what}")

    def in_place(self) -> None:
        for types, n in itertools.product(types_of(self.x), (40, 64, 777, 2048, 4099, 20001)):
            if not self.draw.chance(self.percent):
                continue
            for shift, residual in itertools.product((0, 1), (False, True)):
                case = Case(*types[:3], llama=types[3], n=n, rows=5, x_shift=shift)
                case = replace(case, residual=residual, in_place=True, seed=n, max_grid=2)
                for direction in DIRECTIONS:
                    if case.x == case.y or (direction == "backward" and residual):
                        self.attempt(case, direction, races=n < LONG)
        for gate, n in itertools.product(GATES if self.x != "f64" else GATES[:1], (64, 2048)):
            case = Case(*(3 * (self.x,)), n=n, rows=5, gate=gate, weight_has_rows=not gate)
            for direction in DIRECTIONS:
                self.attempt(replace(case, in_place=True, seed=n, max_grid=2), direction)


def chosen(kernels: Kernels, x: str, arch: int) -> set[str]:
    """Every kernel that a call may launch on this architecture, by asking the launch code."""
    found, flags, wide = set(), (False, True), 16 // SIZE[x]
    ends = [(n, general) for general in flags for n in longest(kernels, x, arch, general)]
    for types, (n, general) in itertools.product(types_of(x), ends):
        gates = range(len(GATES)) if general and x != "f64" else (0,)
        for aligned, second, gate in itertools.product(flags, flags, gates):
            if GATES[gate] == "last" and types[2] != types[0]:
                continue
            n_ = -(-n // wide) * wide
            at = GLOBAL_BASE + (0 if aligned else SIZE[x])
            rows = {"data": at, "outer_stride": n_}
            nothing = {"data": 0}
            more = rows if second and not gate else nothing
            common = {"rows": 3, "n": n_, "k": n_, "llama": types[3], "x": rows, "weight": at}
            common |= {"x_dtype": x, "w_dtype": types[1], "weight_has_rows": general}
            common |= {"gate": gate, "z": rows if gate else nothing}
            forward = common | {"y_dtype": types[2], "y": at, "residual": more}
            forward |= {"sum": at if second else 0}
            backward = common | {"dy_dtype": types[2], "dy": rows, "dsum": more, "dx": at}
            backward |= {"dw": at, "db": at if second else 0, "workspace": GLOBAL_BASE}
            for kind, fields in (("Forward", forward), ("Backward", backward)):
                launches = kernels.launches(kind, kernels.struct(kind, fields), arch)
                found |= {launch.kernel for launch in launches}
    return found


def run(x: str, arch: int, percent: int, sections: tuple[str, ...]) -> Report:
    """In a process of its own."""
    kernels = Kernels(Build(), alone=False)
    part = Part(kernels, x, arch, percent)
    for section in sections:
        getattr(part, section)()
    for (unit, _, _), program in kernels.programs.items():
        entry = program.entry
        done = sum(len(program.blocks[b].instructions) for b in program.reached)
        run_, all_ = part.report.coverage.get(unit, (0, 0))
        part.report.coverage[unit] = run_ + done, all_ + len(entry.instructions)
    return part.report
