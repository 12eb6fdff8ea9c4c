"""How many columns pRMSNorm's statistic reads, for what runs in Python instead of the kernels."""

from __future__ import annotations

from bisect import bisect_left

__all__ = ["stat_columns"]


def stat_columns(p: float | None, n: int) -> int:
    """The smallest k with ``k / n >= p``, in fp64: 0.07 of 100 is 7, and 5 / 7 of 7 is 5. None: n.

    The same as stat_columns in csrc/binding/options.cpp.
    """
    if p is None or p == 1 or n == 0:
        return n
    return 1 + bisect_left(range(1, n + 1), p, key=lambda k: float(k) / float(n))
