"""Norms that are Llama's but for one line, which shows for some inputs or in some mode alone."""

import contextlib
import math

import pytest
import torch
from plain_norm import PlainNorm
from torch import nn

from fused_rmsnorm import RMSNormGated, replace_rms_norm_

N = 64


class Disguised(PlainNorm):
    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__(N, eps)

    def __init_subclass__(cls) -> None:
        cls.__name__ += "Norm"  # what is not named one is not looked at

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        return PlainNorm.forward(self, x)


class ScaledForLongSequences(Disguised):
    def forward(self, x):
        length = x.shape[-2] if x.dim() > 1 else 1
        return self.plain(x) * max(1.0, math.log(length) / math.log(2048))


class ScaledForManyRows(Disguised):
    def forward(self, x):
        return self.plain(x) * (1.0 if x.numel() // N < 4096 else 0.5)


class ScaledByATensor(Disguised):
    def forward(self, x):
        return self.plain(x) * torch.tensor(1.0 if x.numel() // N < 4096 else 0.5)


class EpsOfLargeInputs(Disguised):
    def forward(self, x):
        eps = self.eps if x.numel() < 10**6 else 1e-2
        a = x.float()
        return self.weight * (a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class RoundsForManyRows(Disguised):
    def forward(self, x):
        a = x.to(torch.float16 if x.numel() // N >= 4096 else torch.float64).float()
        return self.weight * (a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + self.eps)).to(
            x.dtype
        )


class ScaledInEvaluationForManyRows(Disguised):
    def forward(self, x):
        return self.plain(x) * (0.5 if not self.training and x.numel() // N > 10**6 else 1.0)


class OtherParameterForManyRows(Disguised):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.rand(N))

    def forward(self, x):
        w, b = self.weight, self.bias
        w, b = (w, b) if x.numel() // N < 4096 else (b, w)
        a = x.float()
        a = a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + self.eps)
        return (w.float() * a + b.float()).to(x.dtype)


class KeepsTheTail(Disguised):
    def forward(self, x):
        y = self.plain(x)
        if x.shape[1] > 2048:
            y = y.clone()
            y[:, 2048:] = x[:, 2048:]
        return y


class KeepsTheTailWithoutAsking(Disguised):
    def forward(self, x):
        y = self.plain(x).clone()
        y[..., 2048:, :] = x[..., 2048:, :]
        return y


class CopiesLongSequences(Disguised):
    def forward(self, x):
        y = self.plain(x)
        return y.copy_(x) if x.dim() == 3 and x.shape[1] > 2048 else y


class KeepsTheFirstColumn(Disguised):
    def forward(self, x):
        y = self.plain(x).clone()
        y[..., :1] = x[..., :1]
        return y


class LargeOutputsGrow(Disguised):
    """Two numbers in ten thousand of a normal distribution, but many in a model."""

    def forward(self, x):
        y = self.plain(x)
        return y + (y / 6) ** 41


class LargeOutputsGrowInBfloat16(Disguised):
    def forward(self, x):
        y = self.plain(x)
        return y + (y.float() / 6).pow(41).to(x.dtype) if x.dtype == torch.bfloat16 else y


class ToTheTypeOfAutocast(Disguised):
    def forward(self, x):
        on = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if on else x.dtype
        a = x.float()
        a = a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * a.to(x.dtype)).to(dtype)


class ScaledUnderAutocastOfCuda(Disguised):
    def forward(self, x):
        return self.plain(x) * (0.5 if torch.is_autocast_enabled("cuda") else 1.0)


class RoundsUnderAutocastForManyRows(Disguised):
    def forward(self, x):
        if torch.is_autocast_enabled("cpu") and x.numel() // N > 10**5:
            return self.plain(x.to(torch.float16)).to(x.dtype)
        return self.plain(x)


class ScaledInInference(Disguised):
    def forward(self, x):
        return self.plain(x) * (0.5 if torch.is_inference_mode_enabled() else 1.0)


class EpsOutside(Disguised):
    def forward(self, x):
        a = x.float()
        rms = a.pow(2).mean(-1, keepdim=True).sqrt() + self.eps
        return self.weight * (a / rms).to(x.dtype)


class EpsIgnored(Disguised):
    def forward(self, x):
        a = x.float()
        return self.weight * (a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True))).to(x.dtype)


