"""What a swap asks for: evidence that a norm is an RMSNorm, and that it is nothing else beside."""

import copy
import random
import re

import pytest
import torch
from plain_norm import N, PlainNorm
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from fused_rmsnorm import RMSNorm, replace_layer_norm_, replace_rms_norm_


def left(norm: nn.Module, replace=replace_rms_norm_) -> str:
    """Why it stays; everything about it as before."""
    model = nn.Sequential(nn.Linear(N, N), norm)
    before = dict(norm.__dict__)
    report = replace(model)
    assert report == {}, report
    assert model[1] is norm
    assert {k: v for k, v in norm.__dict__.items() if k in before} == before
    return report.left["1"]


class Other(PlainNorm):
    """Its arithmetic is that of PlainNorm on the inputs that a hasty look would take."""

    def __init_subclass__(cls) -> None:
        cls.__name__ += "Norm"  # what is not named one is not looked at


class OfDimensionOne(Other):
    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class OfDimensionOneOfImages(Other):
    def forward(self, x):
        return OfDimensionOne.forward(self, x) if x.dim() == 4 else super().forward(x)


class NoisyInTraining(Other):
    def forward(self, x):
        return super().forward(x + 1e-9 * torch.randn_like(x) if self.training else x)


class FunctionalDropout(Other):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


class OnlyWithoutGradients(Other):
    def forward(self, x):
        return super().forward(x) if torch.is_grad_enabled() else super().forward(x) * 2


class ForShortSequences(Other):
    def forward(self, x):
        return super().forward(x[..., :64, :] if x.dim() > 2 and x.shape[-2] > 64 else x * 1)


class ForManyRows(Other):
    def forward(self, x):
        return super().forward(x if x.shape[0] < 512 else x * 2)


class Clamped(Other):
    def forward(self, x):
        return super().forward(x.clamp(-6e4, 6e4))


class BranchOnValues(Other):
    def forward(self, x):
        return super().forward(x * 0.5 if x.abs().max() > 1e4 else x)


class StatisticWithoutGradient(Other):
    def forward(self, x):
        a = x.float()
        r = torch.rsqrt(torch.mean(a.detach() ** 2, -1, keepdim=True) + self.eps)
        return self.weight * (a * r).to(x.dtype)


class FrozenByHand(Other):
    def forward(self, x):
        a = x.float()
        r = torch.rsqrt(torch.mean(a**2, -1, keepdim=True) + self.eps)
        return self.weight.detach() * (a * r).to(x.dtype) + 0 * self.weight


class WritesIntoItsInput(Other):
    def forward(self, x):
        y = super().forward(x)
        x.add_(1)
        return y


class CountsItsCalls(Other):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class KeepsItsInputs(Other):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list = []

    def forward(self, x):
        self.kept.append(x.dtype)
        return super().forward(x)


class ReturnsMore(Other):
    def forward(self, x):
        return super().forward(x), x


class WithGate(Other):
    def forward(self, x, gate=None):
        return super().forward(x)


class WithDefault(Other):
    def forward(self, x=None):
        return super().forward(x)


class WithAnyArguments(Other):
    def forward(self, *x):
        return super().forward(x[0])


class OwnCall(Other):
    def __call__(self, x):
        return super().__call__(x) * 2


class OwnStateDict(Other):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "gamma"] = self.weight


class OwnLoading(Other):
    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict[prefix + "weight"] = state_dict.pop(prefix + "gamma")
        super()._load_from_state_dict(state_dict, prefix, *args)


class ExtraState(Other):
    def get_extra_state(self):
        return self.eps

    def set_extra_state(self, state):
        self.eps = state


class OwnTraining(Other):
    def train(self, mode: bool = True):
        return super().train(False)


class AllKindsOfErrors(Other):
    def __init__(self, error: type[Exception], rank: int) -> None:
        super().__init__()
        self.error, self.rank = error, rank

    def forward(self, x):
        if x.dim() == self.rank and x.device.type == "cpu":
            raise self.error("not this one")
        return super().forward(x)


