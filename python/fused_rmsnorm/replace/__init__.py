"""Puts the fused norms into a model that exists already.

A swap must not change what a model computes, so it needs two things: evidence that a norm computes
what RMSNorm does (its type, or what is seen when it runs: :mod:`.evidence`), and that it is nothing
else beside that (:mod:`.belongings`). What lacks one of them stays, and the report says why.
"""

from __future__ import annotations

from torch import nn

from ..modules import RMSNorm
from .belongings import foreign_parameters, what_else_it_carries
from .evidence import Evidence, adopt
from .walk import FilterFn, SwapReport, swap

__all__ = ["SwapReport", "replace_layer_norm_", "replace_rms_norm_"]


def replace_rms_norm_(model: nn.Module, filter_fn: FilterFn | None = None) -> SwapReport:
    """Replaces the RMSNorms of ``model`` by fused ones with the same numbers.

    Recognised are torch.nn.RMSNorm, the classes of transformers (Llama's, Gemma's, OLMo 2's and
    T5's way of rounding), and any module named a norm that computes one of these, with the same
    gradients, for every rank and dtype, in training and evaluation. Left alone, with a reason:
    other arithmetic, and whatever carries more than a weight and a bias (buffers, modules, hooks,
    an own ``forward``) or belongs to a wrapper that holds on to it (FSDP, TorchScript).
    docs/swapping.md has the whole rule.

    Parameters are kept, the very same objects: state dicts, optimizers and ties stay valid. The
    random state is kept, too.

    Args:
        model: changed in place.
        filter_fn: ``filter_fn(name, module)``; only where it returns True is a norm replaced.

    Returns:
        The new modules by name; ``.left`` says of every other norm why it stays.

    Raises:
        ValueError: ``model`` itself is such a norm, which cannot be replaced from within.
        TypeError: ``model`` is no module, a list of them for one, or ``filter_fn`` no function.
    """
    return swap(model, Evidence().fused_like, filter_fn)


def replace_layer_norm_(
    model: nn.Module, p: float | None = None, filter_fn: FilterFn | None = None
) -> SwapReport:
    """Replaces torch.nn.LayerNorm by RMSNorm, or by pRMSNorm with ``p``: the paper's own use.

    This changes the function that the model computes, because the mean is no longer subtracted:
    do it before training. Weight and bias are kept, the very same objects, and so is eps. Only
    torch.nn.LayerNorm itself is replaced: what a subclass changes cannot be kept. Otherwise the
    rule of :func:`replace_rms_norm_` holds for what stays.

    Args:
        model: changed in place.
        p: fraction in (0, 1] of the inputs that the statistic reads; the paper uses 0.0625.
        filter_fn: ``filter_fn(name, module)``; only where it returns True is a norm replaced.

    Returns:
        The new modules by name; ``.left`` says of every other norm why it stays.

    Raises:
        ValueError: ``p`` outside (0, 1], or ``model`` itself is a LayerNorm.
        TypeError: as :func:`replace_rms_norm_`.
    """

    def like(norm: nn.Module) -> RMSNorm | str:
        if type(norm) is not nn.LayerNorm:
            kind = "a subclass of" if isinstance(norm, nn.LayerNorm) else "not"
            return f"{kind} torch.nn.LayerNorm: only that class itself is replaced"
        shape = tuple(norm.normalized_shape)
        why = what_else_it_carries(norm) or foreign_parameters(norm, shape)
        return why or adopt(RMSNorm(list(shape), norm.eps, device="meta", p=p), norm)

    RMSNorm(1, p=p)  # raises for a wrong p even if there is nothing to replace
    return swap(model, like, filter_fn)
