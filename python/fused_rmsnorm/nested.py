"""Nested tensors: a batch of sequences that differ in length, each normalised row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["of_each_sequence"]


def of_each_sequence(norm: Callable[[Tensor], Tensor], input: Tensor, dims: int) -> Tensor:
    """``norm`` of what ``input`` holds, as a nested tensor of the same layout; differentiable.

    ``dims``: how many of the last dimensions are normalised.

    Raises:
        RuntimeError: the length that varies is itself normalised.
    """
    if input.layout is not torch.jagged:
        # torch has no way back from the buffer of a strided one that keeps its gradient.
        return torch.nested.as_nested_tensor([norm(t) for t in input.unbind()])
    jagged: Any = input  # of a class that torch does not export
    varies = jagged._ragged_idx
    if varies >= input.dim() - dims:
        last = "last dimension" if dims == 1 else f"last {dims} dimensions, which are normalised"
        raise RuntimeError(f"input must not vary in length in its {last}")
    # The same offsets: what has the same lengths can be added to it. And the bounds of the lengths,
    # as far as they are known: attention goes by them, and compiled padding has no other measure.
    return torch.nested.nested_tensor_from_jagged(
        norm(jagged.values()),
        jagged.offsets(),
        jagged.lengths(),
        jagged_dim=varies,
        min_seqlen=jagged._maybe_min_seqlen,
        max_seqlen=jagged._maybe_max_seqlen,
    )
