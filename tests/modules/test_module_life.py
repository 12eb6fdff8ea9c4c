"""What happens to modules between their making and their use: copied, saved, loaded, moved, shared,
parametrised, prepared for quantisation. test_modules.py has the rest."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from cases import numbers
from fused_calls import Calls
from reference import Options, assert_backward, assert_forward, same_bits
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, stateless

from fused_rmsnorm import AddRMSNorm, PRMSNorm, RMSNorm
from fused_rmsnorm import functional as F

SETTINGS = {"eps": 1e-5, "p": 0.5, "weight_offset": 1.0, "casting_mode": "llama", "bias": True}
MODULES = [RMSNorm, PRMSNorm, AddRMSNorm]


def call(module, x):
    return module(x, torch.zeros_like(x))[0] if isinstance(module, AddRMSNorm) else module(x)


def randomised(module, seed=0):
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(numbers(parameter.shape, parameter.dtype, parameter.device, seed + i))
    return module


def gradients(module, x, dy):
    """Of x and of the parameters, by name."""
    x = x.detach().requires_grad_()
    names, parameters = zip(*module.named_parameters(), strict=True)
    grads = torch.autograd.grad(call(module, x), (x, *parameters), dy)
    return dict(zip(("x", *names), grads, strict=True))


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(same_bits(a[k], b[k]) for k in a)


def saved_and_loaded(what, **kwargs):
    buffer = io.BytesIO()
    torch.save(what, buffer)
    buffer.seek(0)
    return torch.load(buffer, **kwargs)


@pytest.mark.parametrize("cls", MODULES)
@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save", "safe globals"])
def test_a_copy_is_a_module_of_its_own(cls, copied):
    """Same settings, numbers and gradients; hooks, mode and requires_grad come along; training the
    copy leaves the original as it was."""
    module = randomised(cls(16, **SETTINGS)).eval()
    module.bias.requires_grad_(False)
    if copied == "safe globals":
        with torch.serialization.safe_globals([cls]):
            twin = saved_and_loaded(module, weights_only=True)
    else:
        twin = {
            "deepcopy": copy.deepcopy,
            "pickle": lambda m: pickle.loads(pickle.dumps(m)),
            "torch.save": lambda m: saved_and_loaded(m, weights_only=False),
        }[copied](module)
    assert type(twin) is cls
    assert repr(twin) == repr(module)
    assert not twin.training
    assert not twin.bias.requires_grad
    twin.bias.requires_grad_()
    module.bias.requires_grad_()
    x, dy = numbers((5, 16), torch.float32, "cpu", 7), numbers((5, 16), torch.float32, "cpu", 8)
    assert same_bits(call(twin, x), call(module, x))
    assert_same(gradients(twin, x, dy), gradients(module, x, dy))
    before = copy.deepcopy(module.state_dict())
    torch.optim.SGD(twin.parameters(), 1.0).zero_grad()
    call(twin, x).sum().backward()
    torch.optim.SGD(twin.parameters(), 1.0).step()
    assert not same_bits(twin.weight, before["weight"])
    assert all(same_bits(v, before[k]) for k, v in module.state_dict().items())


def test_torch_load_refuses_the_class_until_it_is_declared_safe():
    with pytest.raises(pickle.UnpicklingError, match=r"fused_rmsnorm\.modules\.RMSNorm"):
        saved_and_loaded(RMSNorm(8), weights_only=True)


@pytest.mark.parametrize("bias", [False, True])
def test_state_dict_through_a_file(bias):
    """weights_only, mmap, and assign=True from meta, which makes no second copy of the weights."""
    module = randomised(RMSNorm((2, 8), bias=bias))
    state = saved_and_loaded(module.state_dict(), weights_only=True)
    twin = RMSNorm((2, 8), bias=bias, device="meta")
    twin.load_state_dict(state, strict=True, assign=True)
    assert twin.weight.data_ptr() == state["weight"].data_ptr()
    x = numbers((3, 2, 8), torch.float32, "cpu", 1)
    assert same_bits(twin(x), module(x))


def test_strict_loading_into_torch_and_back():
    """Keys and shapes that do not fit are refused on both sides, as between two of torch's own."""
    ours, native = randomised(RMSNorm(8)), nn.RMSNorm(8)
    native.load_state_dict(saved_and_loaded(ours.state_dict(), weights_only=True), strict=True)
    assert same_bits(native.weight, ours.weight)
    model = nn.Sequential(nn.Linear(8, 8), native)
    twin = nn.Sequential(nn.Linear(8, 8), RMSNorm(8))
    twin.load_state_dict(model.state_dict(), strict=True)
    assert same_bits(twin[1].weight, native.weight)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"bias"'):
        native.load_state_dict(RMSNorm(8, bias=True).state_dict(), strict=True)
    with pytest.raises(RuntimeError, match=r'Missing key.*"bias"'):
        RMSNorm(8, bias=True).load_state_dict(native.state_dict(), strict=True)
    for target, source in ((ours, nn.RMSNorm(7)), (nn.RMSNorm(7), ours)):
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            target.load_state_dict(source.state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight"'):
        RMSNorm(8, elementwise_affine=False).load_state_dict(native.state_dict())


@pytest.mark.parametrize("cls", MODULES)
def test_a_model_made_on_meta(device, cls):
    """torch.device("meta"), to_empty, then every module's reset_parameters: the way of FSDP."""
    with torch.device("meta"):
        model = nn.ModuleList([nn.Linear(8, 8), cls(8, weight_offset=1.0, bias=True), cls(8)])
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))  # what to_empty may leave
    for module in model:
        module.reset_parameters()
    expected = [torch.zeros(8), torch.zeros(8), torch.ones(8)]  # weight, bias; weight
    for a, e in zip([*model[1].parameters(), *model[2].parameters()], expected, strict=True):
        assert same_bits(a.cpu(), e)
    x = numbers((3, 8), torch.float32, device, 0)
    native = nn.RMSNorm(8, eps=model[2].eps, device=device)
    torch.testing.assert_close(call(PRMSNorm(8, 1.0, device=device), x), native(x))
    assert torch.isfinite(call(model[1], x)).all()


