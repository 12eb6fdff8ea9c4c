"""RMSNorm, PRMSNorm, AddRMSNorm, RMSNormGated as modules: parameters and defaults, nothing else."""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from torch import Tensor, nn

from . import functional
from ._eager import number
from ._shapes import checked_group_size, checked_shape
from .encoder_layers import call_in_encoder_layers
from .functional import Activation, CastingMode
from .nested import of_each_sequence

__all__ = ["AddRMSNorm", "CompileMode", "PRMSNorm", "RMSNorm", "RMSNormGated"]

CompileMode = Literal["opaque", "fuse"]

# Module -> what torch.jit.script compiles in its place; scripting.py puts them here.
STAND_INS: dict[type[RMSNorm], type[RMSNorm]] = {}


def _set_eps(norm: RMSNorm, eps: float | None) -> None:
    norm.eps = eps


def _largest(dtype: torch.dtype | None) -> float:
    return torch.finfo(dtype or torch.get_default_dtype()).max


class RMSNorm(nn.RMSNorm):
    """Root mean square layer normalisation (Zhang and Sennrich, 2019), fused.

    A drop-in for torch.nn.RMSNorm, of which it is a subclass: same positional arguments, same
    state dict (``weight`` only, unless ``bias=True``), same numbers, faster.

    Args:
        normalized_shape: the last dimensions of the input, normalised together.
        eps: inside the root; None: epsilon of the arithmetic type (fp32 for bf16 and fp16 input).
            Any number, as torch.nn.RMSNorm: rows whose mean square is below ``-eps`` become NaN.
        elementwise_affine: whether there is a weight.
        device, dtype: of the parameters. An fp32 weight under bf16 input stays fused.
        bias: whether there is a bias, too; needs ``elementwise_affine``.
        group_size: each row is cut into groups of so many elements, each normalised by itself.
        p: pRMSNorm: fraction in (0, 1] of the leading elements that the mean square is taken over.
        weight_offset: the scale is ``weight_offset + weight`` and the weight starts at
            ``1 - weight_offset``: 1.0 for checkpoints of the Gemma family. Needs
            ``elementwise_affine``.
        casting_mode: ``"torch"``: all in fp32, one rounding at the end, output in the input's
            dtype. ``"llama"``: rounded to the input's dtype before the weight is multiplied, bit
            for bit what the Llama family of transformers does.
        compile_mode: under torch.compile, ``"opaque"`` keeps the fused operator, with the bits of
            eager mode; ``"fuse"`` hands Inductor plain operations that it can fuse with their
            neighbours. No difference in eager mode.

    Shape: input ``[*, *normalized_shape]``, output the same. Also a nested tensor, of either
    layout, whose last dimensions are ``normalized_shape``.
    """

    bias: nn.Parameter | None
    group_size: int | None = None
    # Names that models have for eps: a norm that was swapped is read and changed by its old one.
    variance_epsilon = epsilon = norm_eps = property(lambda norm: norm.eps, _set_eps)
    __jit_unused_properties__ = ("variance_epsilon", "epsilon", "norm_eps")

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = False,
        group_size: int | None = None,
        p: float | None = None,
        weight_offset: float = 0.0,
        casting_mode: CastingMode = "torch",
        compile_mode: CompileMode = "opaque",
    ) -> None:
        # Plain Python numbers, whatever they were given as: what repr, pickle and compilers expect.
        p = None if p is None else number(p, "p")
        eps = None if eps is None else number(eps, "eps")
        weight_offset = number(weight_offset, "weight_offset")
        shape = checked_shape(normalized_shape)
        if not all(0 <= n < 1 << 63 for n in shape):
            raise ValueError(
                f"normalized_shape must hold sizes of a tensor, but got {normalized_shape}"
            )
        if weight_offset != 0 and not abs(1 - weight_offset) <= _largest(dtype):
            raise ValueError(
                "weight_offset must be finite, and 1 - weight_offset, at which the weight starts, "
                f"within its dtype, but got {weight_offset}"
            )
        if p is not None and not 0 < p <= 1:
            raise ValueError(f"p must be None or a number in (0, 1], but got {p}")
        if casting_mode not in ("torch", "llama"):
            raise ValueError(f'casting_mode must be "torch" or "llama", but got {casting_mode!r}')
        if compile_mode not in ("opaque", "fuse"):
            raise ValueError(f'compile_mode must be "opaque" or "fuse", but got {compile_mode!r}')
        if bias and not elementwise_affine:
            raise ValueError("bias=True needs elementwise_affine=True")
        if weight_offset != 0 and not elementwise_affine:
            raise ValueError(f"weight_offset={weight_offset} needs elementwise_affine=True")
        if group_size is not None:
            group_size = checked_group_size(group_size, math.prod(shape))
        self.group_size = group_size
        self.p = p
        self.weight_offset = weight_offset  # read by reset_parameters, which the base class calls
        self.casting_mode: CastingMode = casting_mode
        self.compile_mode: CompileMode = compile_mode
        super().__init__(shape, eps, elementwise_affine, device=device, dtype=dtype)
        if bias:
            self.bias = nn.Parameter(torch.zeros_like(self.weight))
        else:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Scale 1 and bias 0, as when new."""
        if self.elementwise_affine:
            nn.init.constant_(self.weight, 1 - self.weight_offset)
        bias = getattr(self, "bias", None)  # the base class calls this before there is one
        if bias is not None:
            nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor) and x.is_nested:
            return of_each_sequence(self.forward, x, len(self.normalized_shape))
        fuse = self.compile_mode == "fuse" and torch.compiler.is_compiling()
        norm = functional.composite_rms_norm if fuse else functional.rms_norm
        return norm(
            x,
            self.normalized_shape,
            self.weight,
            self.eps,
            bias=self.bias,
            group_size=self.group_size,
            p=self.p,
            weight_offset=self.weight_offset,
            casting_mode=self.casting_mode,
        )

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles instead: a stand-in that shares the parameters.

        A class derived from one of this package has none, and has to script by itself.
        """
        stand_in = STAND_INS.get(type(self))
        if stand_in is None:
            return self
        twin = copy.copy(self)
        twin.__class__ = stand_in
        return twin

    def extra_repr(self) -> str:
        """What torch.nn.RMSNorm prints, and after it what differs from its behaviour."""
        text = super().extra_repr()
        if self.bias is not None:
            text += ", bias=True"
        if self.group_size is not None:
            text += f", group_size={self.group_size}"
        if self.p is not None:
            text += f", p={self.p}"
        if self.weight_offset != 0:
            text += f", weight_offset={self.weight_offset}"
        if self.casting_mode != "torch":
            text += f", casting_mode={self.casting_mode!r}"
        if self.compile_mode != "opaque":
            text += f", compile_mode={self.compile_mode!r}"
        return text


