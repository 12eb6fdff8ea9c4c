"""What is done to a model after a swap: its weights are made anew, eps is changed, it is scripted.
The rule is docs/swapping.md."""

import pytest
import torch
from plain_norm import N, PlainNorm
from torch import nn

from fused_rmsnorm import replace_layer_norm_, replace_rms_norm_


class OffsetRMSNorm(nn.Module):
    """Gemma's: the scale is 1 + weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(N)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        r = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (x.float() * r * (1 + self.weight.float())).to(x.dtype)


def initialise(module: nn.Module) -> None:
    """As transformers: by the class's name, and then by the class that the family has."""
    if "RMSNorm" in type(module).__name__:
        nn.init.ones_(module.weight)
    if isinstance(module, OffsetRMSNorm):
        nn.init.zeros_(module.weight)


def model() -> nn.Sequential:
    return nn.Sequential(OffsetRMSNorm(), PlainNorm())


@pytest.mark.parametrize("first", [True, False])
def test_weights_that_are_initialised_before_or_after(first: bool) -> None:
    """Before: nothing else is to be done. After: by the norms' own reset_parameters."""
    made = model().apply(initialise) if first else model()
    report = replace_rms_norm_(made)
    assert list(report) == ["0", "1"]
    if not first:
        made.apply(initialise)
        assert made[0].weight[0] == 1  # a scale of 2: what the documentation warns of
        for norm in report.values():
            norm.reset_parameters()
    assert torch.equal(made[0].weight, torch.zeros(N))
    x = torch.randn(3, N)
    torch.testing.assert_close(made[0](x), OffsetRMSNorm()(x))


def test_weights_that_are_initialised_after_meta() -> None:
    with torch.device("meta"):
        made = model()
    report = replace_rms_norm_(made)
    made.to_empty(device="cpu").apply(initialise)
    for norm in report.values():
        norm.reset_parameters()
    assert torch.equal(made[0].weight, torch.zeros(N))
    assert torch.equal(made[1].weight, torch.ones(N))


@pytest.mark.parametrize("name", ["eps", "variance_epsilon", "epsilon", "norm_eps"])
def test_eps_by_the_name_that_the_norm_had(name: str) -> None:
    class NamedNorm(PlainNorm):
        def __init__(self) -> None:
            super().__init__()
            eps = self.__dict__.pop("eps")
            setattr(self, name, eps)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            r = torch.rsqrt(torch.mean(x.float() ** 2, -1, keepdim=True) + getattr(self, name))
            return self.weight * (x.float() * r).to(x.dtype)

    old = NamedNorm()
    (new,) = replace_rms_norm_(nn.Sequential(old)).values()
    assert getattr(new, name) == new.eps == 1e-5
    x = torch.randn(3, N)
    for norm in (old, new):
        setattr(norm, name, 3.0)
    torch.testing.assert_close(new(x), old(x))
    assert "eps=3.0" in repr(new)


class T5Norm(PlainNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        half = self.weight.dtype in (torch.float16, torch.bfloat16)
        return self.weight * (h.to(self.weight.dtype) if half else h)


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", [PlainNorm, T5Norm, OffsetRMSNorm])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_swapped_can_be_scripted(kind, dtype: torch.dtype) -> None:
    old = kind().to(dtype)
    made = nn.Sequential(old)
    assert list(replace_rms_norm_(made)) == ["0"]
    scripted = torch.jit.script(made)
    for of_input in DTYPES:
        x = torch.randn(3, 5, N).to(of_input)
        got, want = scripted(x), made(x)
        assert got.dtype == want.dtype == old(x).dtype
        assert torch.equal(got, want)


def test_weight_decay_of_the_trainer_of_transformers() -> None:
    """It spares LayerNorm by its class, and others by their name in the model."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    decayed = transformers.Trainer.get_decay_parameter_names
    made = nn.ModuleDict({"ln_1": nn.LayerNorm(N), "linear": nn.Linear(N, N)})
    assert decayed(None, made) == ["linear.weight"]
    report = replace_layer_norm_(made)
    names = decayed(None, made)
    assert set(names) == {"ln_1.weight", "linear.weight"}
    assert [n for n in names if n.rpartition(".")[0] not in report] == ["linear.weight"]
