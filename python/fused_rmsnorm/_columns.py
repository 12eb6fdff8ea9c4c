"""How many columns pRMSNorm's statistic reads, for what runs in Python instead of the kernels."""

from __future__ import annotations

import math
from fractions import Fraction

__all__ = ["stat_columns"]


def stat_columns(p: float | None, n: int) -> int:
    """``ceil(p * n)`` with p read as the decimal that it prints as: 0.07 of 100 is 7. None: n.

    The same as stat_columns in csrc/binding/options.cpp.
    """
    return n if p is None else math.ceil(Fraction(repr(p)) * n)
