"""What Zhang and Sennrich (2019) prove and define: Table 1's invariances, and pRMSNorm.

The identities are exact with eps = 0. Scaling by a power of two commutes with every rounding, so
there the test is by bits.
"""

import math
from decimal import Decimal

import pytest
import torch
from cases import numbers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import same_bits, stat_columns

from fused_rmsnorm import PRMSNorm, RMSNorm
from fused_rmsnorm import functional as F
from fused_rmsnorm._columns import stat_columns as columns_of_python

PS = [None, 0.0625, 0.5]
POWERS = [2.0**-20, 0.5, 4.0, 2.0**20]


def norm(a, p=None):
    return F.rms_norm(a, a.shape[-1], eps=0.0, p=p)


@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize("scale", [*POWERS, 3.7, 0.01])
def test_rescaling_of_the_weight_matrix(device, scale, p):
    """Row 1 of Table 1: RMSNorm(s W x) = RMSNorm(W x), the same for the inputs (row 3)."""
    matrix = numbers((48, 32), torch.float32, device, 0)
    x = numbers((10, 32), torch.float32, device, 1)
    expected = norm(x @ matrix.T, p)
    if scale in POWERS:
        assert same_bits(norm(x @ (matrix * scale).T, p), expected)
        assert same_bits(norm((x * scale) @ matrix.T, p), expected)
    else:
        torch.testing.assert_close(norm(x @ (matrix * scale).T, p), expected)
        torch.testing.assert_close(norm((x * scale) @ matrix.T, p), expected)


@pytest.mark.parametrize("p", PS)
def test_rescaling_of_each_case(device, p):
    """Row 5: every case with a scale of its own; a negative one turns the sign and nothing else."""
    x = numbers((6, 48), torch.float32, device, 2)
    scales = torch.tensor([2.0**-10, 0.5, 1.0, 8.0, -2.0, -0.25], device=device)[:, None]
    assert same_bits(norm(x * scales, p), norm(x, p) * scales.sign())


@pytest.mark.parametrize("p", PS)
def test_gradient_is_orthogonal_and_rescales(device, p):
    """a . da = 0 (the norm ignores the length of a), and da(s a) = da(a) / s (section 3.3)."""
    a = numbers((6, 48), torch.float64, device, 3).requires_grad_()
    dy = numbers((6, 48), torch.float64, device, 4)
    (da,) = torch.autograd.grad(norm(a, p), a, dy)
    size = a.norm(dim=-1) * da.norm(dim=-1)
    assert ((a * da).sum(-1).abs() <= 1e-14 * size).all()
    scaled = (a * 4).detach().requires_grad_()
    (da_scaled,) = torch.autograd.grad(norm(scaled, p), scaled, dy)
    assert same_bits(da_scaled, da / 4)


