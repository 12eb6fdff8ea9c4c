"""The CUDA launch plan: pure host code, a function of N, dtype and architecture."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fused_rmsnorm import launch_plan

DTYPES = ("float32", "float16", "bfloat16", "float64")
SHARED = {75: 64, 80: 163, 86: 99, 90: 227, 100: 227, 120: 99}


@given(
    st.integers(1, 1 << 20),
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(SHARED)),
    st.booleans(),
)
def test_a_row_fits(n: int, dtype: str, arch: int, backward: bool) -> None:
    plan = launch_plan(n, dtype, arch, backward)
    holds = plan["vector"] * plan["threads"] * plan["items"] * plan["cluster"]
    assert plan["family"] == "two_pass" or holds >= n
    assert plan["shared_bytes"] <= SHARED[arch] << 10
    assert plan["threads"] * plan["rows_per_block"] <= 1024
    assert plan["cluster"] == 1 or arch >= 90
    assert not backward or plan["partials"] >= 1


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"dtype must be .* but got int8"):
        launch_plan(8, "int8")
    with pytest.raises(ValueError, match="n must be at least 1, but got 0"):
        launch_plan(0)
