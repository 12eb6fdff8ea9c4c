"""What the results are compared with: the definition in fp64, and how far from it is right.

The definition is written out in fp64 torch operations and differentiated by torch.autograd: it
shares neither code nor algebra with the kernels or with the composite in csrc/binding.

Tolerances are derived, element by element, from what the design promises: everything between load
and store in the arithmetic type (fp32 for fp32, fp16 and bf16; fp64 for fp64) and one rounding at
the end. With u the epsilon of the arithmetic type and e that of the output:

* A sum of n terms over at least 16 accumulators (8 in fp64, with the narrowest vectors) has an
  error of at most (n / 16 + 5) u/2 times the sum of the magnitudes. The statistic is a sum of
  positive terms, and r, its inverse square root, halves its relative error. ``growth(n)`` is twice
  the whole, in units of u: a few roundings of products and of r are in the slack.
* y = x r s + b, s = offset + w:      growth(n) u (|x r| (|offset| + |w|) + |b|) + e |y|
* dx = r g - x r^3 sum(g x) / k, with |g| = |dy| (|offset| + |w|) in the bound:
      growth(n) u (|r g| + |x| r^3 sum|g x| / k) + e |dx|   (+ the term of grad_sum)
* dw = sum(dy x r), in fp32 over all rows:      (growth(n) + rows) u sum|dy x r| + e |dw|

plus the smallest number of the output type, for results that are subnormal in it. In llama mode
x r is rounded to x's dtype, and the fp32 value may fall on the other side of a rounding boundary
than the fp64 one: one more epsilon of x's dtype on |x r s|. test_modules.py checks that mode to
the bit.

A bound that follows from a worst case could hide a loss of a few bits: test_forward.py and
test_backward.py therefore also compare root-mean-square errors with those of F.rms_norm on the
same input (``rms_error``).
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def stat_columns(p: float | None, n: int) -> int:
    """The smallest k with k / n >= p, by trying them all."""
    return n if p is None else next(k for k in range(1, n + 1) if k / n >= p)


def arithmetic_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Options:
    """The options of an operator, and the numbers that they stand for."""

    eps: float | None = None
    p: float | None = None
    weight_offset: float = 0.0
    casting_mode: str = "torch"

    def kwargs(self) -> dict:
        return dict(self.__dict__)

    def keywords(self) -> dict:
        """Without eps, which the functions take as a positional argument."""
        # By fields: torch 2.11 compiles no self.__dict__.items(), and this is called in what is.
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "eps"}

    def eps_for(self, dtype: torch.dtype) -> float:
        return torch.finfo(arithmetic_type(dtype)).eps if self.eps is None else self.eps

    @classmethod
    def of(cls, module: object) -> "Options":
        """Those of a module."""
        return cls(**{f.name: getattr(module, f.name) for f in fields(cls)})

    def exact(self, dtype: torch.dtype) -> "Options":
        """As definitions take them for numbers that are in fp64 and were of ``dtype``."""
        return replace(self, eps=self.eps_for(dtype), casting_mode="torch")

    def statistic(self) -> "Options":
        """Those that x * r depends on."""
        return replace(self, weight_offset=0.0, casting_mode="torch")

    def beside(self, weight: object) -> "Options":
        """As an operator takes them with this weight: an offset without a weight is refused."""
        return self if weight is not None else replace(self, weight_offset=0.0)

    def output_type(self, x: torch.dtype, weight: torch.dtype | None) -> torch.dtype:
        if self.casting_mode == "torch" or weight is None:
            return x
        return torch.promote_types(x, weight)


def rms_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, o: Options) -> Tensor:
    """The definition, in fp64, differentiable; rounding in llama mode has derivative one."""
    a = x.double()
    k = stat_columns(o.p, x.shape[-1])
    h = a / (a[..., :k].square().mean(-1, keepdim=True) + o.eps_for(x.dtype)).sqrt()
    if o.casting_mode == "llama":
        h = h + (h.to(x.dtype).double() - h).detach()
    y = h if weight is None else h * (o.weight_offset + weight.double())
    return y if bias is None else y + bias.double()


def activate(z: Tensor, activation: str) -> Tensor:
    return z.sigmoid() if activation == "sigmoid" else z * z.sigmoid()


def rms_norm_gated(
    x: Tensor, z: Tensor, weight, bias, o: Options, activation="silu", norm_before_gate=True
) -> Tensor:
    """The definition of the gated norm, in fp64; o.eps has to be given for a half type's own."""
    act = activate(z.double(), activation)
    if norm_before_gate:
        return rms_norm(x, weight, bias, o) * act
    return rms_norm(x.double() * act, weight, bias, o)


def magnitude(weight: Tensor | None, o: Options) -> Tensor | float:
    """Of the terms of s = offset + w, each of which is rounded before they may cancel."""
    return 1.0 if weight is None else weight.detach().double().abs() + abs(o.weight_offset)