BY_RUNNING = {
    OfDimensionOne: "",
    OfDimensionOneOfImages: "depends on the shape|numbers|raises",
    NoisyInTraining: "it runs randn_like|it runs normal|it runs",
    FunctionalDropout: "it runs",
    OnlyWithoutGradients: "depends on the shape of its input or on its mode",
    ForShortSequences: "it runs slice",
    ForManyRows: "depends on the shape of its input or on its mode",
    Clamped: "it runs clamp, which is no part of a norm",
    BranchOnValues: "it runs abs|raises",
    StatisticWithoutGradient: "numbers or gradients",
    FrozenByHand: "numbers or gradients",
    WritesIntoItsInput: "it writes into its input",
    CountsItsCalls: "its forward changes its own attributes",
    KeepsItsInputs: "its forward changes its own attributes",
    ReturnsMore: "it does not return one tensor",
    WithGate: "running it raised|numbers or gradients",
    WithDefault: r"its forward takes \(x=None\) and not one input",
    WithAnyArguments: r"its forward takes \(\*x\) and not one input",
    OwnCall: "its class overrides __call__",
    OwnStateDict: "its class overrides _save_to_state_dict",
    OwnLoading: "its class overrides _load_from_state_dict",
    ExtraState: "its class overrides [gs]et_extra_state",
    OwnTraining: "its class overrides train",
}


@pytest.mark.parametrize("kind", BY_RUNNING, ids=lambda kind: kind.__name__)
def test_what_does_something_else_stays(kind) -> None:
    norm = kind()
    assert re.search(BY_RUNNING[kind], left(norm))
    if kind is KeepsItsInputs:
        assert norm.kept == []
    if kind is CountsItsCalls:
        assert norm.calls == 0


@pytest.mark.parametrize(
    "error", [IndexError, KeyError, AssertionError, ZeroDivisionError, OSError]
)
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_what_raises_stays(error: type[Exception], rank: int) -> None:
    model = nn.Sequential(AllKindsOfErrors(error, rank), PlainNorm())
    report = replace_rms_norm_(model)
    assert list(report) == ["1"]
    assert f"{error.__name__}: " in report.left["0"]
    assert "not this one" in report.left["0"]


def test_what_raises_in_its_backward_stays() -> None:
    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, dy):
            raise KeyError("no gradients")

    class NormForInference(PlainNorm):
        def forward(self, x):
            return super().forward(Refuses.apply(x))

    assert left(NormForInference()) == "running it raised KeyError: 'no gradients'"


def nothing(*_) -> None:
    """A hook."""


HOOKS = {
    "register_forward_hook": "forward hooks",
    "register_forward_pre_hook": "forward pre hooks",
    "register_full_backward_hook": "backward hooks",
    "register_full_backward_pre_hook": "backward pre hooks",
    "register_state_dict_post_hook": "state dict hooks",
    "register_state_dict_pre_hook": "state dict pre hooks",
    "register_load_state_dict_pre_hook": "load state dict pre hooks",
    "register_load_state_dict_post_hook": "load state dict post hooks",
}
BOTH = {
    replace_rms_norm_: (PlainNorm, lambda: nn.RMSNorm(N)),
    replace_layer_norm_: (lambda: nn.LayerNorm(N),),
}
CASES = [(replace, make) for replace, made in BOTH.items() for make in made]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(("replace", "make"), CASES)
def test_hooks_stay(replace, make, hook: str) -> None:
    norm = make()
    getattr(norm, hook)(nothing)
    assert left(norm, replace).startswith(f"it has {HOOKS[hook]}")


def test_removed_hooks_do_not_matter() -> None:
    norm = PlainNorm()
    norm.register_full_backward_hook(nothing).remove()
    norm.register_forward_pre_hook(nothing, with_kwargs=True).remove()
    assert list(replace_rms_norm_(nn.Sequential(norm))) == ["0"]


def with_buffer(norm):
    norm.register_buffer("scale", torch.ones(1))
    return "it has buffers: scale"


def with_module(norm):
    norm.drop_layer = nn.Dropout(0.1)
    return "it has modules of its own: drop_layer"


def with_parameter(norm):
    norm.gain = nn.Parameter(torch.ones(1))
    return "it has parameters beside weight and bias: gain"


def with_tensor(norm):
    norm.cache = torch.ones(1)
    return "it holds cache of type Tensor"


def with_object(norm):
    norm.quantiser = object()
    return "it holds quantiser of type object"


def with_forward(norm):
    norm.forward = norm.forward
    return "it has a forward of its own, in place of its class's"


def with_state_dict(norm):
    norm.state_dict = lambda *args, **kwargs: {}
    return "it has a state_dict of its own, in place of its class's"


