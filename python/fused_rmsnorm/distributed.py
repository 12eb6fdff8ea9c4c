"""DTensor, and with it FSDP2, tensor and sequence parallelism: the operators on split tensors.

Users call nothing here. The package imports this module, which registers what is in it, as soon as
torch.distributed.tensor has been imported; before that there are no DTensors.

====================================  ============================================================
input                                 what happens
====================================  ============================================================
rows split: batch, sequence, heads,   every rank runs the fused operators on its rows, without
over any number of mesh dimensions    communication in either direction; y and dx have the bits of
                                      a single device; gradients of weight and bias are Partial
replicated                            every rank does the same, without communication
normalised dimension split            one all-reduce in each direction, of one number per row;
                                      plain operations instead of fused ones, and sums in another
                                      order than on a single device
Partial                               redistributed first, to split rows if they can be split
weight or bias split                  gathered; where the normalised dimension is split as they
                                      are, each rank uses its part
weight or bias with rows of its own   split as the rows of input are, with gradients split so;
                                      where the normalised dimension is split, that is gathered
gated norms                           rows split or replicated as above; a split normalised
                                      dimension is gathered
a torch.Tensor beside a DTensor       RuntimeError, as from every operator of torch
====================================  ============================================================

``add_rms_norm_``, which works in place, moves nothing: it raises RuntimeError unless input and
residual have the same placements, none of them Partial.

In parallelize_module, SequenceParallel() is the style for the modules of this package. It drops a
second positional argument: AddRMSNorm under it is called with ``residual=``, by keyword, or made
parallel by torch.distributed.tensor.distribute_module. fully_shard needs nothing of all this.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._op_schema import OpSchema, OpStrategy, RuntimeSchemaInfo
from torch.distributed.tensor._ops.utils import (
    expand_to_full_mesh_op_strategy,
    register_op_strategy,
)

from ._columns import stat_columns
from ._ops import ops

# Rows stay split where some ranks have none: an option that torch 2.11 does not have yet.
_FEWER_ROWS_THAN_RANKS: dict[str, Any] = {"allow_uneven_sharding": True}
if _FEWER_ROWS_THAN_RANKS.keys() - inspect.signature(expand_to_full_mesh_op_strategy).parameters:
    _FEWER_ROWS_THAN_RANKS = {}
_AFFINE = ("weight", "bias")
_AFFINE_GRADS = ("dw", "db")


def _dim(p: Placement, otherwise: int) -> int:
    """The dimension that ``p`` splits, in chunks or in strides."""
    return getattr(p, "dim", otherwise)


def _affine_placement(spec: Any, rows: Placement, x: Any) -> Placement:
    """Of a weight or bias beside rows placed so: split where it has a dimension that is."""
    if rows.is_replicate() or spec.ndim == 1:
        return Replicate()
    dim = _dim(rows, 0) - (x.ndim - spec.ndim)
    return Shard(dim) if dim >= 0 and spec.shape[dim] != 1 else Replicate()


def _strategy(op_schema: OpSchema) -> OpStrategy:
    """Where an operator can run as it is: on whole rows. DTensor chooses what costs least."""
    schema = op_schema.op._schema
    given = dict(zip((a.name for a in schema.arguments), op_schema.args_schema, strict=False))
    specs = {k: v.strategies[0].output_spec for k, v in given.items() if isinstance(v, OpStrategy)}
    x = specs["input"]
    in_place = op_schema.is_inplace_op()
    if in_place and specs["residual"].placements != x.placements:
        raise RuntimeError(
            "input and residual must have the same placements to be written in place, but have "
            f"{x.placements} and {specs['residual'].placements}"
        )
    splits: list[Placement] = [Shard(d) for d in range(x.ndim - 1)]
    affine = [specs[name] for name in _AFFINE if name in specs]
    if all(spec.ndim == 1 for spec in affine):
        # Rows may also be split in strides, as by a view that flattened split dimensions.
        splits += [p for p in x.placements if _dim(p, x.ndim) < x.ndim - 1 and p not in splits]

    outputs = [output.name for output in schema.returns]
    wanted = dict.fromkeys(outputs, True)
    if "output_mask" in given:
        mask = cast(Sequence[bool], given["output_mask"])
        wanted = dict(zip(outputs, mask, strict=True))
        for name in _AFFINE_GRADS:
            wanted[name] &= "weight" in specs

    def rule(rows: Placement) -> list[Placement | None]:
        placed = dict.fromkeys(outputs, rows)
        if "weight" in specs:
            own = _affine_placement(specs["weight"], rows, x)
            summed = Partial() if own.is_replicate() and rows in splits else own
            placed |= {name: summed for name in _AFFINE_GRADS if name in placed}
        return [
            *(placed[name] if wanted[name] else None for name in outputs),
            *(
                _affine_placement(spec, rows, x) if name in _AFFINE else rows
                for name, spec in specs.items()
            ),
        ]

    return expand_to_full_mesh_op_strategy(
        x.mesh,
        op_schema,
        [rule(rows) for rows in (Replicate(), *splits)],
        input_index=len(outputs),
        inplace_op=in_place,
        **_FEWER_ROWS_THAN_RANKS,
    )


class _SplitRows:
    """Rows whose columns are spread over ranks, as those of the DTensor ``x``, and their norm.

    On each mesh dimension that splits the columns, a sum over a row starts out Partial, and
    weight, bias and their gradients are split as the columns are.
    """

    def __init__(
        self,
        x: DTensor,
        eps: float | None = None,
        p: float | None = None,
        weight_offset: float = 0.0,
        casting_mode: str = "torch",
    ) -> None:
        columns = Shard(x.ndim - 1)
        self.mesh, self.shape, self.type = x.device_mesh, x.shape, x.dtype
        self.rows = [Replicate() if q.is_partial() else q for q in x.placements]
        self.row_sums = [Partial() if q == columns else q for q in self.rows]
        self.stats = [Replicate() if q == columns else q for q in self.rows]
        self.affine = [Shard(0) if q == columns else Replicate() for q in self.rows]
        self.column_sums = [
            Shard(0) if q == columns else q if q.is_replicate() else Partial() for q in self.rows
        ]
        self.acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.x = self.local(x, self.rows).to(self.acc)
        self.eps = torch.finfo(self.acc).eps if eps is None else eps
        n = x.shape[-1]
        # With p a number, so that a compiler guards it; else a symbol stays one.
        self.k = n if p is None else stat_columns(p, int(n))
        # Which columns the statistic reads, laid out as a weight is; None for all.
        self.head: Tensor | None = None
        if self.k < n:
            head = torch.arange(n, device=x.device) < self.k
            whole = self.wrap(head, [Replicate() for _ in self.rows], head.shape)
            self.head = self.local(whole, self.affine)
        self.weight_offset, self.llama = weight_offset, casting_mode == "llama"

    def local(self, t: DTensor, placements: Sequence[Placement]) -> Tensor:
        # Detached before: torch 2.11 has no rule for the detach_ that ends redistribute here, below
        # autograd, for a tensor that requires grad.
        detached = cast(DTensor, t.detach())
        return detached.redistribute(placements=placements).to_local()

    def wrap(self, t: Tensor, placements: Sequence[Placement], shape: torch.Size) -> DTensor:
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(t, self.mesh, placements, shape=shape, stride=stride)

    def wrap_stat(self, t: Tensor, placements: Sequence[Placement]) -> DTensor:
        return self.wrap(t, placements, torch.Size([*self.shape[:-1], 1]))

    def mean(self, t: Tensor) -> Tensor:
        """Sum over whole rows, by k: the one all-reduce."""
        total = self.wrap_stat(t.sum(-1, keepdim=True), self.row_sums)
        return self.local(total, self.stats) / self.k

    def in_head(self, t: Tensor) -> Tensor:
        return t if self.head is None else torch.where(self.head, t, 0)

    def scale(self, weight: DTensor, type: torch.dtype) -> Tensor:
        return self.local(weight, self.affine).to(type) + self.weight_offset

    def rounded(self, h: Tensor) -> Tensor:
        """What the weight is multiplied with."""
        return h.to(self.type) if self.llama else h

    def forward(self, weight: DTensor | None, bias: DTensor | None) -> tuple[DTensor, DTensor]:
        r = torch.rsqrt(self.mean(self.in_head(self.x.square())) + self.eps)
        y, out = self.rounded(self.x * r), self.type
        if weight is not None:
            if self.llama:
                out = torch.promote_types(out, weight.dtype)
            type = torch.promote_types(self.acc, out)
            y = y.to(type) * self.scale(weight, type)
            if bias is not None:
                y = y + self.local(bias, self.affine).to(type)
        return self.wrap(y.to(out), self.rows, self.shape), self.wrap_stat(r, self.stats)

    def backward(
        self,
        dy: DTensor,
        weight: DTensor | None,
        rstd: DTensor,
        grad_sum: DTensor | None,
        mask: list[bool],
    ) -> tuple[DTensor | None, DTensor | None, DTensor | None]:
        g, r = self.local(dy, self.rows).to(self.acc), self.local(rstd, self.stats)
        h = self.x * r
        dx = dw = db = None
        if mask[0]:
            u = g if weight is None else g * self.scale(weight, self.acc)
            d = r * (u - self.in_head(h * self.mean(u * h)))
            if grad_sum is not None:
                d = d + self.local(grad_sum, self.rows)
            dx = self.wrap(d.to(self.type), self.rows, self.shape)
        if weight is not None:
            leading = tuple(range(h.dim() - 1))

            def over_rows(t: Tensor) -> DTensor:
                total = t.sum(leading) if leading else t
                return self.wrap(total.to(weight.dtype), self.column_sums, weight.shape)

            dw = over_rows(g * self.rounded(h)) if mask[1] else None
            db = over_rows(g) if mask[2] else None
        return dx, dw, db


def _splits_columns(x: Any, *others: Any) -> bool:
    """Whether _SplitRows applies: DTensors of one mesh, x with a chunk of columns on each rank."""
    if not isinstance(x, DTensor) or Shard(x.ndim - 1) not in x.placements:
        return False
    last = x.ndim - 1
    in_chunks = all(_dim(p, -1) != last or p == Shard(last) for p in x.placements)
    return in_chunks and all(
        isinstance(t, DTensor) and t.device_mesh == x.device_mesh for t in others if t is not None
    )


def _is_vector(weight: Any) -> bool:
    return weight is None or weight.ndim == 1


# What follows sees the DTensors first; what it leaves (NotImplemented) takes the strategy.


def _fwd(x: Any, weight: Any = None, bias: Any = None, *options: Any) -> Any:
    if not _splits_columns(x, weight, bias) or not _is_vector(weight):
        return NotImplemented
    with torch.no_grad():
        return _SplitRows(x, *options).forward(weight, bias)


def _add_fwd(x: Any, residual: Any, *others: Any) -> Any:
    if not (_splits_columns(x, residual) or _splits_columns(residual, x)):
        return NotImplemented
    with torch.no_grad():
        s = (x + residual).contiguous()
        y, rstd = ops.rms_norm_fwd(s, *others)
        return _as_sum_of(y, x, *others), s, rstd


def _as_sum_of(y: Any, x: Any, weight: Any = None, bias: Any = None, *options: Any) -> Any:
    """``y``, the norm of a sum that may be wider than x, in the dtype of the norm of x."""
    out = x.dtype
    if weight is not None and "llama" in options:
        out = torch.promote_types(out, weight.dtype)
    return y.to(out)


def _add_in_place(x: Any, residual: Any, *others: Any) -> Any:
    if not _splits_columns(x, residual):
        return NotImplemented
    if x.placements != residual.placements or any(p.is_partial() for p in x.placements):
        return NotImplemented
    y, s, _ = _add_fwd(x, residual, *others)
    residual.copy_(s)
    x.copy_(y)


def _bwd(dy: Any, x: Any, weight: Any, rstd: Any, grad_sum: Any, mask: Any, *options: Any) -> Any:
    if not _splits_columns(x, dy, weight, rstd, grad_sum) or not _is_vector(weight):
        return NotImplemented
    with torch.no_grad():
        return _SplitRows(x, *options).backward(dy, weight, rstd, grad_sum, mask)


def _register() -> None:
    for op, split_columns in (
        (ops.rms_norm_fwd.default, _fwd),
        (ops.add_rms_norm_fwd.default, _add_fwd),
        (ops.add_rms_norm_.default, _add_in_place),
        (ops.rms_norm_bwd.default, _bwd),
        (ops.rms_norm_gated_fwd.default, None),
        (ops.rms_norm_gated_bwd.default, None),
    ):
        types = [str(argument.type) for argument in op._schema.arguments]
        options = next(i for i, name in enumerate(types) if "Tensor" not in name)
        # What is not a tensor decides about outputs, too: the mask about which there are,
        # casting_mode about their dtype. From `options` on arguments count in DTensor's cache.
        register_op_strategy(op, schema_info=RuntimeSchemaInfo(options))(_strategy)
        if split_columns is not None:
            _register_rule(op, split_columns)
    for op in (
        ops.rms_norm.default,
        ops.add_rms_norm.default,
        ops.rms_norm_composite.default,
        ops.rms_norm_gated.default,
        ops.rms_norm_gated_composite.default,
    ):
        # Only seen under inference_mode: elsewhere the dispatcher has taken them apart before.
        _register_rule(op, op.decompose)


def _register_rule(op: OpOverload, function: Callable[..., Any]) -> None:
    def rule(cls: type, op: OpOverload, types: Any, args: Any, kwargs: Any = None) -> Any:
        return function(*args)  # all of them: the dispatcher makes keywords positional

    torch.library.register_torch_dispatch(op._schema.name, DTensor, rule)


_register()