class MagnitudeOfTheWeight(Disguised):
    def forward(self, x):
        a = x.float()
        a = a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.square().sqrt() * a.to(x.dtype)


class ScaledIfNotContiguous(Disguised):
    def forward(self, x):
        return self.plain(x) * (1.0 if x.is_contiguous() else 0.5)


class ClampsFloat16(Disguised):
    def forward(self, x):
        y = self.plain(x)
        return y.clamp(-6e4, 6e4) if x.dtype == torch.float16 else y


class ScaledForManyRowsOfFloat16(Disguised):
    def forward(self, x):
        many = x.dtype == torch.float16 and x.numel() // N > 4096
        return self.plain(x) * (0.5 if many else 1.0)


class ScaledForManyRowsOfBfloat16(Disguised):
    def forward(self, x):
        many = x.dtype == torch.bfloat16 and x.numel() // N > 4096
        return self.plain(x) * (0.5 if many else 1.0)


class PerHead(Disguised):
    def forward(self, x):
        return self.plain(x.unflatten(-1, (-1, N))).flatten(-2)


DEPENDS = "what it runs depends on the shape of its input or on its mode"
NUMBERS = "its numbers or gradients are those of no setting of RMSNorm"
SLICE = "it runs slice, which is no part of a norm"
KINDS = {
    ScaledForLongSequences: DEPENDS,
    ScaledForManyRows: DEPENDS,
    ScaledByATensor: "it reads a tensor that is neither given nor computed, in mul",
    EpsOfLargeInputs: DEPENDS,
    RoundsForManyRows: DEPENDS,
    ScaledInEvaluationForManyRows: DEPENDS,
    OtherParameterForManyRows: DEPENDS,
    KeepsTheTail: SLICE,
    KeepsTheTailWithoutAsking: SLICE,
    CopiesLongSequences: DEPENDS,
    KeepsTheFirstColumn: SLICE,
    LargeOutputsGrow: NUMBERS,
    LargeOutputsGrowInBfloat16: NUMBERS,
    ToTheTypeOfAutocast: DEPENDS,
    ScaledUnderAutocastOfCuda: DEPENDS,
    RoundsUnderAutocastForManyRows: DEPENDS,
    ScaledInInference: DEPENDS,
    MagnitudeOfTheWeight: NUMBERS,
    ScaledIfNotContiguous: DEPENDS,
    ClampsFloat16: "it runs clamp, which is no part of a norm",
    ScaledForManyRowsOfFloat16: DEPENDS,
    ScaledForManyRowsOfBfloat16: DEPENDS,
    PerHead: f"it takes rows of {2 * N} numbers, too, with a weight of {N}",
}


def looked_at(norm: nn.Module):
    return replace_rms_norm_(nn.Sequential(norm))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_differs_somewhere_stays(kind) -> None:
    assert looked_at(kind()).left == {"0": KINDS[kind]}


@pytest.mark.parametrize("kind", [EpsOutside, EpsIgnored])
@pytest.mark.parametrize("eps", [1e-6, 1e-12, 1e-15, 1e-20])
def test_a_small_eps_is_told_from_none(kind, eps: float) -> None:
    assert looked_at(kind(eps)).left == {"0": NUMBERS}


@pytest.mark.parametrize("eps", [1e-2, 1e-6, 1e-12, 1e-20, 0.0])
def test_a_norm_with_any_eps_is_swapped(eps: float) -> None:
    (new,) = looked_at(PlainNorm(N, eps)).values()
    assert new.eps == eps


