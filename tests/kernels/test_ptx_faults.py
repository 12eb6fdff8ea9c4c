"""Faults planted in the compiled kernels: the interpreter in ptx sees each of them."""

from dataclasses import replace
from typing import Any

import pytest
from ptx import build
from ptx.build import Build
from ptx.call import Mismatch, call
from ptx.cases import Case
from ptx.faults import FAULTS, plant
from ptx.isa import Trap
from ptx.kernels import Kernels
from ptx.machine import Launch, Options

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

BF16 = Case(x="bf16", w="bf16", y="bf16")
# Between them they get to every kind of fault, in rows of a part of a warp, of several warps, of
# several CTAs; whole vectors and not.
CALLS = {
    "forward, four rows a warp": (80, "forward", Case(rows=60, n=32, max_grid=1)),
    "forward, unaligned": (
        *(80, "forward"),
        replace(BF16, rows=3, n=517, x_shift=1, out_shift=3),
    ),
    "forward, several warps": (80, "forward", Case(rows=6, n=2048, max_grid=1)),
    "forward, cluster": (90, "forward", replace(BF16, rows=1, n=20000)),
    "backward, four rows a warp": (80, "backward", replace(BF16, rows=40, n=64, db=True)),
    "backward, several warps": (80, "backward", Case(rows=6, n=2048, max_grid=1, db=True)),
}


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels(Build())


@pytest.fixture(scope="module")
def seen() -> set[str]:
    return set()


@pytest.mark.parametrize("what", CALLS)
def test_every_planted_fault_is_caught(kernels: Kernels, seen: set[str], what: str) -> None:
    arch, direction, case = CALLS[what]
    planted = list(plant(kernels, case, arch, direction))
    seen |= {p.fault for p in planted}
    assert planted
    survived = [p for p in planted if not p.told]
    # At its end the backward waits for groups that are empty by then: it may be short or gone.
    harmless = [p for p in survived if p.instruction.endswith("cp.async.wait_group 0")]
    assert len(harmless) <= 2 * (direction == "backward")
    assert survived == harmless, "\n".join(map(str, survived))


def test_every_kind_of_fault_was_planted(seen: set[str]) -> None:
    if len(seen) < len(FAULTS):
        pytest.fail(f"never planted: {sorted(set(FAULTS) - seen)}")


class WideAccess(Kernels):
    """Alignment is not asked: unaligned rows get the kernel of aligned ones."""

    def launches(self, kind: str, struct: bytes, *more: Any, **named: Any) -> list[Launch]:
        aligned = bytearray(struct)
        for name, (at, size) in self.fields.items():
            of, field = name.split(".")
            if of != kind or size < 8 or field in ("rows", "n", "k", "eps", "weight_offset"):
                continue
            # An address, or Rows. Strides are in elements.
            rows = [self.fields[f"Rows.{f}"][0] for f in ("data", "outer_stride", "inner_stride")]
            for offset in rows if size > 8 else [0]:
                aligned[at + offset] &= 0xF0
        launches = super().launches(kind, struct, *more, **named)
        wide = super().launches(kind, bytes(aligned), *more, **named)
        assert [w.kernel for w in wide] != [launch.kernel for launch in launches]
        return [
            replace(w, args=(launch.args[0], *w.args[1:]))
            for w, launch in zip(wide, launches, strict=True)
        ]


class LongerRows(Kernels):
    """N is one more than the rows have."""

    def launches(self, *args: Any, **named: Any) -> list[Launch]:
        at, size = self.fields["Forward.n"]
        found = []
        for launch in super().launches(*args, **named):
            struct = bytearray(launch.args[0])
            longer = int.from_bytes(struct[at : at + size], "little") + 1
            struct[at : at + size] = longer.to_bytes(size, "little")
            found.append(replace(launch, args=(bytes(struct), *launch.args[1:])))
        return found


class LessShared(Kernels):
    """Half of the shared memory that the kernel counts on."""

    def launches(self, *args: Any, **named: Any) -> list[Launch]:
        found = super().launches(*args, **named)
        return [replace(launch, shared=launch.shared // 2) for launch in found]


@pytest.mark.parametrize(
    ("fault", "direction", "case", "said"),
    [
        (WideAccess, "forward", replace(BF16, n=520, x_shift=1), "misaligned: 16 bytes"),
        (WideAccess, "forward", replace(BF16, n=520, out_shift=3), "misaligned: 16 bytes"),
        (WideAccess, "forward", replace(BF16, n=520, gap=4), "misaligned: 16 bytes"),
        (LongerRows, "forward", replace(BF16, n=521, rows=1), "outside every array"),
        (LongerRows, "forward", replace(BF16, n=520, gap=8, rows=2), "outside every array"),
        (LessShared, "backward", replace(BF16, n=512, rows=40, max_grid=1), "outside shared"),
    ],
)
def test_faults_of_a_launch_are_caught(
    kernels: Kernels, fault: type[Kernels], direction: str, case: Case, said: str
) -> None:
    call(kernels, case, 80, direction, Options())
    with pytest.raises((Trap, Mismatch), match=said):
        call(fault(kernels.build), case, 80, direction, Options())