@pytest.mark.parametrize("move", ["half", "bfloat16", "double", "to"])
def test_other_dtypes(device, move):
    """Parameters and buffers of the new dtype, and the numbers of the definition with them."""
    module = randomised(RMSNorm(24, bias=True, device=device))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    moved = module.to(torch.bfloat16) if move == "to" else getattr(module, move)()
    dtype = {"half": torch.float16, "double": torch.float64}.get(move, torch.bfloat16)
    assert moved is module
    assert all(same_bits(v, before[k].to(dtype)) for k, v in module.state_dict().items())
    x, dy = (numbers((5, 24), dtype, device, i) for i in (1, 2))
    assert_forward(module(x), x, module.weight, module.bias, Options())
    grads = gradients(module, x, dy)
    ours = (grads["x"], grads["weight"], grads["bias"])
    assert_backward(ours, x, module.weight, module.bias, dy, Options())
    assert all(g.dtype == dtype for g in ours)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.preserve_format])
def test_memory_format(device, memory_format):
    """Module.to(memory_format) lays out parameters of four dimensions anew: same numbers, and
    gradients with the layout of their parameters, as torch's own."""
    shape = (2, 3, 4, 5)
    module = randomised(RMSNorm(shape, bias=True, device=device))
    plain = copy.deepcopy(module)
    module.to(memory_format=memory_format)
    if memory_format == torch.channels_last:
        assert module.weight.stride() != plain.weight.stride()
    x, dy = (numbers((3, *shape), torch.float32, device, i) for i in (1, 2))
    assert same_bits(module(x), plain(x))
    assert_same(gradients(module, x, dy), gradients(plain, x, dy))
    native = nn.RMSNorm(shape, device=device)
    native.load_state_dict(plain.state_dict(), strict=False)
    native.to(memory_format=memory_format)
    module(x).sum().backward()
    native(x).sum().backward()
    assert module.weight.grad.stride() == native.weight.grad.stride()
    # Images normalised over their last dimension, in either layout of memory.
    image = numbers((2, 3, 4, 5), torch.float32, device, 3)
    norm = RMSNorm(5, device=device)
    assert same_bits(norm(image.to(memory_format=torch.channels_last)), norm(image))


class Exponential(nn.Module):
    """A weight that stays positive."""

    def forward(self, w):
        return w.exp()

    def right_inverse(self, w):
        return w.log()


@pytest.mark.parametrize("cls", MODULES)
def test_parametrize(device, cls):
    module = cls(16, bias=True, device=device)
    with torch.no_grad():
        module.weight.copy_(numbers(16, torch.float32, device, 0).abs() + 0.1)
    plain = copy.deepcopy(module)
    parametrize.register_parametrization(module, "weight", Exponential())
    assert isinstance(module, cls)
    x, dy = (numbers((5, 16), torch.float32, device, i) for i in (1, 2))
    torch.testing.assert_close(call(module, x), call(plain, x))
    theirs = gradients(plain, x, dy)
    ours = gradients(module, x, dy)
    torch.testing.assert_close(ours["x"], theirs["x"])
    # d exp(v) / dv = exp(v) = w
    original = ours["parametrizations.weight.original"]
    torch.testing.assert_close(original, theirs["weight"] * plain.weight.detach())
    with parametrize.cached(), Calls() as calls:
        call(module, x)
    assert set(calls.fused()) == {"add_rms_norm_fwd" if cls is AddRMSNorm else "rms_norm_fwd"}
    twin = cls(16, bias=True, device=device)
    parametrize.register_parametrization(twin, "weight", Exponential())
    twin.load_state_dict(module.state_dict(), strict=True)
    assert same_bits(call(twin, x), call(module, x))
    parametrize.remove_parametrizations(module, "weight")
    assert list(module.state_dict()) == ["bias", "weight"]
    torch.testing.assert_close(call(module, x), call(plain, x))


