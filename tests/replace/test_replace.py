"""replace_rms_norm_ and replace_layer_norm_: what is recognised, left alone and kept."""

import copy
import importlib

import pytest
import torch
from torch import nn

from fused_rmsnorm import RMSNorm, RMSNormGated, replace_layer_norm_, replace_rms_norm_

N = 96


def rms(a: torch.Tensor, eps: float) -> torch.Tensor:
    return a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + eps)


def llama(x, w, eps):
    return w * rms(x.float(), eps).to(x.dtype)


def olmo2(x, w, eps):
    return (w * rms(x.float(), eps)).to(x.dtype)


def gemma(x, w, eps):
    return (rms(x.float(), eps) * (1 + w.float())).to(x.dtype)


def t5(x, w, eps):
    h = rms(x.float(), eps)
    return w * (h.to(w.dtype) if w.dtype in (torch.float16, torch.bfloat16) else h)


def gemma_with_offset_rounded(x, w, eps):
    return (rms(x.float(), eps) * (1 + w)).to(x.dtype)


def eps_outside(x, w, eps):
    a = x.float()
    return w * (a / (a.pow(2).mean(-1, keepdim=True).sqrt() + eps)).to(x.dtype)


def centred(x, w, eps):
    a = x.float()
    return w * rms(a - a.mean(-1, keepdim=True), eps).to(x.dtype)


def groups(x, w, eps):
    return w * rms(x.float().unflatten(-1, (4, -1)), eps).flatten(-2).to(x.dtype)


class Norm(nn.Module):
    """A norm as models write it; ``rule`` is what the families differ in."""

    def __init__(self, rule, eps: float = 1e-5) -> None:
        super().__init__()
        self.rule, self.variance_epsilon = rule, eps
        self.weight = nn.Parameter(torch.rand(N) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rule(x, self.weight, self.variance_epsilon)


class GatedNorm(Norm):
    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x if gate is None else x * gate)


class SiluGatedNorm(Norm):
    """As Mamba 2's and Qwen3-Next's; ``wrong``: in some way unlike any setting."""

    def __init__(self, first: bool, wrong: str = "") -> None:
        super().__init__(llama)
        self.first, self.wrong = first, wrong

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        act = nn.functional.silu(gate.to(x.dtype if self.wrong == "rounded" else torch.float32))
        if self.wrong == "half":
            act = act * 0.5
        if self.wrong == "shape" and x.dim() == 3:
            act = act + 0
        if self.wrong == "no matrices" and x.dim() == 2:
            raise ValueError("not a matrix")
        if self.wrong == "one row" and x.dim() == 4 and x.numel() == N:
            raise ValueError("one row alone")
        if self.first:
            x32 = x.float() * act
            h = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
            return self.weight * h.to(x.dtype)
        return (super().forward(x) * act).to(x.dtype)


def rounded_alike(got: torch.Tensor, want: torch.Tensor) -> None:
    """Of norms that round at the same places; a sum in another order may turn a rounding."""
    # Two roundings to 16 bits in each, each within half of eps.
    rtol = 1e-5 if want.dtype == torch.float32 else 2 * torch.finfo(want.dtype).eps
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-6)
    assert want.dtype == torch.float32 or (got != want).float().mean() < 0.002


def model_of(*norms: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(N, N), *norms)


