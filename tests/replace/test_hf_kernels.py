"""fused_rmsnorm.hf_kernels with Hugging Face's kernels library: kernelize runs our layer, in eager
mode and compiled, forward and backward, with the numbers of the model that is kernelized."""

import copy
import importlib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fused_calls import Calls, profiled
from reference import same_bits
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("kernels", reason="the kernels package is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import kernels
import transformers
from kernels import Mode

from fused_rmsnorm import hf_kernels, replace_rms_norm_

MODES = [
    training | compiled
    for training, compiled in itertools.product(
        (Mode.TRAINING, Mode.INFERENCE), (Mode.TORCH_COMPILE, Mode(0))
    )
]
TRAINED = Mode.TRAINING | Mode.TORCH_COMPILE
# Llama's way of rounding, OLMo 2's and, under another name, Gemma's.
CLASSES = {
    "RMSNorm": [("llama", "LlamaRMSNorm"), ("qwen3", "Qwen3RMSNorm"), ("olmo2", "Olmo2RMSNorm")],
    "RMSNormZeroCentered": [("qwen3_5", "Qwen3_5RMSNorm"), ("gemma3", "Gemma3RMSNorm")],
}
N = 64


def class_of(family: str, name: str) -> type[nn.Module]:
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)


@pytest.fixture(autouse=True)
def _marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers marks its norms where it supports the installed version of kernels."""
    for name, classes in CLASSES.items():
        for cls in itertools.starmap(class_of, classes):
            monkeypatch.setattr(cls, "kernel_layer_name", name, raising=False)
    monkeypatch.setattr(hf_kernels, "_settings_of_class", {})


@pytest.fixture
def local(tmp_path: Path) -> dict:
    """A mapping to a repository in a folder, as people test what they are about to publish."""
    folder = hf_kernels.write_local_repository(tmp_path)
    return {
        name: {"cpu": {TRAINED: kernels.LocalLayerRepository(folder, layer_name=name)}}
        for name in CLASSES
    }


def kernelize(model: nn.Module, mode: Mode = TRAINED, mapping: dict | None = None) -> nn.Module:
    with kernels.use_kernel_mapping(mapping or hf_kernels.mapping(), inherit_mapping=False):
        return kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)


def make_model(family: str = "Llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


NORMS = {"Llama": 2 * 2 + 1, "Olmo2": 2 * 4 + 1}
TOKENS = torch.arange(24).view(2, 12)


def logits_and_gradients(model: nn.Module, run=None) -> list[Tensor]:
    logits = (model if run is None else run)(input_ids=TOKENS, use_cache=False).logits
    return [
        logits.detach(),
        *torch.autograd.grad(logits.float().square().sum(), model.parameters()),
    ]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert same_bits(a, e), f"result {i}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", NORMS)
def test_a_kernelized_model_is_the_swapped_one(family: str, dtype: torch.dtype, local: dict):
    """To the bit, forward and backward; and the original but for the order of sums."""
    original = make_model(family, dtype)
    swapped = copy.deepcopy(original)
    assert len(replace_rms_norm_(swapped)) == NORMS[family]
    expected = logits_and_gradients(swapped)
    for mapping in (hf_kernels.mapping(), local):
        model = kernelize(copy.deepcopy(original), mapping=mapping)
        with Calls() as calls:
            got = logits_and_gradients(model)
        assert calls.fused() == {"rms_norm_fwd": NORMS[family], "rms_norm_bwd": NORMS[family]}
        assert_same_bits(got, expected)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for a, e in zip(got, logits_and_gradients(original), strict=True):
        assert (a - e).float().norm() <= tolerance * e.float().norm()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str):
    """As one graph, with our operator in it. aot_eager: the bits of eager mode, in whatever the
    original model has them too (on some processors its matrix products do not)."""
    torch.compiler.reset()
    model = kernelize(make_model())
    expected = logits_and_gradients(model)
    hf_kernels._settings_of_class.clear()  # asked for while compiling
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    got = logits_and_gradients(model, compiled)
    assert hf_kernels._settings_of_class == {class_of("llama", "LlamaRMSNorm"): (0.0, "llama")}
    ran = profiled(lambda: logits_and_gradients(model, compiled))
    assert ran["fused_rmsnorm::rms_norm_fwd"] == ran["fused_rmsnorm::rms_norm_bwd"] == 5
    if backend == "aot_eager":
        original = make_model()
        plain = logits_and_gradients(original)
        alike = map(
            same_bits,
            logits_and_gradients(original, torch.compile(original, backend=backend)),
            plain,
        )
        kept = [i for i, same in enumerate(alike) if same]
        assert 0 in kept
        assert_same_bits([got[i] for i in kept], [expected[i] for i in kept])
    for a, e in zip(got, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_one_layer_serves_every_mode(mode: Mode, local: dict):
    """``use_fallback=False`` raises where the layer does not declare what the mode needs."""
    model = kernelize(make_model(), mode, local)
    with Calls() as calls, torch.set_grad_enabled(Mode.TRAINING in mode):
        model(input_ids=TOKENS)
    assert calls.fused() == {"rms_norm_fwd": 5}


NORM_CLASSES = [class_of(*where) for classes in CLASSES.values() for where in classes]


@pytest.mark.parametrize("types", [("bfloat16", "bfloat16"), ("bfloat16", "float32")], ids=str)
@pytest.mark.parametrize("cls", NORM_CLASSES)
def test_each_class_keeps_its_rounding(cls: type[nn.Module], types: tuple[str, str]):
    """Bit for bit where the sum of squares is exact in any order; another rounding changes a fifth
    of the numbers."""
    x_type, w_type = (getattr(torch, t) for t in types)
    random = torch.Generator().manual_seed(0)
    norm = cls(N).to(w_type)
    nn.init.uniform_(norm.weight, 0.5, 1.5, generator=random)
    x = torch.randint(-8, 9, (256, N), generator=random).to(x_type)
    want = norm(x)
    model = kernelize(nn.ModuleDict({"norm": norm}))
    with Calls() as calls:
        got = model["norm"](x)
    assert calls.fused() == {"rms_norm_fwd": 1}
    assert got.dtype == want.dtype
    assert torch.equal(got, want), (got != want).float().mean()


class EpsOutside(nn.Module):
    """Marked, but of another arithmetic."""

    kernel_layer_name = "RMSNorm"

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(N)), 1e-2

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight * hidden_states / (hidden_states.square().mean(-1, True).sqrt() + 1e-2)


def test_what_we_do_not_compute_goes_on_by_itself():
    norm, x = EpsOutside(), torch.randn(5, N)
    want = norm(x)
    model = kernelize(nn.ModuleDict({"norm": norm}))
    with Calls() as calls:
        assert same_bits(model["norm"](x), want)
    assert calls.fused() == {}


@pytest.mark.parametrize("first", ["fake", "vmap", "meta", "autocast", "inference"])
def test_the_first_call_may_be_anywhere(first: str):
    """What a class computes is found out in the first call, whatever modes that is made under."""
    cls = class_of("llama", "LlamaRMSNorm")
    norm, x = cls(N), torch.randn(3, 5, N)
    want = norm(x)
    model = kernelize(nn.ModuleDict({"norm": norm}))["norm"]
    if first == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model(mode.from_tensor(x))
    elif first == "vmap":
        torch.vmap(model)(x)
    elif first == "meta":
        with torch.device("meta"):
            model(x)
    elif first == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
    else:
        with torch.inference_mode():
            model(x)
    assert hf_kernels._settings_of_class == {cls: (0.0, "llama")}
    torch.testing.assert_close(model(x), want)


def test_nothing_of_it_is_imported_unasked():
    code = (
        "import sys, fused_rmsnorm\n"
        "assert 'fused_rmsnorm.hf_kernels' not in sys.modules\n"
        "import fused_rmsnorm.hf_kernels\n"
        "assert not {'kernels', 'transformers', 'huggingface_hub'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
