"""What Zhang and Sennrich (2019) prove and define: Table 1's invariances, and pRMSNorm.

The identities are exact with eps = 0. Scaling by a power of two commutes with every rounding, so
there the test is by bits.
"""

import math
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from cases import numbers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import same_bits, stat_columns

from fused_rmsnorm import PRMSNorm, RMSNorm
from fused_rmsnorm import functional as F

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


@given(p=st.floats(1e-9, 1), n=st.integers(1, 5000))
@example(p=0.07, n=100)  # 7; in binary, 0.07 * 100 is 7.000000000000001
@example(p=0.29, n=100)  # 29; in binary, 28.999999999999996
@example(p=0.1, n=10)
@example(p=0.55, n=100)
@example(p=1.0, n=5000)
@example(p=5e-324, n=5000)
@example(p=math.nextafter(1, 0), n=5000)
@example(p=1 / 3, n=3)
@settings(max_examples=300)
def test_k_is_the_ceiling_in_decimal(p, n):
    exact = Decimal(repr(p)) * n
    k = columns_read(p, n)
    assert k == math.ceil(Fraction(repr(p)) * n) == math.ceil(exact)
    assert 1 <= k <= n


@given(percent=st.integers(1, 10000), n=st.integers(1, 400).map(lambda i: 100 * i))
def test_a_percentage_of_a_multiple_of_100(percent, n):
    """p with up to four decimals, as people write it."""
    assert columns_read(percent / 10000, n) == -(-percent * n // 10000)


def test_paper_default():
    """6.25 % of 512, the paper's Transformer: 32."""
    assert columns_read(PRMSNorm(512).p, 512) == 32
    assert RMSNorm(512).p is None
