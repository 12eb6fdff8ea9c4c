"""The CUDA launch plan: pure host code, a function of N, dtype and architecture."""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fused_rmsnorm import launch_plan

DTYPES = ("float32", "float16", "bfloat16", "float64")
SHARED = {75: 64, 80: 163, 86: 99, 90: 227, 100: 227, 120: 99}
EDGES = sorted({2**i + j for i in range(20) for j in (-1, 0, 1)} - {0})  # where shapes change


@given(st.lists(st.integers(1, 1 << 20), min_size=8, max_size=8))
@example(EDGES)
def test_rows_fit(lengths: list[int]) -> None:
    for each in itertools.product(lengths, DTYPES, SHARED, (False, True)):
        check_fits(*each, grad_dtype=None)
    for n, arch in itertools.product(lengths, SHARED):  # dy of llama mode with a wide weight
        check_fits(n, "bfloat16", arch, True, grad_dtype="float32")


def check_fits(n: int, dtype: str, arch: int, backward: bool, grad_dtype: str | None) -> None:
    plan = launch_plan(n, dtype, arch, backward, grad_dtype)
    holds = plan["vector"] * plan["threads"] * plan["items"] * plan["cluster"]
    assert plan["family"] == "two_pass" or holds >= n
    assert plan["shared_bytes"] <= SHARED[arch] << 10
    assert plan["threads"] * plan["rows_per_block"] <= 1024
    assert plan["cluster"] == 1 or arch >= 90
    assert not backward or 1 <= plan["max_grid"] <= 188 * 8
    # Partials of dw stay within 16 MiB, unless it is a single one.
    assert not backward or plan["max_grid"] == 1 or plan["max_grid"] * n <= 4 << 20


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"dtype must be .* but got int8"):
        launch_plan(8, "int8")
    with pytest.raises(ValueError, match=r"grad_dtype must be .* but got half"):
        launch_plan(8, grad_dtype="half")
    with pytest.raises(ValueError, match="grad_dtype must not be narrower than dtype"):
        launch_plan(8, "float32", grad_dtype="bfloat16")
    for n in (0, -1, (1 << 48) + 1, (1 << 63) - 1):
        with pytest.raises(
            ValueError, match=rf"n must be at least 1 and at most 2\*\*48, but got {n}"
        ):
            launch_plan(n)