@pytest.mark.parametrize("rule", [llama, olmo2, gemma, t5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_numbers(rule, dtype: torch.dtype) -> None:
    model = model_of(Norm(rule), Norm(rule, eps=1e-3)).to(dtype)
    before = copy.deepcopy(model)
    swapped = replace_rms_norm_(model)
    assert list(swapped) == ["1", "2"]
    assert all(isinstance(m, RMSNorm) for m in swapped.values())
    x = torch.randn(64, N).to(dtype)
    for old, new in zip(list(before)[1:], list(model)[1:], strict=True):
        rounded_alike(new(x), old(x))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gated(first: bool, dtype: torch.dtype) -> None:
    model = model_of(SiluGatedNorm(first)).to(dtype)
    old = model[1]
    (new,) = replace_rms_norm_(model).values()
    assert isinstance(new, RMSNormGated)
    assert (new.norm_before_gate, new.casting_mode) == (not first, "llama")
    assert new.weight is old.weight
    x, z = torch.randn(64, N).to(dtype), torch.randn(64, N).to(dtype)
    rounded_alike(new(x, gate=z), old(x, z))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_falcon_h1(first: bool, dtype: torch.dtype) -> None:
    """Which refuses all inputs but those of rank 2 and 3, and is the norm for these."""
    module = pytest.importorskip("transformers.models.falcon_h1.modeling_falcon_h1")
    old = module.FalconH1RMSNormGated(N, 1e-5, n_groups=4, norm_before_gate=not first).to(dtype)
    (new,) = replace_rms_norm_(model_of(old)).values()
    assert isinstance(new, RMSNormGated)
    assert (new.norm_before_gate, new.group_size) == (not first, N // 4)
    for shape in ((64, N), (3, 7, N)):
        x, z = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        rounded_alike(new(x, z), old(x, z))
        rounded_alike(new(x), old(x))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        *(("half", "no setting"), ("rounded", "no setting"), ("shape", "depends on the shape")),
        *(("no matrices", "not a matrix"), ("one row", "for some inputs of rank 4")),
    ],
)
def test_other_gates_are_left_alone(first: bool, wrong: str, why: str) -> None:
    report = replace_rms_norm_(model_of(SiluGatedNorm(first, wrong)))
    assert report == {}
    assert why in report.left["1"]


@pytest.mark.parametrize("rule", [eps_outside, centred, groups, gemma_with_offset_rounded])
def test_other_arithmetic_is_left_alone(rule) -> None:
    model = model_of(Norm(rule))
    assert replace_rms_norm_(model) == {}
    assert type(model[1]) is Norm


def test_a_layer_norm_is_left_alone_by_its_name() -> None:
    report = replace_rms_norm_(model_of(nn.LayerNorm(N)))
    assert report.left == {"1": "a LayerNorm, which subtracts the mean"}


def test_what_has_more_than_arithmetic_is_left_alone() -> None:
    hooked = Norm(llama)
    hooked.register_forward_hook(lambda *_: None)
    assert replace_rms_norm_(model_of(GatedNorm(llama), hooked, nn.LayerNorm(N))) == {}


@pytest.mark.parametrize(
    "norm",
    [nn.RMSNorm(N), nn.RMSNorm(N, eps=1e-2), nn.RMSNorm(N, elementwise_affine=False)],
    ids=str,
)
def test_torch_module(norm: nn.RMSNorm) -> None:
    model = model_of(norm)
    state, x = copy.deepcopy(model.state_dict()), torch.randn(5, N)
    want = norm(x)
    (new,) = replace_rms_norm_(model).values()
    torch.testing.assert_close(new(x), want)
    assert repr(new) == repr(norm)
    model.load_state_dict(state)


def test_parameters_stay_the_same_objects() -> None:
    shared = Norm(llama)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Sequential(Norm(gemma))})
    model.eval()
    shared.weight.requires_grad_(False)
    before = dict(model.named_parameters(remove_duplicate=False))
    swapped = replace_rms_norm_(model)
    assert list(swapped) == ["a", "b", "c.0"]
    assert model["a"] is model["b"]
    assert not model["a"].training
    after = dict(model.named_parameters(remove_duplicate=False))
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert replace_rms_norm_(model) == {}  # nothing is left to do


def test_filter() -> None:
    model = model_of(Norm(llama), Norm(llama))
    swapped = replace_rms_norm_(model, lambda name, module: name == "2")
    assert list(swapped) == ["2"]
    assert type(model[1]) is Norm


def test_meta_device() -> None:
    with torch.device("meta"):
        model = model_of(Norm(gemma))
    (new,) = replace_rms_norm_(model).values()
    assert new.weight.is_meta
    assert new.weight_offset == 1


def test_the_model_itself() -> None:
    with pytest.raises(ValueError, match="model is itself a Norm"):
        replace_rms_norm_(Norm(llama))
    with pytest.raises(ValueError, match="model is itself a LayerNorm"):
        replace_layer_norm_(nn.LayerNorm(4))


@pytest.mark.parametrize("p", [None, 0.25])
def test_layer_norm(p: float | None) -> None:
    model = model_of(nn.LayerNorm(N, eps=1e-3), nn.LayerNorm(N, bias=False))
    before = dict(model.named_parameters())
    nn.init.normal_(model[1].weight)
    nn.init.normal_(model[1].bias)
    swapped = replace_layer_norm_(model, p)
    assert list(swapped) == ["1", "2"]
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    x = torch.randn(7, N)
    k = N if p is None else N // 4
    r = (x[:, :k].pow(2).mean(-1, keepdim=True) + 1e-3).rsqrt()
    torch.testing.assert_close(model[1](x), x * r * model[1].weight + model[1].bias)
    assert model[2].bias is None


