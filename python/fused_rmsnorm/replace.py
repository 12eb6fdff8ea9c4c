"""Puts the fused norms into a model that exists already.

What a norm computes is not told by its class name: the families of transformers differ in when
they round, in what they add to the weight, and models bring classes of their own. So nothing here
lists classes. Whatever looks like a norm (one input, a weight vector, an epsilon) is run on a few
small inputs, as a copy on the CPU, and replaced only if one setting of RMSNorm gives its numbers
in every combination of fp32, bf16 and fp16 input and weight.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .modules import RMSNorm

__all__ = ["replace_layer_norm_", "replace_rms_norm_"]

FilterFn = Callable[[str, nn.Module], bool]

_HALF = (torch.float16, torch.bfloat16)
_DTYPES = (torch.float32, *_HALF)


class _WeightTypedRMSNorm(RMSNorm):
    """T5's rule: x * r is rounded if the weight is of a half type, and to that type."""

    def forward(self, input: Tensor) -> Tensor:
        weight_type = self.weight.dtype
        if input.dtype == weight_type or weight_type not in _HALF:
            return super().forward(input.to(weight_type))
        shape = tuple(self.normalized_shape)
        return (
            functional.rms_norm(input.float(), shape, None, self.eps).to(weight_type) * self.weight
        )


def replace_rms_norm_(model: nn.Module, filter_fn: FilterFn | None = None) -> dict[str, RMSNorm]:
    """Replaces the RMSNorms of ``model`` by fused ones with the same numbers.

    Recognised are torch.nn.RMSNorm, the classes of transformers (Llama's, Gemma's, OLMo 2's and
    T5's way of rounding), and any module that computes one of these. Left alone: norms without a
    weight vector or with more than one input (a gate), groups, hooks, or other arithmetic.

    Parameters are kept, the very same objects: state dicts, optimizers and ties stay valid.

    Args:
        model: changed in place.
        filter_fn: ``filter_fn(name, module)``; only where it returns True is a norm replaced.

    Returns:
        The new modules by name.

    Raises:
        ValueError: ``model`` itself is such a norm, which cannot be replaced from within.
    """
    return _replace(model, _fused_like, filter_fn)


def replace_layer_norm_(
    model: nn.Module, p: float | None = None, filter_fn: FilterFn | None = None
) -> dict[str, RMSNorm]:
    """Replaces torch.nn.LayerNorm by RMSNorm, or by pRMSNorm with ``p``: the paper's own use.

    This changes the function that the model computes, because the mean is no longer subtracted:
    do it before training. Weight and bias are kept, the very same objects, and so is eps.

    Args:
        model: changed in place.
        p: fraction in (0, 1] of the inputs that the statistic reads; the paper uses 0.0625.
        filter_fn: ``filter_fn(name, module)``; only where it returns True is a norm replaced.

    Returns:
        The new modules by name.

    Raises:
        ValueError: ``p`` outside (0, 1], or ``model`` itself is a LayerNorm.
    """

    def like(norm: nn.Module) -> RMSNorm | None:
        if type(norm) is not nn.LayerNorm:
            return None
        shape = list(norm.normalized_shape)
        # Built without parameters of its own: it takes those of the norm that it replaces.
        new = RMSNorm(shape, norm.eps, elementwise_affine=False, p=p)
        return _adopt(new, norm)

    RMSNorm(1, p=p)  # raises for a wrong p even if there is nothing to replace
    return _replace(model, like, filter_fn)


def _replace(
    model: nn.Module, like: Callable[[nn.Module], RMSNorm | None], filter_fn: FilterFn | None
) -> dict[str, RMSNorm]:
    if like(model) is not None:
        raise ValueError(
            f"model is itself a {type(model).__name__}, which cannot be replaced in place: "
            "pass the module that contains it"
        )
    made: dict[nn.Module, RMSNorm | None] = {}  # one new module for one that is used twice
    swapped = {}
    for path, parent in list(model.named_modules()):
        for child_name, child in list(parent._modules.items()):  # with what occurs twice
            name = f"{path}.{child_name}" if path else child_name
            if child is None or isinstance(child, RMSNorm):
                continue
            if filter_fn is not None and not filter_fn(name, child):
                continue
            if child not in made:
                made[child] = like(child)
            new = made[child]
            if new is not None:
                setattr(parent, child_name, new)
                swapped[name] = new
    return swapped