def compiled_in_place(norm):
    norm.compile(backend="eager")
    return "it is compiled by itself: replace, then compile"


def parametrised(norm):
    parametrize.register_parametrization(norm, "weight", nn.Identity())


def weight_normed(norm):
    parametrizations.weight_norm(norm, dim=0)


def old_weight_normed(norm):
    torch.nn.utils.weight_norm(norm, dim=0)


def pruned(norm):
    prune.l1_unstructured(norm, "weight", 2)


def lazy(norm):
    norm.weight = nn.UninitializedParameter()
    return "its weight has type UninitializedParameter, not torch.nn.Parameter"


def of_a_subclass(norm):
    class Quantised(nn.Parameter):
        pass

    norm.weight = Quantised(torch.ones(N))
    return "its weight has type Quantised, not torch.nn.Parameter"


def without_elements(norm):
    norm.weight.data = torch.empty(0)
    return "its weight has no elements (one that is kept elsewhere, as a shard?)"


def of_integers(norm):
    norm.weight = nn.Parameter(torch.ones(N, dtype=torch.int8), requires_grad=False)
    return "its weight has layout torch.strided and dtype torch.int8"


CHANGES = [
    *(with_buffer, with_module, with_parameter, with_tensor, with_object, with_forward),
    *(with_state_dict, compiled_in_place, parametrised, weight_normed, old_weight_normed),
    *(pruned, lazy, of_a_subclass, without_elements, of_integers),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("replace", "make"), CASES)
def test_what_carries_something_stays(replace, make, change) -> None:
    norm = make()
    why = change(norm)
    got = left(norm, replace)
    assert why is None or got == why