def test_weight_norm_and_pruning():
    """What torch makes of parametrisations: both leave a weight that is no Parameter."""
    x = numbers((5, 16), torch.float32, "cpu", 1)
    module = randomised(RMSNorm(16))
    expected = module(x)
    torch.testing.assert_close(parametrizations.weight_norm(module)(x), expected)
    module = randomised(RMSNorm(16))
    mask = torch.arange(16) % 2
    prune.custom_from_mask(module, "weight", mask)
    assert same_bits(module(x), F.rms_norm(x, 16, module.weight_orig * mask))
    prune.remove(module, "weight")
    assert module(x)[:, ::2].count_nonzero() == 0


@pytest.mark.parametrize("cls", MODULES)
def test_functional_call(cls):
    """By torch.func and by torch.nn.utils.stateless, tied weights included; the module keeps its
    own parameters."""
    module = randomised(cls(16, bias=True))
    own = copy.deepcopy(module.state_dict())
    other = {k: v + 1 for k, v in module.state_dict().items()}
    x = numbers((5, 16), torch.float32, "cpu", 9)
    args = (x, torch.zeros_like(x)) if cls is AddRMSNorm else (x,)
    first = (lambda y: y[0]) if cls is AddRMSNorm else (lambda y: y)
    twin = cls(16, bias=True)
    twin.load_state_dict(other)
    expected, mine = call(twin, x), call(module, x)
    assert same_bits(first(torch.func.functional_call(module, other, args)), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # stateless is deprecated, and still used
        assert same_bits(first(stateless.functional_call(module, other, args)), expected)
    assert_same(dict(module.state_dict()), dict(own))
    assert same_bits(call(module, x), mine)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = RMSNorm(16), RMSNorm(16)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    y = torch.func.functional_call(Tied(), {"a.weight": other["weight"]}, (x,), tie_weights=True)
    one = F.rms_norm(x, 16, other["weight"])
    assert same_bits(y, F.rms_norm(one, 16, other["weight"]))


def test_data_parallel_without_a_gpu():
    """It hands on to the module itself, and its state dict has one more prefix."""
    if torch.accelerator.is_available():
        pytest.skip("with a GPU it replicates there; test_runtime.py asks for that")
    module = randomised(RMSNorm(16, bias=True))
    parallel = nn.DataParallel(module)
    x, dy = (numbers((6, 16), torch.float32, "cpu", i) for i in (1, 2))
    assert same_bits(parallel(x), module(x))
    theirs = {k.removeprefix("module."): v for k, v in gradients(parallel, x, dy).items()}
    assert_same(theirs, gradients(module, x, dy))
    twin = RMSNorm(16, bias=True)
    twin.load_state_dict({k.removeprefix("module."): v for k, v in parallel.state_dict().items()})
    assert same_bits(twin(x), module(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", ["prepare", "prepare_qat", "prepare_fx", "quantize_dynamic"])
def test_quantisation_leaves_it_alone(way):
    """torch.ao observes and converts the linear layers around a norm and keeps the norm."""
    quantization = pytest.importorskip(
        "torch.ao.quantization", reason="this torch has no torch.ao.quantization"
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), randomised(RMSNorm(16, p=0.5)), nn.Linear(16, 16))
    model.train(way == "prepare_qat")
    norm, x = copy.deepcopy(model[1]), torch.randn(5, 16)
    expected = model(x)
    if way == "prepare_fx":
        fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
        mapping = quantization.get_default_qconfig_mapping("fbgemm")
        prepared = fx.prepare_fx(model, mapping, (x,))
        assert same_bits(prepared(x), expected)
        targets = [n.target for n in prepared.graph.nodes if n.op == "call_function"]
        assert targets == [F.rms_norm]
        converted = fx.convert_fx(prepared)
        with Calls() as calls:
            converted(x)
        assert calls.fused() == {"rms_norm_fwd": 1}
        return
    if way == "quantize_dynamic":
        converted = quantization.quantize_dynamic(model, {nn.Linear})
    else:
        qat = way == "prepare_qat"
        get = quantization.get_default_qat_qconfig if qat else quantization.get_default_qconfig
        model.qconfig = get("fbgemm")
        prepared = getattr(quantization, way)(model)
        y = prepared(x)
        assert type(prepared[1]) is RMSNorm
        assert qat or same_bits(y, expected)
        assert not [m for m in prepared[1].modules() if m is not prepared[1]]  # no observer
        converted = quantization.convert(prepared.eval())
    assert type(converted[0]) is not nn.Linear
    assert type(converted[1]) is RMSNorm
    assert repr(converted[1]) == repr(norm)
    assert same_bits(converted[1](x), norm(x))