def _adopt(new: RMSNorm, old: nn.Module) -> RMSNorm:
    """Gives ``new`` the parameters and the mode of ``old``."""
    parameters = {name: getattr(old, name, None) for name in ("weight", "bias")}
    for name, parameter in parameters.items():
        new.register_parameter(name, parameter)
    new.elementwise_affine = any(parameter is not None for parameter in parameters.values())
    return new.train(old.training)


def _eps_of(norm: nn.Module) -> Iterator[float | None]:
    for name in ("variance_epsilon", "eps", "epsilon", "norm_eps"):
        eps = getattr(norm, name, "absent")
        if eps is None or isinstance(eps, float):
            yield eps


def _fused_like(norm: nn.Module) -> RMSNorm | None:
    """The RMSNorm that computes what ``norm`` does, if there is one."""
    shape = _row_shape(norm)
    hooks = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks
    one_input = len(inspect.signature(norm.forward).parameters) == 1
    if shape is None or hooks or not one_input:
        return None
    for eps, (kind, offset, mode) in product(
        _eps_of(norm),
        (
            (RMSNorm, 0.0, "torch"),
            (RMSNorm, 0.0, "llama"),
            (RMSNorm, 1.0, "torch"),
            (_WeightTypedRMSNorm, 0.0, "llama"),
        ),
    ):
        settings: dict[str, Any] = {"weight_offset": offset, "casting_mode": mode}
        new = _adopt(kind(list(shape), eps, device="meta", **settings), norm)
        if _same_numbers(new, norm, shape):
            return new
    return None


def _row_shape(norm: nn.Module) -> tuple[int, ...] | None:
    """The shape of a row, if ``norm`` is named one and has at most a weight and a bias."""
    parameters = dict(norm.named_parameters())
    if "norm" not in type(norm).__name__.lower() or not parameters.keys() <= {"weight", "bias"}:
        return None
    if isinstance(norm, nn.RMSNorm):
        return tuple(norm.normalized_shape)
    weight = parameters.get("weight")
    return tuple(weight.shape) if weight is not None and weight.dim() == 1 else None


def _on_cpu(norm: nn.Module, weight: Tensor) -> nn.Module:
    """A copy of ``norm`` with other parameters: its own may be on any device, also on meta."""
    parameters = dict(norm.named_parameters())
    blank = {id(p): nn.Parameter(torch.zeros_like(p, device="cpu")) for p in parameters.values()}
    probe = copy.deepcopy(norm, blank).eval()
    for name, values in (("weight", weight), ("bias", weight.flip(0))):
        if name in parameters:
            setattr(probe, name, nn.Parameter(values, requires_grad=False))
    return probe


@torch.no_grad()
def _same_numbers(new: nn.Module, old: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether both give the same dtype, and the same numbers but for how a sum is added up.

    Another order of rounding changes a fifth of all results by a bf16 or fp16 step; another order
    of summation one in ten thousand.
    """
    random = torch.Generator().manual_seed(0)
    scales = torch.logspace(-4, 2, 8, device="cpu")  # eps decides in the first row
    rows = torch.randn(8, *shape, generator=random, device="cpu")
    rows = rows * scales.view(8, *(1 for _ in shape))
    weight = torch.rand(shape, generator=random, device="cpu") + 0.5
    with torch.autocast("cpu", enabled=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the mixed dtypes that are tried here
        for x_type, w_type in product(_DTYPES, _DTYPES):
            try:
                got, want = (
                    _on_cpu(norm, weight.to(w_type))(rows.to(x_type)) for norm in (new, old)
                )
            except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
                return False
            if not isinstance(want, Tensor) or got.dtype != want.dtype or got.shape != want.shape:
                return False
            close = torch.isclose(got.float(), want.float(), rtol=1e-4, atol=1e-6)
            if (~close).float().mean() > 0.02:
                return False
    return True