class LayerNormOfDimensionOne(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize("kind", [LayerNormOfDimensionOne, type("My", (nn.LayerNorm,), {})])
def test_subclasses_of_layer_norm_stay(kind) -> None:
    why = "a subclass of torch.nn.LayerNorm: only that class itself is replaced"
    assert left(kind(N), replace_layer_norm_) == why


class RmsNormAct(nn.RMSNorm):
    """As in timm: a norm, dropout and an activation."""

    def __init__(self, drop_layer=None, act_layer=nn.Identity) -> None:
        super().__init__(N, 1e-6)
        self.drop = drop_layer(0.1) if drop_layer else nn.Identity()
        self.act = act_layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize("drop_layer", [None, nn.Dropout])
def test_norm_with_dropout_and_activation_stays(drop_layer) -> None:
    assert left(RmsNormAct(drop_layer)) == "it has modules of its own: drop, act"


def test_modules_that_are_none_of_its_business() -> None:
    class OddModule(nn.Module):
        def __getattr__(self, name):
            raise KeyError(name)

    class NormThatIsNone(nn.Module):
        """Named a norm, without anything that one has."""

    traced = torch.jit.trace(nn.Linear(N, N), torch.ones(1, N))
    scripted = torch.jit.script(nn.Sequential(nn.RMSNorm(N), nn.LayerNorm(N)))
    model = nn.ModuleDict(
        {
            "traced": traced,
            "scripted": scripted,
            "lazy": nn.LazyLinear(4),
            "lazy_norm": nn.LazyBatchNorm1d(),
            "odd": OddModule(),
            "none": NormThatIsNone(),
            "batch": nn.BatchNorm1d(N),
            "norm": PlainNorm(),
            "layer_norm": nn.LayerNorm(N),
        }
    )
    report = replace_rms_norm_(model)
    assert list(report) == ["norm"]
    assert set(report.left) == {
        *("scripted.0", "scripted.1", "lazy_norm", "none", "batch", "layer_norm")
    }
    assert report.left["scripted.0"] == "part of a ScriptModule, which is compiled already"
    assert list(replace_layer_norm_(model)) == ["layer_norm"]


def test_a_model_that_is_itself_a_norm_that_stays() -> None:
    norm = PlainNorm()
    with_buffer(norm)
    assert replace_rms_norm_(norm).left == {"": "it has buffers: scale"}
    assert "a subclass" in replace_layer_norm_(LayerNormOfDimensionOne(N)).left[""]


class HoldsOn(nn.Module):
    def __init__(self, refuse: bool) -> None:
        super().__init__()
        self.norm = PlainNorm()
        self.refuse = refuse

    def __setattr__(self, name, value):
        if name == "norm" and "norm" in self.__dict__.get("_modules", {}):
            if self.refuse:
                raise TypeError("fixed")
            return
        super().__setattr__(name, value)


@pytest.mark.parametrize("refuse", [True, False])
def test_a_parent_that_does_not_take_it(refuse: bool) -> None:
    model = HoldsOn(refuse)
    report = replace_rms_norm_(model)
    assert report == {}
    assert report.left == {"norm": "its HoldsOn does not take another module"}
    assert type(model.norm) is PlainNorm


def test_the_report() -> None:
    hooked = PlainNorm()
    hooked.register_forward_hook(nothing)
    model = nn.Sequential(PlainNorm(), hooked, nn.Linear(N, N), PlainNorm(), RMSNorm(N))
    report = replace_rms_norm_(model, lambda name, _: name != "3")
    assert isinstance(report, dict)
    assert report == {"0": model[0]}
    assert report.left == {"1": "it has forward hooks", "3": "filter_fn did not return True"}
    assert str(report) == (
        "1 norms swapped, 2 left alone\n"
        "  swapped 0: RMSNorm((8,), eps=1e-05, elementwise_affine=True, casting_mode='llama')\n"
        "  left    1: it has forward hooks\n"
        "  left    3: filter_fn did not return True"
    )


def test_nothing_of_the_caller_is_changed() -> None:
    """Random numbers, grad mode, default device and dtype; and no parameter has a new version."""
    numpy = pytest.importorskip("numpy")
    model = nn.Sequential(NormWithRandomNumbers(), PlainNorm())
    versions = [p._version for p in model.parameters()]
    torch.manual_seed(3), random.seed(3), numpy.random.seed(3)
    want = torch.rand(2), random.random(), numpy.random.rand()
    torch.manual_seed(3), random.seed(3), numpy.random.seed(3)
    with torch.inference_mode():
        assert list(replace_rms_norm_(model)) == ["1"]
        assert torch.is_inference_mode_enabled()
    assert torch.equal(want[0], torch.rand(2))
    assert want[1:] == (random.random(), numpy.random.rand())
    assert versions == [p._version for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())


class NormWithRandomNumbers(PlainNorm):
    def forward(self, x):
        import numpy

        if x.device.type == "cpu":
            torch.rand(3), random.random(), numpy.random.rand()
        return super().forward(x) * 1.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtype_and_device_of_the_caller(dtype) -> None:
    model = nn.Sequential(PlainNorm())
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            assert list(replace_rms_norm_(model)) == ["0"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert model[0].weight.device.type == "cpu"


def test_other_attributes_are_kept() -> None:
    norm = PlainNorm()
    norm.hidden_size, norm._is_hf_initialized = N, True
    (new,) = replace_rms_norm_(nn.Sequential(norm)).values()
    assert (new.hidden_size, new._is_hf_initialized) == (N, True)


def test_alike_norms_are_looked_at_once(monkeypatch) -> None:
    calls = []
    forward = PlainNorm.forward

    def counted(self, x):
        calls.append(self.eps)
        return forward(self, x)

    monkeypatch.setattr(PlainNorm, "forward", counted)
    model = nn.Sequential(*(PlainNorm(eps=eps) for eps in (1e-5, 1e-5, 1e-6, 1e-5)))
    report = replace_rms_norm_(model)
    assert [new.eps for new in report.values()] == [1e-5, 1e-5, 1e-6, 1e-5]
    assert calls.count(1e-5) == calls.count(1e-6)


@pytest.mark.parametrize("rule", [None, "gemma"])
def test_swapped_norm_has_the_same_gradients(rule) -> None:
    class GemmaNorm(PlainNorm):
        def forward(self, x):
            r = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
            return (x.float() * r * (1 + self.weight.float())).to(x.dtype)

    old = GemmaNorm() if rule else PlainNorm()
    model = nn.Sequential(copy.deepcopy(old))
    assert list(replace_rms_norm_(model)) == ["0"]
    x = torch.randn(3, 5, N)
    for norm in (old, model):
        input = x.clone().requires_grad_()
        norm(input).square().sum().backward()
        norm.dx = input.grad
    torch.testing.assert_close(model.dx, old.dx)
    torch.testing.assert_close(model[0].weight.grad, old.weight.grad)
