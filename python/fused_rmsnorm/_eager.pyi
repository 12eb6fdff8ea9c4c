from torch import Tensor

def rms_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    p: float | None,
    weight_offset: float,
    casting_mode: str,
    /,
) -> Tensor: ...
def composite_rms_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    p: float | None,
    weight_offset: float,
    casting_mode: str,
    /,
) -> Tensor: ...
def rms_norm_gated(
    input: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    norm_before_gate: bool,
    eps: float | None,
    p: float | None,
    weight_offset: float,
    casting_mode: str,
    /,
) -> Tensor: ...
def composite_rms_norm_gated(
    input: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    norm_before_gate: bool,
    eps: float | None,
    p: float | None,
    weight_offset: float,
    casting_mode: str,
    /,
) -> Tensor: ...
def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    p: float | None,
    weight_offset: float,
    casting_mode: str,
    /,
) -> tuple[Tensor, Tensor]: ...
def add_rms_norm_(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    p: float | None,
    weight_offset: float,
    casting_mode: str,
    /,
) -> None: ...

torch_version: str  # that it was built against

def number(value: object, name: str, /) -> float: ...
