"""``python -m benchmarks.gated.pair``: what a norm of queries and keys in one call could save.

Qwen3's QK-norm: rows of 128, 16 heads of queries under one weight and 8 of keys under another. Two
calls, as models write it, against one call over all 24 heads as one tensor, under a weight with a
row for each head: the least that a function of two tensors would cost. Writes pair.json and pair.md
to benchmarks/results/<hardware>.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..harness import tables
from ..harness.timing import Contender, measure, time_cuda, time_host
from . import command
from .command import DIRECTIONS

__all__ = ["main", "markdown", "time_pair"]

QUERIES, KEYS, WIDTH, EPS = 16, 8, 128, 1e-6
TOKENS = (1, 16, 128, 2048)
NAMES = ("two calls", "one call")


def time_pair(
    tokens: int, dtype: torch.dtype, direction: str, device: torch.device, seconds: float
) -> dict[str, Any]:
    """An entry of the results. RuntimeError if the two are not the same function, bit for bit."""
    from fused_rmsnorm.functional import rms_norm

    torch.manual_seed(0)
    heads = torch.randn(tokens, QUERIES + KEYS, WIDTH, device=device).to(dtype).requires_grad_()
    apart = [t.detach().contiguous().requires_grad_() for t in heads.split([QUERIES, KEYS], 1)]
    weights = [torch.randn(WIDTH, device=device).to(dtype).requires_grad_() for _ in range(2)]
    by_head = torch.stack([*[weights[0]] * QUERIES, *[weights[1]] * KEYS]).detach()
    by_head.requires_grad_()
    dy = torch.randn(heads.shape, device=device).to(dtype)
    dy_apart = [t.contiguous() for t in dy.split([QUERIES, KEYS], 1)]

    def two(apart: list[Tensor]) -> list[Tensor]:
        return [rms_norm(x, WIDTH, w, EPS) for x, w in zip(apart, weights, strict=True)]

    def one(heads: Tensor) -> Tensor:
        return rms_norm(heads, WIDTH, by_head, EPS)

    def step_of_two(apart: list[Tensor]) -> object:
        return torch.autograd.grad(two(apart), [*apart, *weights], dy_apart)

    def step_of_one(heads: Tensor) -> object:
        return torch.autograd.grad(one(heads), [heads, by_head], dy)

    backward = direction == DIRECTIONS[1]
    with torch.set_grad_enabled(backward):
        if not torch.equal(torch.cat(two(apart), 1), one(heads)):
            raise RuntimeError(f"{tokens} tokens, {dtype}: one call is not the two")
        contenders = [
            Contender(NAMES[0], step_of_two if backward else two, [apart]),
            Contender(NAMES[1], step_of_one if backward else one, [heads]),
        ]
        timer = time_cuda if device.type == "cuda" else time_host
        times = measure(contenders, seconds=seconds, timer=timer)
    return {
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "direction": direction,
        "times": times,
    }


def markdown(data: dict[str, Any]) -> str:
    """The table of a results file."""
    rows = []
    for e in data["entries"].values():
        times = tables.times_of(e)
        two, one = (times[name] for name in NAMES)
        spreads = [tables.spread(t, 1e6, 1) for t in (two, one)]
        saved = f"{(two.median - one.median) * 1e6:.1f}"
        rows.append([str(e["tokens"]), e["dtype"], e["direction"], *spreads, saved])
    header = ["tokens", "dtype", "direction", *[f"{n}, us" for n in NAMES], "saved, us"]
    lines = ["# Queries and keys in one call", "", tables.conditions(data), ""]
    return "\n".join([*lines, *tables.table(header, rows, 3), ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 130 stopped."""
    parser = command.options("benchmarks.gated.pair", __doc__, seconds=3.0)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    args = parser.parse_args(argv)

    def entries(device: torch.device) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        for dtype, direction, tokens in itertools.product(args.dtypes, DIRECTIONS, args.tokens):
            of = getattr(torch, dtype)
            yield (
                f"{dtype}/{direction}/{tokens}",
                functools.partial(time_pair, tokens, of, direction, device, args.seconds),
            )

    kept = {"seconds": args.seconds, "dtypes": args.dtypes}
    return command.run("pair", args, kept, entries, markdown)


if __name__ == "__main__":
    sys.exit(main())
