"""docs/paper-checkpoints.md: norms trained with the paper's published code, loaded into ours.

The definitions of that code are written out here, in fp64, so that what differs is their formula
and not their rounding.
"""

import re
from pathlib import Path

import pytest
import torch
from cases import numbers
from torch import Tensor, nn

from fused_rmsnorm import PRMSNorm, RMSNorm

PAGE = (Path(__file__).parents[2] / "docs" / "paper-checkpoints.md").read_text()


@pytest.fixture(scope="module")
def page() -> dict:
    """What the page's Python code defines."""
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(code, names)
    return names


def head(x: Tensor, p: float) -> Tensor:
    """The columns that the published code reads: int(d * p); all of them for p outside [0, 1]."""
    return x[..., : int(x.shape[-1] * p)] if 0 <= p <= 1 else x


def of_pytorch(x: Tensor, scale: Tensor, offset: Tensor | None = None, p=-1.0, eps=1e-8) -> Tensor:
    rms = head(x, p).square().mean(-1, keepdim=True).sqrt()
    y = scale * (x / (rms + eps))
    return y if offset is None else y + offset


def of_tensorflow(x: Tensor, scale: Tensor, offset: Tensor | None = None, p=-1.0, eps=1e-8):
    y = scale * (x * (head(x, p).square().mean(-1, keepdim=True) + eps).rsqrt())
    return y if offset is None else y + offset


def parameters(d: int) -> tuple[Tensor, Tensor]:
    return numbers(d, torch.float64, "cpu", 1), numbers(d, torch.float64, "cpu", 2)


def row_of(rms: float, d: int = 512) -> Tensor:
    x = numbers((1, d), torch.float64, "cpu", 3)
    return x * (rms / x.square().mean().sqrt())


def difference(y: Tensor, expected: Tensor) -> float:
    """As a share of y."""
    return ((y - expected).abs() / expected.abs()).max().item()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("d", "p"), [(512, -1.0), (512, 0.0625), (1000, 0.0625), (512, 6.25)])
def test_pytorch_checkpoint(page, d, p, bias):
    scale, offset = parameters(d)
    offset = offset if bias else None
    norm = page["paper_norm"](scale, offset, p=p)
    for size, share in ((1.0, 5e-8), (1e-3, 5e-5)):
        x = numbers((50, d), torch.float64, "cpu", 4) * size
        expected = of_pytorch(x, scale, offset, p)
        torch.testing.assert_close(norm(x), expected, rtol=share, atol=share)
    zeros = torch.zeros(1, d, dtype=torch.float64)
    assert torch.equal(norm(zeros), of_pytorch(zeros, scale, offset, p))


@pytest.mark.parametrize("eps", [1e-8, 1e-5, 1e-6])
@pytest.mark.parametrize(("d", "p"), [(512, -1.0), (512, 0.0625), (1000, 0.0625)])
def test_checkpoint_with_eps_inside(page, d, p, eps):
    """TensorFlow's, and without p Theano's and Lasagne's: equal to a few roundings of fp64."""
    scale, offset = parameters(d)
    norm = page["paper_norm"](scale, offset, p=p, eps=eps)
    for rms in (1.0, 1e-2, 1e-4):
        x = row_of(rms, d)
        expected = of_tensorflow(x, scale, offset, p, eps)
        torch.testing.assert_close(norm(x), expected, rtol=1e-13, atol=1e-13)


def share(text: str) -> float:
    return float(text.strip())


ROWS = re.findall(r"^\| ([\d.e-]+) \| ([\d.e-]+) \| ([\d.e-]+) \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_how_far_eps_is_off(page, row):
    """The page's table, to the digit that it shows."""
    rms, squared, same = (share(cell) for cell in row)
    scale, _ = parameters(512)
    x = row_of(rms)
    expected = of_pytorch(x, scale)
    for eps, figure in ((1e-16, squared), (1e-8, same)):
        found = difference(page["paper_norm"](scale, eps=eps)(x), expected)
        assert f"{found:.0e}" == f"{figure:.0e}"


def test_the_table_was_found():
    assert [row[0] for row in ROWS] == ["1", "1e-2", "1e-4"]


def test_how_far_one_column_is_off(page):
    """d = 1000 and 6.25 %: 62 columns in the published code, 63 in the paper's text and here."""
    d, p = 1000, 0.0625
    x = numbers((4000, d), torch.float64, "cpu", 5)
    scale = torch.ones(d, dtype=torch.float64)
    theirs = of_pytorch(x, scale, p=p)
    by_text = PRMSNorm(d, p, eps=1e-16, dtype=torch.float64)
    off = (by_text(x)[:, 0] / theirs[:, 0] - 1).abs()
    assert f"{off.mean().item():.1%}" == "0.8%"
    assert 60 < 1 / (off > 0.04).double().mean().item() < 80
    last = x.clone()
    last[:, 62] = 100  # column 63, which only the text reads
    norm = page["paper_norm"](scale, p=p)
    assert difference(norm(x), theirs) < 1e-7
    assert torch.equal(norm(last)[:, :62], norm(x)[:, :62])
    assert not torch.equal(by_text(last)[:, :62], by_text(x)[:, :62])
    whole = x[:100, :512].contiguous()
    expected = of_pytorch(whole, scale[:512], p=p)
    assert difference(PRMSNorm(512, p, eps=1e-16, dtype=torch.float64)(whole), expected) < 1e-7


class Paper(nn.Module):
    """With the names that the published module has."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(numbers(d, torch.float64, "cpu", 6))
        self.offset = nn.Parameter(numbers(d, torch.float64, "cpu", 7))

    def forward(self, x: Tensor) -> Tensor:
        return of_pytorch(x, self.scale, self.offset)


def test_whole_model(page):
    def model(norm: nn.Module) -> nn.Sequential:
        return nn.Sequential(nn.Linear(8, 16, dtype=torch.float64), nn.Sequential(norm))

    theirs = model(Paper(16))
    theirs.register_buffer("rescale", torch.ones(1))  # ends alike, and is another name
    state = page["renamed"](theirs.state_dict())
    assert set(state) == {"0.weight", "0.bias", "1.0.weight", "1.0.bias", "rescale"}
    ours = model(RMSNorm(16, 1e-16, bias=True, dtype=torch.float64))
    ours.register_buffer("rescale", torch.zeros(1))
    ours.load_state_dict(state)
    x = numbers((5, 8), torch.float64, "cpu", 8)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-7, atol=1e-7)
    assert set(page["renamed"]({"scale": 1, "sub.scales": 2})) == {"weight", "sub.scales"}


def test_traps(page):
    scale, _ = parameters(8)
    with pytest.raises(ValueError, match="reads no column"):
        page["paper_norm"](scale, p=0.0625)
    with pytest.raises(ValueError, match=r"in \(0, 1\], but got 6.25"):
        RMSNorm(8, p=6.25)
    zeros = torch.zeros(1, 8, dtype=torch.float16)
    assert of_pytorch(zeros, scale.half()).isnan().all()
    assert torch.equal(page["paper_norm"](scale.half(), eps=1e-16)(zeros), zeros)