call_in_encoder_layers(RMSNorm)


class PRMSNorm(RMSNorm):
    """pRMSNorm: RMSNorm whose mean square is estimated from the first k inputs.

    k is the smallest integer with ``k / N >= p``. Section 4 of the paper, which uses p = 6.25 %.
    The paper's remark holds: with few elements the estimate is noisy and gradients grow. Arguments
    as :class:`RMSNorm`, with ``p`` second.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        p: float = 0.0625,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = False,
        group_size: int | None = None,
        weight_offset: float = 0.0,
        casting_mode: CastingMode = "torch",
        compile_mode: CompileMode = "opaque",
    ) -> None:
        super().__init__(
            normalized_shape,
            eps,
            elementwise_affine,
            device,
            dtype,
            bias=bias,
            group_size=group_size,
            p=p,
            weight_offset=weight_offset,
            casting_mode=casting_mode,
            compile_mode=compile_mode,
        )


class AddRMSNorm(RMSNorm):
    """The pre-norm residual add and the norm after it, in one pass. Arguments as RMSNorm."""

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """``(y, s)`` with ``s = input + residual``, the next residual, and ``y`` its norm.

        Shapes: all ``[*, *normalized_shape]``; ``residual`` in the dtype of ``input`` or a wider
        one, which then is that of ``s``.
        """
        fuse = self.compile_mode == "fuse" and torch.compiler.is_compiling()
        # A plain sum would promote and broadcast: what the operator refuses goes to the operator.
        fuse = fuse and residual.shape == input.shape
        if fuse and torch.promote_types(input.dtype, residual.dtype) == residual.dtype:
            s = (input + residual).contiguous()
            out = input.dtype
            if self.casting_mode == "llama" and self.weight is not None:
                out = torch.promote_types(out, self.weight.dtype)
            return super().forward(s).to(out), s
        return functional.add_rms_norm(
            input,
            residual,
            self.normalized_shape,
            self.weight,
            self.eps,
            bias=self.bias,
            group_size=self.group_size,
            p=self.p,
            weight_offset=self.weight_offset,
            casting_mode=self.casting_mode,
        )


class RMSNormGated(RMSNorm):
    """A norm and the gate beside it, ``norm(x) * act(gate)`` or ``norm(x * act(gate))``, fused.

    The norm of Mamba 2, Qwen3-Next, FalconH1 and others; as mamba_ssm's RMSNormGated.

    Args:
        activation: ``"silu"`` or ``"sigmoid"``.
        norm_before_gate: whether the norm comes first.
        Others: see :class:`RMSNorm`. For the roundings of ``casting_mode`` and which model has
            which, see :func:`fused_rmsnorm.functional.rms_norm_gated`.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = False,
        activation: Activation = "silu",
        norm_before_gate: bool = True,
        group_size: int | None = None,
        p: float | None = None,
        weight_offset: float = 0.0,
        casting_mode: CastingMode = "torch",
        compile_mode: CompileMode = "opaque",
    ) -> None:
        super().__init__(
            normalized_shape,
            eps,
            elementwise_affine,
            device,
            dtype,
            bias=bias,
            group_size=group_size,
            p=p,
            weight_offset=weight_offset,
            casting_mode=casting_mode,
            compile_mode=compile_mode,
        )
        if activation not in ("silu", "sigmoid"):
            raise ValueError(f'activation must be "silu" or "sigmoid", but got {activation!r}')
        self.activation: Activation = activation
        self.norm_before_gate = bool(norm_before_gate)

    def forward(self, input: Tensor, gate: Tensor | None = None) -> Tensor:
        """Shapes: both ``[*, *normalized_shape]``. Without a gate the plain norm."""
        if gate is None:
            return super().forward(input)
        fuse = self.compile_mode == "fuse" and torch.compiler.is_compiling()
        norm = functional.composite_rms_norm_gated if fuse else functional.rms_norm_gated
        return norm(
            input,
            gate,
            self.normalized_shape,
            self.weight,
            self.eps,
            bias=self.bias,
            activation=self.activation,
            norm_before_gate=self.norm_before_gate,
            group_size=self.group_size,
            p=self.p,
            weight_offset=self.weight_offset,
            casting_mode=self.casting_mode,
        )

    def extra_repr(self) -> str:
        """As RMSNorm, and after it activation and order."""
        text = super().extra_repr() + f", activation={self.activation!r}"
        return text if self.norm_before_gate else text + ", norm_before_gate=False"