def growth(n: int) -> float:
    return n / 16 + 12


def _bound(dtype: torch.dtype, terms: Tensor, result: Tensor, x_type: torch.dtype, steps: float):
    info = torch.finfo(dtype)
    u = torch.finfo(arithmetic_type(x_type)).eps
    smallest = max(info.smallest_normal * info.eps, torch.finfo(arithmetic_type(x_type)).tiny)
    return steps * u * terms + info.eps * result.abs() + smallest


def _assert_within(what: str, actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    a = actual.detach().double()
    top = torch.finfo(actual.dtype).max
    # Past the largest number a rounded result is infinite; near it, either is right.
    overflow = (expected.abs() + bound > top) & ~a.isfinite() & (a.sign() == expected.sign())
    both_nan = a.isnan() & expected.isnan()
    wrong = ~(((a - expected).abs() <= bound) | overflow | both_nan)
    if wrong.any():
        i = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are off; first at {i}: "
            f"got {a[i].item()!r}, expected {expected[i].item()!r} +- {bound[i].item():.3g}"
        )


def assert_forward(y: Tensor, x: Tensor, weight, bias, o: Options) -> None:
    """y is the norm of x to within the bound above; shape, dtype and layout are right, too."""
    expected = rms_norm(x, weight, bias, o).detach()
    assert y.shape == x.shape
    assert y.dtype == o.output_type(x.dtype, None if weight is None else weight.dtype)
    assert y.is_contiguous()
    h = rms_norm(x, None, None, o.statistic()).detach().abs()
    without_bias = h * magnitude(weight, o)
    terms = without_bias if bias is None else without_bias + bias.detach().double().abs()
    bound = _bound(y.dtype, terms, expected, x.dtype, growth(x.shape[-1]))
    if o.casting_mode == "llama":
        bound = bound + torch.finfo(x.dtype).eps * without_bias
    _assert_within("y", y, expected, bound)


def gradients(x: Tensor, weight, bias, dy: Tensor, o: Options, grad_sum: Tensor | None = None):
    """(dx, dw, db) of the definition, in fp64; None where there is no such input."""
    leaves = [
        None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias)
    ]
    o = o.exact(x.dtype)
    y = rms_norm(*leaves, o)
    given = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(y, given, dy.double()))
    dx, dw, db = (None if t is None else next(found) for t in leaves)
    return dx if grad_sum is None else dx + grad_sum.double(), dw, db


def assert_backward(grads, x, weight, bias, dy, o: Options, grad_sum: Tensor | None = None) -> None:
    """grads are (dx, dw, db), None for those that were not asked for."""
    expected = gradients(x, weight, bias, dy, o, grad_sum)
    dx, dw, db = grads
    n = x.shape[-1]
    rows = x.numel() // n
    k = stat_columns(o.p, n)
    a, g0 = x.detach().double(), dy.double()
    r = (a[..., :k].square().mean(-1, keepdim=True) + o.eps_for(x.dtype)).rsqrt()
    g_size = g0.abs() * magnitude(weight, o)
    if dx is not None:
        assert dx.shape == x.shape
        assert dx.dtype == x.dtype
        dot = (g_size * a.abs()).sum(-1, keepdim=True) / k
        terms = r * g_size + a.abs() * r * (r * r * dot)
        if grad_sum is not None:
            terms = terms + grad_sum.double().abs()
        _assert_within(
            "dx", dx, expected[0], _bound(dx.dtype, terms, expected[0], x.dtype, growth(n))
        )
    for name, d, e, of, terms in (
        ("dw", dw, expected[1], weight, (g0 * a * r).abs()),
        ("db", db, expected[2], bias, g0.abs()),
    ):
        if d is None:
            continue
        assert d.shape == of.shape
        assert d.dtype == of.dtype
        total = terms.sum_to_size(of.shape)
        bound = _bound(d.dtype, total, e, x.dtype, growth(n) + rows)
        if o.casting_mode == "llama" and name == "dw":
            bound = bound + torch.finfo(x.dtype).eps * total
        if d.dtype == torch.float64 and x.dtype != torch.float64:
            bound = bound + torch.finfo(torch.float32).eps * e.abs()  # summed in fp32, then widened
        _assert_within(name, d, e, bound)


def as_exact(t: Tensor) -> np.ndarray:
    """In numpy's longdouble, which on x86 has 11 bits more than fp64."""
    return t.detach().double().cpu().numpy().astype(np.longdouble)


def rms_error(actual: Tensor, expected: np.ndarray) -> float:
    """Root mean square of the error, relative to that of what is expected (in longdouble)."""
    error = as_exact(actual) - expected
    return float(np.sqrt((error * error).sum() / (expected * expected).sum()))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, dtype and every bit; NaN equals NaN of the same bits, 0 differs from -0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    word = ints[a.element_size()]
    return torch.equal(a.detach().contiguous().view(word), b.detach().contiguous().view(word))
