"""docs/which-options.md: each row of its table against the class in transformers."""

import importlib
import inspect
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fused_rmsnorm import RMSNorm, RMSNormGated, replace_rms_norm_

pytest.importorskip("transformers", reason="transformers is not installed")

TEXT = (Path(__file__).parents[2] / "docs" / "which-options.md").read_text()
N = 96
TYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = {(mode, offset) for mode in ("torch", "llama") for offset in (0.0, 1.0)}


class Row(NamedTuple):
    family: str
    module: str
    name: str
    options: tuple[str, float] | None
    of_weight: bool  # rounds to the weight's dtype
    eps_name: str
    eps: float
    swapped: bool

    def make(self) -> nn.Module:
        """The norm with numbers in its weight, made with the defaults of its class."""
        cls = getattr(
            importlib.import_module(f"transformers.models.{self.module}.modeling_{self.module}"),
            self.name,
        )
        needed = inspect.signature(cls).parameters.values()
        sizes = [N for p in needed if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        norm = cls(*sizes)  # its width and, of one with groups, theirs
        assert len(sizes) <= 2
        for parameter in norm.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)
        return norm


def rows() -> list[Row]:
    found = []
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and (path := re.fullmatch(r"(\w+)\.(\w+)", cells[1])):
            mode = re.match(r'`"(\w+)"`', cells[2])
            assert cells[5] in ("swapped", "left"), line
            found.append(
                Row(
                    cells[0],
                    *path.groups(),
                    (mode[1], float(cells[3])) if mode else None,
                    "(1)" in cells[2],
                    cells[4].split()[0],
                    float(cells[4].split()[1]),
                    cells[5] == "swapped",
                )
            )
    return found


ROWS = rows()


def inputs(dtype: torch.dtype, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(64, N, generator=random).to(dtype)


def differing(a: Tensor, b: Tensor) -> float:
    """Share of the numbers that are not the same; a dtype that differs is all of them."""
    if a.dtype != b.dtype:
        return 1.0
    close = torch.isclose(a, b, rtol=1e-5) if a.dtype == torch.float32 else a == b
    return (~close).float().mean().item()


def test_every_line_of_the_table_is_read():
    table = [line for line in TEXT.splitlines() if line.startswith("| ") and "." in line]
    assert len(ROWS) == len(table)
    assert len(ROWS) > 30
    assert len({(row.module, row.name) for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row(row: Row) -> None:
    norm = row.make()
    assert getattr(norm, row.eps_name) == row.eps

    swapped = replace_rms_norm_(nn.ModuleDict({"norm": norm}))
    assert set(swapped) == ({"norm"} if row.swapped else set())
    assert set(swapped.left) == (set() if row.swapped else {"norm"})
    assert row.swapped == (row.options is not None)
    if row.options is None:
        return
    new = swapped["norm"]
    assert (new.casting_mode, new.weight_offset) == row.options
    assert new.eps == row.eps
    gated = isinstance(new, RMSNormGated)
    assert gated == ("Gated" in row.name)
    kind = partial(RMSNormGated, norm_before_gate=new.norm_before_gate) if gated else RMSNorm
    # The definition of the row by hand, against the class; and no other options would do.
    for x_type in TYPES:
        for w_type in {x_type} if row.of_weight else {x_type, torch.float32}:
            norm.to(w_type)
            given = [inputs(x_type, seed) for seed in range(2 if gated else 1)]
            want = norm(*given)
            difference = {}
            for mode, offset in OPTIONS:
                ours = kind(N, row.eps, weight_offset=offset, casting_mode=mode, dtype=w_type)
                ours.load_state_dict(norm.state_dict())
                difference[mode, offset] = differing(ours(*given), want)
            assert difference[row.options] < 0.002, (x_type, w_type)
            others = {k: v for k, v in difference.items() if k != row.options}
            if x_type == torch.float32:  # nothing is rounded: only the offset tells
                others = {k: v for k, v in others.items() if k[1] != row.options[1]}
            assert min(others.values()) > 0.05, (x_type, w_type)


def test_the_page_s_example():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    model = nn.ModuleDict({"norm": ROWS[0].make()})
    names = {"model": model}
    exec(code, names)
    assert names["norm"].casting_mode == model["norm"].casting_mode == "llama"


def test_norms_by_hand():
    """Note 3."""
    row = next(row for row in ROWS if row.name == "Llama4TextL2Norm")
    ours = RMSNorm(N, eps=1e-6, elementwise_affine=False)
    for dtype in TYPES:
        assert differing(ours(inputs(dtype)), row.make()(inputs(dtype))) < 0.002
