"""The modules: what a user of torch.nn.RMSNorm and of transformers relies on."""

import copy
import importlib
import inspect
import pickle

import pytest
import torch
from cases import numbers
from hypothesis import given
from hypothesis import strategies as st
from reference import FLOATS, Options, arithmetic_type, assert_forward, same_bits
from torch import nn

from fused_rmsnorm import AddRMSNorm, PRMSNorm, RMSNorm
from fused_rmsnorm import functional as F

HALVES = (torch.float16, torch.bfloat16)
MODULES = [RMSNorm, PRMSNorm, AddRMSNorm]


def call(module, x):
    """y, also from AddRMSNorm (of x + 0, with the bits of x but for the sign of zero)."""
    return module(x, torch.zeros_like(x))[0] if isinstance(module, AddRMSNorm) else module(x)


@pytest.mark.parametrize("cls", MODULES)
def test_is_a_torch_rms_norm(cls):
    module = cls(8)
    assert isinstance(module, nn.RMSNorm)
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    assert list(module.state_dict()) == ["weight"]
    assert module.normalized_shape == (8,)
    assert module.eps is None
    assert module.elementwise_affine is True
    assert torch.equal(module.weight, torch.ones(8))
    assert module.weight.requires_grad


def test_positional_arguments_are_those_of_torch():
    args = ((4, 8), 1e-5, True, "cpu", torch.bfloat16)
    ours, native = RMSNorm(*args), nn.RMSNorm(*args)
    assert ours.eps == native.eps
    assert ours.weight.dtype == native.weight.dtype == torch.bfloat16
    assert ours.normalized_shape == native.normalized_shape
    assert RMSNorm(8, 1e-5, False).weight is None
    assert PRMSNorm(8).p == 0.0625
    assert PRMSNorm(8, 0.5).p == 0.5


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [8, [8], (4, 8), torch.Size([2, 4, 8])])
@pytest.mark.parametrize("affine", [True, False])
def test_numbers_of_torch(device, shape, dtype, affine):
    ours = RMSNorm(shape, elementwise_affine=affine, device=device, dtype=dtype)
    native = nn.RMSNorm(shape, elementwise_affine=affine, device=device, dtype=dtype)
    if affine:
        with torch.no_grad():
            ours.weight.copy_(numbers(ours.weight.shape, dtype, device, 0))
    native.load_state_dict(ours.state_dict())
    x = numbers((3, 2, 4, 8), dtype, device, 1)
    torch.testing.assert_close(ours(x), native(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_state_dict_both_ways(bias, affine):
    """Without a bias, strictly, in both directions; with one, it is one more key."""
    if bias and not affine:
        pytest.skip("a bias needs elementwise_affine")
    ours, native = RMSNorm(8, elementwise_affine=affine, bias=bias), nn.RMSNorm(8, None, affine)
    for p in (*ours.parameters(), *native.parameters()):
        nn.init.normal_(p)
    if not bias:
        kept = copy.deepcopy(native.state_dict())
        ours.load_state_dict(native.state_dict(), strict=True)
        native.load_state_dict(ours.state_dict(), strict=True)
        assert all(torch.equal(v, kept[k]) for k, v in ours.state_dict().items())
    else:
        assert set(ours.state_dict()) == {"weight", "bias"}
        twin = RMSNorm(8, bias=True)
        twin.load_state_dict(ours.state_dict(), strict=True)
        assert torch.equal(twin.bias, ours.bias)
        missing, unexpected = ours.load_state_dict(native.state_dict(), strict=False)
        assert (missing, unexpected) == (["bias"], [])


def test_forward_takes_the_name_of_torch():
    """torch.nn.RMSNorm calls its input x, unlike torch.nn.LayerNorm."""
    names = [list(inspect.signature(c.forward).parameters) for c in (RMSNorm, torch.nn.RMSNorm)]
    assert names[0] == names[1]
    x = torch.randn(3, 8)
    assert torch.equal(RMSNorm(8)(x=x), RMSNorm(8)(x))


def test_repr():
    assert repr(RMSNorm(8)) == repr(nn.RMSNorm(8))
    assert repr(RMSNorm((2, 4), 1e-6, False)) == repr(nn.RMSNorm((2, 4), 1e-6, False))
    everything = PRMSNorm(
        8, 0.5, 1e-6, bias=True, weight_offset=1.0, casting_mode="llama", compile_mode="fuse"
    )
    assert repr(everything) == (
        "PRMSNorm((8,), eps=1e-06, elementwise_affine=True, bias=True, p=0.5, weight_offset=1.0, "
        "casting_mode='llama', compile_mode='fuse')"
    )
    assert repr(AddRMSNorm(8)) == "AddRMSNorm((8,), eps=None, elementwise_affine=True)"


@pytest.mark.parametrize("cls", MODULES)
@pytest.mark.parametrize("offset", [0.0, 1.0, 0.25])
def test_reset_parameters(cls, offset):
    module = cls(8, weight_offset=offset, bias=True)
    for _ in range(2):
        assert torch.equal(module.weight, torch.full((8,), 1 - offset))
        assert torch.equal(module.bias, torch.zeros(8))
        with torch.no_grad():
            module.weight.fill_(7)
            module.bias.fill_(7)
        module.reset_parameters()
    cls(8, elementwise_affine=False).reset_parameters()


@pytest.mark.parametrize("cls", MODULES)
def test_meta_initialisation(device, cls):
    """Made on meta, moved to a device, reset there: as if made there."""
    module = cls((2, 4), device="meta", dtype=torch.bfloat16, bias=True, weight_offset=1.0)
    assert module.weight.is_meta
    assert module.bias.is_meta
    assert call(module, torch.empty(3, 2, 4, device="meta", dtype=torch.bfloat16)).shape == (
        3,
        2,
        4,
    )
    module = module.to_empty(device=device)
    module.reset_parameters()
    for ours, expected in zip(
        module.parameters(), cls((2, 4), bias=True, weight_offset=1.0).parameters(), strict=True
    ):
        assert torch.equal(ours.cpu(), expected.bfloat16())
    with torch.device("meta"):
        assert cls(8).weight.is_meta


@pytest.mark.parametrize("cls", MODULES)
def test_copies(cls):
    module = cls(16, p=0.5, eps=1e-5, weight_offset=1.0, casting_mode="llama", bias=True)
    nn.init.normal_(module.weight)
    x = torch.randn(3, 16)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(twin) == repr(module)
        assert same_bits(call(twin, x), call(module, x))
    module.half()
    assert module.weight.dtype == module.bias.dtype == torch.float16


@pytest.mark.parametrize("cls", MODULES)
def test_arguments_reach_the_function(device, cls):
    args = {"p": 0.3, "weight_offset": 1.0, "casting_mode": "llama"}
    module = cls((2, 20), eps=1e-3, bias=True, device=device, dtype=torch.bfloat16, **args)
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(numbers((2, 20), torch.bfloat16, device, i))
    x = numbers((5, 2, 20), torch.bfloat16, device, 3)
    expected = F.rms_norm(x, (2, 20), module.weight, 1e-3, bias=module.bias, **args)
    assert same_bits(call(module, x), expected)
    plain = F.rms_norm(x, (2, 20), module.weight, 1e-3, bias=module.bias)
    assert not same_bits(expected, plain)


def test_add_rms_norm(device):
    module = AddRMSNorm(20, device=device)
    x, residual = (numbers((5, 20), torch.float32, device, i) for i in range(2))
    y, s = module(x, residual)
    assert same_bits(s, x + residual)
    assert same_bits(y, RMSNorm(20, device=device)(s))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_eps_none_is_the_epsilon_of_the_arithmetic(device, dtype):
    """fp32's for the half types, as torch.nn.RMSNorm; rows near it tell."""
    eps = torch.finfo(arithmetic_type(dtype)).eps
    x = (numbers((4, 64), torch.float64, device, 1) * eps**0.5).to(dtype)
    assert same_bits(RMSNorm(64)(x), RMSNorm(64, eps=eps)(x))
    assert_forward(F.rms_norm(x, 64), x, None, None, Options(eps=eps))
    native = torch.nn.functional.rms_norm(x, [64])
    torch.testing.assert_close(F.rms_norm(x, 64), native)
    assert not torch.allclose(F.rms_norm(x, 64), F.rms_norm(x, 64, eps=2 * eps), rtol=0.02)


class LlamaRMSNorm(nn.Module):
    """What the Llama family writes, in plain torch."""

    def __init__(self, n: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n, dtype=dtype)), eps

    def forward(self, x):
        a = x.to(torch.float32)
        a = a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * a.to(x.dtype)


def exact_input(n: int, dtype: torch.dtype, device, seed: int):
    """Numbers of few bits, so that the mean square is exact in every order of summation, and with
    it every bit of what follows is the same for everyone who rounds at the same places."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-8, 9, (64, n), generator=generator) / 4
    x[:, 0] = 1  # no row of zeros
    return x.to(device, dtype)


@pytest.mark.parametrize("weight_type", ["same", torch.float32], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("n", [1, 4, 64, 128, 1024])
def test_llama_to_the_bit(device, n, dtype, weight_type):
    weight_type = dtype if weight_type == "same" else weight_type
    plain = LlamaRMSNorm(n, 1e-6, weight_type).to(device)
    with torch.no_grad():
        plain.weight.copy_(numbers(n, weight_type, device, n))
    ours = RMSNorm(n, 1e-6, device=device, dtype=weight_type, casting_mode="llama")
    ours.load_state_dict(plain.state_dict())
    x = exact_input(n, dtype, device, n)
    y, expected = ours(x), plain(x)
    assert same_bits(y, expected)
    assert y.dtype == torch.promote_types(dtype, weight_type)
    torch_mode = F.rms_norm(x, n, ours.weight, 1e-6).to(y.dtype)
    if n > 1:
        assert not same_bits(torch_mode, expected)  # the input does tell the two orders apart


@given(n=st.integers(1, 300), dtype=st.sampled_from(HALVES), seed=st.integers(0, 10**6))
def test_llama_on_any_numbers(device, n, dtype, seed):
    """The order of the sum may move r by a unit of fp32, and few roundings with it: never by more
    than one unit of x's dtype before the weight."""
    plain = LlamaRMSNorm(n, 1e-6, dtype).to(device)
    x = numbers((8, n), dtype, device, seed)
    ours, theirs = F.rms_norm(x, n, plain.weight, 1e-6, casting_mode="llama"), plain(x)
    different = ours != theirs
    assert different.sum() <= 2 + 0.005 * x.numel()
    assert torch.allclose(ours.float(), theirs.float(), rtol=torch.finfo(dtype).eps, atol=0)


TRANSFORMERS = [
    ("llama.modeling_llama", "LlamaRMSNorm", {"casting_mode": "llama"}),
    ("mistral.modeling_mistral", "MistralRMSNorm", {"casting_mode": "llama"}),
    ("qwen3.modeling_qwen3", "Qwen3RMSNorm", {"casting_mode": "llama"}),
    ("olmo2.modeling_olmo2", "Olmo2RMSNorm", {}),
    ("gemma.modeling_gemma", "GemmaRMSNorm", {"weight_offset": 1.0}),
    ("gemma2.modeling_gemma2", "Gemma2RMSNorm", {"weight_offset": 1.0}),
    ("gemma3.modeling_gemma3", "Gemma3RMSNorm", {"weight_offset": 1.0}),
]


@pytest.mark.parametrize(("where", "name", "options"), TRANSFORMERS, ids=lambda v: str(v)[:20])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_transformers_to_the_bit(device, where, name, options, dtype):
    pytest.importorskip("transformers", reason="transformers is not installed")
    try:
        cls = getattr(importlib.import_module("transformers.models." + where), name)
    except (ImportError, AttributeError) as error:
        pytest.skip(f"this transformers has no {name}: {error}")
    n = 128
    theirs = cls(n, eps=1e-6).to(device, dtype)
    with torch.no_grad():
        theirs.weight.copy_(numbers(n, dtype, device, 1))
    ours = RMSNorm(n, 1e-6, device=device, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = exact_input(n, dtype, device, 2)
    assert same_bits(ours(x), theirs(x))


def test_gemma_offset_is_added_in_fp32(device):
    """1 + w for a small bf16 w: added in bf16 it would vanish."""
    x = exact_input(64, torch.bfloat16, device, 3)
    w = torch.full((64,), 2.0**-9, dtype=torch.bfloat16, device=device)
    y = F.rms_norm(x, 64, w, weight_offset=1.0)
    exact = F.rms_norm(x, 64, w.float() + 1)
    assert same_bits(y, exact)
    assert not same_bits(y, F.rms_norm(x, 64, w + 1))