def divides(x, w, eps):
    a = x.float()
    return w * (a / torch.sqrt(a.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def counts_dimensions_from_the_first(x, w, eps):
    a = x.float()
    return w * (a * torch.rsqrt(a.pow(2).mean(x.dim() - 1, keepdim=True) + eps)).to(x.dtype)


def in_place(x, w, eps):
    a = x.float()
    return (a * a.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()).to(x.dtype).mul(w)


def of_rows(x, w, eps):
    a = x.reshape(-1, x.shape[-1]).to(torch.float32)
    a = a * torch.rsqrt((a * a).sum(1, keepdim=True) / N + eps)
    return (w.view(1, -1).expand_as(a) * a.type_as(x)).view(x.shape)


def by_the_norm(x, w, eps):
    a = x.float()
    r = (a.norm(dim=-1, keepdim=True) ** 2 / N + eps).reciprocal().sqrt()
    return w[None, :] * torch.mul(a, r).type_as(x) if x.dim() > 1 else w * (a * r).type_as(x)


def of_torch(x, w, eps):
    return w * nn.functional.rms_norm(x.float(), (N,), None, eps).to(x.dtype)


WRITTEN = [divides, counts_dimensions_from_the_first, in_place, of_rows, by_the_norm, of_torch]


@pytest.mark.parametrize("write", WRITTEN, ids=lambda write: write.__name__)
def test_how_a_norm_is_written_is_no_matter(write) -> None:
    class WrittenNorm(PlainNorm):
        def forward(self, x):
            return write(x, self.weight, self.eps)

    (new,) = looked_at(WrittenNorm(N, 1e-6)).values()
    assert (new.eps, new.casting_mode) == (1e-6, "llama")


@contextlib.contextmanager
def autocast_of_cuda():
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", before)


@pytest.mark.parametrize(
    "mode", [lambda: torch.autocast("cpu"), autocast_of_cuda, torch.inference_mode, torch.no_grad]
)
def test_the_mode_of_the_caller_is_no_matter_and_kept(mode) -> None:
    asked = (
        *(torch.is_grad_enabled, torch.is_inference_mode_enabled),
        *(lambda: torch.is_autocast_enabled("cpu"), lambda: torch.is_autocast_enabled("cuda")),
    )
    with mode():
        before = [ask() for ask in asked]
        assert list(looked_at(PlainNorm())) == ["0"]
        assert "0" in looked_at(ScaledInInference()).left
        assert [ask() for ask in asked] == before


class NeedsItsGate(Disguised):
    """As Kimi Linear's: a default for a gate that it cannot do without."""

    def forward(self, x, gate=None):
        y = self.plain(x).float()
        return (y * torch.sigmoid(gate.float())).to(x.dtype)


class ReducesWithoutAGate(Disguised):
    """Raises without a gate as well, but not before it has done something else."""

    def forward(self, x, gate=None):
        if gate is None:
            x = x.cumsum(-1)
        return (self.plain(x).float() * torch.sigmoid(gate.float())).to(x.dtype)


def test_a_gate_that_is_needed_in_spite_of_its_default() -> None:
    norm = NeedsItsGate()
    (new,) = looked_at(norm).values()
    assert isinstance(new, RMSNormGated)
    assert (new.activation, new.norm_before_gate) == ("sigmoid", True)
    x, gate = torch.randn(2, 5, N), torch.randn(2, 5, N)
    torch.testing.assert_close(new(x, gate), norm(x, gate))
    why = looked_at(ReducesWithoutAGate()).left["0"]
    assert why == "it runs cumsum, which is no part of a norm"


def test_global_hooks_do_not_see_that_a_norm_is_looked_at() -> None:
    seen: list[nn.Module] = []
    before = nn.modules.module.register_module_forward_pre_hook(lambda m, x: seen.append(m))
    after = nn.modules.module.register_module_forward_hook(lambda m, x, y: seen.append(m))
    try:
        assert list(looked_at(PlainNorm())) == ["0"]
    finally:
        before.remove(), after.remove()
    assert seen == []