@pytest.mark.parametrize("replace", [replace_rms_norm_, replace_layer_norm_])
@pytest.mark.parametrize("model", [None, "model", torch.ones(2), [nn.RMSNorm(N)]], ids=str)
def test_what_is_no_model(replace, model) -> None:
    """A list of modules has none to replace: refused, rather than a report of nothing."""
    kind = type(model).__name__
    with pytest.raises(TypeError, match=rf"^model must be a torch.nn.Module, but got {kind}$"):
        replace(model)
    with pytest.raises(TypeError, match=r"^filter_fn must be None or a function of \(name, mod"):
        replace(nn.Sequential(nn.RMSNorm(N)), filter_fn="norm")


def test_layer_norm_wrong_p() -> None:
    with pytest.raises(ValueError, match=r"p must be None or a number in \(0, 1\], but got 6.25"):
        replace_layer_norm_(nn.Sequential(nn.Linear(2, 2)), p=6.25)


FAMILIES = {
    "aimv2": "Aimv2RMSNorm",
    "deepseek_v3": "DeepseekV3RMSNorm",
    "flex_olmo": "FlexOlmoRMSNorm",
    "gemma": "GemmaRMSNorm",
    "gemma3": "Gemma3RMSNorm",
    "gpt_oss": "GptOssRMSNorm",
    "granite": "GraniteRMSNorm",
    "idefics": "IdeficsRMSNorm",
    "llama": "LlamaRMSNorm",
    "llama4": "Llama4TextRMSNorm",
    "longt5": "LongT5LayerNorm",
    "mamba2": "Mamba2RMSNorm",
    "mistral": "MistralRMSNorm",
    "mt5": "MT5LayerNorm",
    "olmo2": "Olmo2RMSNorm",
    "olmoe": "OlmoeRMSNorm",
    "phi3": "Phi3RMSNorm",
    "qwen2": "Qwen2RMSNorm",
    "qwen3": "Qwen3RMSNorm",
    "qwen3_5": "Qwen3_5RMSNorm",
    "t5": "T5LayerNorm",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers(family: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    norm = getattr(module, FAMILIES[family])(N)
    nn.init.normal_(norm.weight)
    model = model_of(norm).bfloat16()
    x = torch.randn(64, N, dtype=torch.bfloat16)
    want = norm(x)
    (new,) = replace_rms_norm_(model).values()
    assert (new(x) != want).float().mean() < 0.002


SMALL = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
WHOLE = {
    "Llama": (2 * 2 + 1, {}),
    "Gemma": (2 * 2 + 1, {}),
    "Gemma3": (2 * 6 + 1, {}),
    "Olmo2": (2 * 4 + 1, {}),
    "Qwen3": (2 * 4 + 1, {}),  # two of the stream, one each for q and k, and the last
    "Mamba2": (2 * 2 + 1, {}),  # of the stream, with a gate in each mixer, and the last
    "T5": (2 * (2 + 3) + 2, {}),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", WHOLE)
def test_transformers_model(family: str, training: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    count, left = WHOLE[family]
    if family == "Gemma3":
        config, kind = transformers.Gemma3TextConfig(**SMALL), "Gemma3ForCausalLM"
    elif family == "Mamba2":
        config = transformers.Mamba2Config(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8,
            state_size=8, n_groups=1, chunk_size=4,
        )  # fmt: skip
        kind = "Mamba2ForCausalLM"
    elif family == "T5":
        config = transformers.T5Config(
            vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0
        )
        kind = "T5ForConditionalGeneration"
    else:
        config, kind = getattr(transformers, f"{family}Config")(**SMALL), f"{family}ForCausalLM"
    model = getattr(transformers, kind)(config).train(training)
    tokens = torch.arange(12).view(2, 6)
    inputs = {"input_ids": tokens, **({"decoder_input_ids": tokens} if family == "T5" else {})}

    def run() -> list[torch.Tensor]:
        logits = model(**inputs).logits
        parameters = [p for p in model.parameters() if p.requires_grad]
        return [logits, *torch.autograd.grad(logits.square().mean(), parameters)]

    want = run()
    report = replace_rms_norm_(model)
    assert len(report) == count, report
    assert report.left.keys() == left.keys()
    assert all(left[name] in why for name, why in report.left.items())
    for got, one in zip(run(), want, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-3, atol=1e-5)
