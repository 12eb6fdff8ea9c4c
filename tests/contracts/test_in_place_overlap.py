"""add_rms_norm_ writes both of its arguments: no element of either may lie in another, also where
the rows have gaps between them, which torch's own check lets pass."""

import re

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from reference import same_bits
from torch import Tensor

from fused_rmsnorm import functional as F

SHARED = "must not overlap itself|must not share memory|single memory location"


def places(t: Tensor) -> list[int]:
    """Where each element of t lies, in elements from the start of the storage."""
    numel = t.untyped_storage().size() // t.element_size()
    return (
        torch.arange(numel).as_strided(t.shape, t.stride(), t.storage_offset()).flatten().tolist()
    )


def is_shared(x: Tensor, residual: Tensor) -> bool:
    written = places(x) + places(residual)
    return len(set(written)) < len(written)


def check(x: Tensor, residual: Tensor, *, always_answers: bool = False) -> None:
    """Refused before anything is written, or the same as add_rms_norm of copies."""
    buffer = torch.empty(0).set_(x.untyped_storage())
    before, shared = buffer.clone(), is_shared(x, residual)
    expected = F.add_rms_norm(x.clone(), residual.clone(), x.shape[-1])
    refused = ""
    try:
        F.add_rms_norm_(x, residual, x.shape[-1])
    except RuntimeError as error:
        refused = str(error)
    if refused:
        assert re.search(SHARED, refused)
        assert same_bits(buffer, before)
        assert shared or not always_answers
    else:
        assert not shared
        assert same_bits(x.contiguous(), expected[0])
        assert same_bits(residual.contiguous(), expected[1])


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 8)),
    strides=st.tuples(*[st.tuples(st.integers(0, 40), st.integers(0, 20), st.integers(0, 3))] * 2),
    offsets=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    alike=st.booleans(),
)
@example(
    sizes=(1, 4, 8), strides=((0, 4, 1),) * 2, offsets=(0, 40), alike=True
)  # rows overlap by half
@example(sizes=(1, 4, 8), strides=((0, 24, 1),) * 2, offsets=(0, 4), alike=True)
@example(sizes=(1, 4, 8), strides=((0, 24, 1),) * 2, offsets=(4, 0), alike=True)
@example(
    sizes=(1, 4, 8), strides=((0, 20, 1),) * 2, offsets=(0, 13), alike=True
)  # into the next row
@example(sizes=(2, 2, 8), strides=((30, 20, 1),) * 2, offsets=(0, 52), alike=True)
def test_any_strides(sizes, strides, offsets, alike):
    strides = (strides[0], strides[0]) if alike else strides
    buffer = torch.arange(400.0)
    check(*(buffer.as_strided(sizes, s, o) for s, o in zip(strides, offsets, strict=True)))


@given(data=st.data(), sizes=st.tuples(*[st.integers(1, 4)] * 2), n=st.integers(1, 8))
def test_views_of_a_packed_tensor(data, sizes, n):
    """What slicing, selecting and transposing give: taken wherever it does not overlap."""
    packed = torch.arange(float(sizes[0] * sizes[1] * 3 * 10)).view(*sizes, 3, 10)
    order = data.draw(st.permutations(range(3)))
    views = []
    for _ in range(2):
        start = data.draw(st.integers(0, 10 - n))
        rows = slice(None, None, data.draw(st.integers(1, 2)))
        views.append(packed.permute(*order, 3)[rows, ..., start : start + n])
    assume(views[0].shape == views[1].shape)
    if data.draw(st.booleans()):
        picked = [data.draw(st.integers(0, views[0].shape[1] - 1)) for _ in views]
        views = [v.select(1, i) for v, i in zip(views, picked, strict=True)]
    check(*views, always_answers=True)


def test_two_views_of_the_same_rows():
    packed = torch.arange(96.0).view(4, 3, 8)
    with pytest.raises(RuntimeError, match="input and residual must not share memory"):
        F.add_rms_norm_(packed[:, 0], packed[:, 0], 8)
    with pytest.raises(RuntimeError, match="input and residual must not share memory"):
        F.add_rms_norm_(packed[:, 0, 2:], packed[:, 0, :-2], 6)
    with pytest.raises(RuntimeError, match=r"^residual must not overlap itself in memory"):
        F.add_rms_norm_(torch.ones(4, 8), packed.flatten().as_strided((4, 8), (4, 1)), 8)
    assert torch.equal(packed.flatten(), torch.arange(96.0))


def test_no_rows_and_no_columns():
    for shape in ((0, 8), (4, 0)):
        x, residual = torch.ones(2, 8, 8)[:, : shape[0], : shape[1]]
        F.add_rms_norm_(x, residual, shape[1])