def test_gradient_of_the_weight_matrix_shrinks_with_it(device):
    """dL/dW of s W is that of W over s: the implicit learning rate of section 3.3."""
    x = numbers((10, 32), torch.float64, device, 5)
    dy = numbers((10, 48), torch.float64, device, 6)
    grads = []
    for scale in (1.0, 4.0):
        matrix = (numbers((48, 32), torch.float64, device, 7) * scale).requires_grad_()
        grads.append(torch.autograd.grad(norm(x @ matrix.T), matrix, dy)[0])
    torch.testing.assert_close(grads[1] * 4, grads[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("p", PS)
def test_no_recentring(device, p):
    """Rows 2 and 4: LayerNorm ignores a shift of its inputs, RMSNorm does not, and must not."""
    x = numbers((6, 48), torch.float32, device, 8)
    layer_norm = torch.nn.functional.layer_norm
    torch.testing.assert_close(layer_norm(x + 1, [48]), layer_norm(x, [48]))
    assert (norm(x + 1, p) - norm(x, p)).abs().mean() > 0.1
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(norm(centred), layer_norm(centred, [48], eps=0))


@pytest.mark.parametrize("p", [0.0625, 0.3, 0.999])
@pytest.mark.parametrize("n", [1, 16, 17, 100, 1000])
def test_statistic_reads_the_first_k_only(device, n, p):
    """What follows the first k changes nothing before it, and is divided by the same root."""
    k = stat_columns(p, n)
    x = numbers((4, n), torch.float32, device, 9)
    y = norm(x, p)
    assert same_bits(y[:, :k].contiguous(), norm(x[:, :k].contiguous()))
    for filler in (0.0, 1e30, float("nan"), float("inf")):
        other = x.clone()
        other[:, k:] = filler
        assert same_bits(norm(other, p)[:, :k], y[:, :k])
    torch.testing.assert_close(y / x, (y[:, :1] / x[:, :1]).expand(4, n))
    assert same_bits(norm(x, 1.0), norm(x))


def columns_read(p: float, n: int) -> int:
    """k as the operator has it: the statistic of one 1 among k numbers is 1 / k."""
    x = torch.zeros(n, dtype=torch.float64)
    x[0] = 1
    return round(torch.ops.fused_rmsnorm.rms_norm_fwd(x, eps=0.0, p=p)[1].item() ** 2)


def test_p_as_a_ratio():
    """p = k / N reads k columns, for every k of every N below 300: 5 / 7, 2 / 33, 43 / 768."""
    pairs = [(k, n) for n in range(1, 300) for k in range(1, n + 1)]
    pairs += [(k, n) for n in (768, 1000, 1024, 4095, 5120) for k in range(1, n + 1, 7)]
    assert [(k, n) for k, n in pairs if columns_read(k / n, n) != k] == []
    assert [(k, n) for k, n in pairs if columns_of_python(k / n, n) != k] == []


def test_p_as_a_decimal():
    """p in thousandths reads ceil(p * N) columns, p taken for the decimal that it is written as:
    0.07 of 100 is 7, though 0.07 * 100 is 7.000000000000001 in binary; 0.29 of 100 is 29."""
    for n in (*range(1, 130), 240, 300, 512, 768, 1000, 1024, 2000, 4096, 5120):
        exact = {m: math.ceil(Decimal(m).scaleb(-3) * n) for m in range(1, 1001)}
        ps = {m: float(Decimal(m).scaleb(-3)) for m in exact}
        assert {m: columns_read(p, n) for m, p in ps.items()} == exact
        assert {m: columns_of_python(p, n) for m, p in ps.items()} == exact


@given(p=st.floats(0, 1, exclude_min=True), n=st.integers(1, 5000))
@example(p=1.0, n=5000)
@example(p=5e-324, n=5000)
@example(p=math.nextafter(1, 0), n=5000)
@example(p=math.nextafter(5 / 7, 1), n=7)  # 6: the next number after the ratio is past it
@settings(max_examples=300)
def test_k_is_the_smallest_that_reaches_p(p, n):
    k = columns_read(p, n)
    assert k == columns_of_python(p, n) == stat_columns(p, n)
    assert k / n >= p
    assert k == 1 or (k - 1) / n < p


@given(
    n=st.one_of(st.integers(1, 2**40), st.integers(2**52, 2**59)),
    p=st.one_of(st.floats(0, 1, exclude_min=True), st.fractions(0, 1).map(float).filter(bool)),
)
@example(n=2**59 - 1, p=math.nextafter(1, 0))
@example(n=2**59, p=1.0)
def test_k_of_rows_that_no_memory_holds(n, p):
    """The rule's two halves, in C++ by its shape on a meta tensor: nothing hangs or overflows."""
    k = columns_of_python(p, n)
    assert 1 <= k <= n
    assert float(k) / float(n) >= p
    assert k == 1 or p == 1 or float(k - 1) / float(n) < p
    x = torch.empty(1, dtype=torch.float64, device="meta").expand(n)
    assert torch.ops.fused_rmsnorm.rms_norm_composite(x, p=p).shape == (n,)


def test_paper_default():
    """6.25 % of 512, the paper's Transformer: 32."""
    assert columns_read(PRMSNorm(512).p, 512) == 32
    assert RMSNorm(512).p is None
