"""Faults planted in the compiled kernels: the interpreter in tests/ptx sees each of them."""

from dataclasses import replace

import pytest
from ptx import build
from ptx.build import Build
from ptx.call import Mismatch, call
from ptx.cases import Case
from ptx.faults import FAULTS, Planted, plant
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
        replace(BF16, rows=3, n=520, x_shift=1, out_shift=1),
    ),
    "forward, several warps": (80, "forward", Case(rows=6, n=2048, max_grid=1)),
    "forward, cluster": (90, "forward", replace(BF16, rows=1, n=20000)),
    "backward, four rows a warp": (80, "backward", Case(rows=40, n=32, db=True)),
    "backward, several warps": (80, "backward", Case(rows=6, n=2048, max_grid=1, db=True)),
}


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    made = Build()
    made.everything()
    return Kernels(made)


@pytest.fixture(scope="module")
def seen() -> set[str]:
    return set()


@pytest.mark.parametrize("what", CALLS)
def test_every_planted_fault_is_caught(kernels: Kernels, seen: set[str], what: str) -> None:
    arch, direction, case = CALLS[what]
    planted = list(plant(kernels, case, arch, direction))
    seen |= {p.fault for p in planted}
    assert planted
    survived = [p for p in planted if not p.told and not harmless(p)]
    assert not survived, "\n".join(map(str, survived))


def harmless(p: Planted) -> bool:
    """At its end the backward waits for groups that are empty by then."""
    return p.fault == "wait for copies dropped" and p.instruction.endswith("wait_group 0")


def test_every_kind_of_fault_was_planted(seen: set[str]) -> None:
    if len(seen) < len(FAULTS):
        pytest.fail(f"never planted: {sorted(set(FAULTS) - seen)}")


class Disturbed(Kernels):
    """Launches as a faulty launch code would."""

    def launches(self, *args: object, **more: object) -> list[Launch]:
        return [self.disturb(launch) for launch in super().launches(*args, **more)]

    def disturb(self, launch: Launch) -> Launch:
        raise NotImplementedError


class WideAccess(Disturbed):
    """Alignment is not asked: kernels for aligned rows get all."""

    def disturb(self, launch: Launch) -> Launch:
        aligned = launch.kernel.replace("Access)1", "Access)0")
        assert aligned != launch.kernel
        return replace(launch, kernel=aligned)


class LongerRows(Disturbed):
    """N is one more than the rows have."""

    def disturb(self, launch: Launch) -> Launch:
        at, size = self.fields["Forward.n"]
        struct = bytearray(launch.args[0])
        struct[at : at + size] = (int.from_bytes(struct[at : at + size], "little") + 1).to_bytes(
            size, "little"
        )
        return replace(launch, args=(bytes(struct), *launch.args[1:]))


class LessShared(Disturbed):
    def disturb(self, launch: Launch) -> Launch:
        return replace(launch, shared=launch.shared - 16)


@pytest.mark.parametrize(
    ("fault", "direction", "case", "said"),
    [
        (WideAccess, "forward", replace(BF16, n=520, x_shift=1), "misaligned: 16 bytes"),
        (WideAccess, "forward", replace(BF16, n=520, out_shift=3), "misaligned: 16 bytes"),
        (WideAccess, "forward", replace(BF16, n=520, gap=4), "misaligned: 16 bytes"),
        (LongerRows, "forward", replace(BF16, n=521, rows=1), "outside every array"),
        (LongerRows, "forward", replace(BF16, n=520, gap=8, rows=2), "outside every array"),
        (LessShared, "backward", replace(BF16, n=512, dw=False), "outside shared memory"),
    ],
)
def test_faults_of_a_launch_are_caught(
    kernels: Kernels, fault: type[Disturbed], direction: str, case: Case, said: str
) -> None:
    call(kernels, case, 80, direction, Options())
    with pytest.raises((Trap, Mismatch), match=said):
        call(fault(kernels.build), case, 80, direction, Options())
