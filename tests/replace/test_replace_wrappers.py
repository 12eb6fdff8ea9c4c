"""Swapping in models that something else holds on to: FSDP, DDP, LoRA, quantisation, offloading,
empty weights, torch.compile. The rule is docs/swapping.md."""

import contextlib
import copy
import functools

import pytest
import torch
import torch.distributed as dist
from plain_norm import N, PlainNorm
from torch import nn

from fused_rmsnorm import RMSNorm, replace_layer_norm_, replace_rms_norm_

X = torch.randn(4, 5, N, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = PlainNorm(), nn.Linear(N, N)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.norm(x))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.RMSNorm(N))


NORMS = ["2", "0.norm", "1.norm"]


@pytest.fixture
def one_rank(tmp_path):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch is built without torch.distributed or gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def step(made: nn.Module) -> list[torch.Tensor]:
    y = made(X)
    y.square().mean().backward()
    grads = [p.grad for p in made.parameters()]
    return [y, *(g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads)]


def same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


HELD = "under FSDP, which holds on to its modules: replace first, shard then"


@pytest.mark.parametrize("replace", [replace_rms_norm_, replace_layer_norm_])
def test_fsdp_shards_what_was_replaced_and_not_the_other_way(one_rank, replace) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    made, want = model(), step(model())
    for block in (made[0], made[1], made[2], made):
        fully_shard(block, mesh=mesh)
    modules = list(made.modules())
    report = replace(made)
    assert (dict(report), report.left) == ({}, dict.fromkeys(NORMS, HELD))
    assert list(made.modules()) == modules
    same(step(made), want)
    if replace is replace_layer_norm_:
        return
    made = model()
    assert list(replace(made)) == NORMS
    for block in (made[0], made[1], made):
        fully_shard(block, mesh=mesh)
    same(step(made), want)


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp_of_the_first_kind(one_rank, use_orig_params: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    made = FullyShardedDataParallel(
        model(), device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )
    want = made(X)
    report = replace_rms_norm_(made)
    assert report == {}
    assert set(report.left.values()) == {HELD}
    assert len(report.left) == 3
    assert torch.equal(made(X), want)


def test_tensor_parallel_parameters_stay(one_rank) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    made = model()
    weight = distribute_tensor(made[0].norm.weight.detach(), init_device_mesh("cpu", (1,)))
    made[0].norm.weight = nn.Parameter(weight)
    report = replace_rms_norm_(made)
    assert list(report) == ["2", "1.norm"]
    assert report.left == {"0.norm": "its weight has type DTensor, not torch.nn.Parameter"}


class NormOverAllRanks(PlainNorm):
    """Its row lies on all ranks: one rank, or equal rows on all, look like a norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = x.float()
        mean = a.detach().square().mean(-1, keepdim=True)
        dist.all_reduce(mean)
        mean = mean / dist.get_world_size() + a.square().mean(-1, keepdim=True) * 0
        return self.weight * (a * torch.rsqrt(mean + self.eps)).to(x.dtype)


def test_a_norm_whose_row_lies_on_several_ranks_stays(one_rank) -> None:
    report = replace_rms_norm_(nn.Sequential(NormOverAllRanks()))
    assert report.left == {"0": "it runs c10d::allreduce, which is no part of a norm"}


def test_data_parallel_is_no_matter(one_rank) -> None:
    made, want = nn.parallel.DistributedDataParallel(model()), step(model())
    assert list(replace_rms_norm_(made)) == [f"module.{name}" for name in NORMS]
    same(step(made), want)


class LoraLinear(nn.Module):
    """As peft wraps a layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(N, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, N, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class ModulesToSave(nn.Module):
    """As peft keeps a norm and the copy of it that is trained."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original_module = original.requires_grad_(False)
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(original)})
        self.modules_to_save.requires_grad_(True)
        self.active = "default"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.active is None:
            return self.original_module(x)
        return self.modules_to_save[self.active](x)


def test_lora_is_no_matter() -> None:
    made = model()
    for block in made[:2]:
        block.linear = LoraLinear(block.linear.requires_grad_(False))
        block.norm = ModulesToSave(block.norm)
    kept = copy.deepcopy(made)
    report = replace_rms_norm_(made)
    assert len(report) == 2 * 2 + 1
    assert report.left == {}
    for active in ("default", None):
        for block in (*made[:2], *kept[:2]):
            block.norm.active = active
        torch.testing.assert_close(made(X), kept(X))
    flags = [p.requires_grad for p in made.parameters()]
    assert flags == [p.requires_grad for p in kept.parameters()]
    assert made.state_dict().keys() == kept.state_dict().keys()


def test_lora_of_peft() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(
        target_modules=["linear"], modules_to_save=["norm"], init_lora_weights=False
    )
    made = peft.get_peft_model(model(), config).eval()
    want = made(X)
    report = replace_rms_norm_(made)
    assert len(report) == 2 * 2 + 1
    torch.testing.assert_close(made(X), want)
    merged = made.merge_and_unload()
    torch.testing.assert_close(merged(X), want)
    assert sum(isinstance(m, RMSNorm) for m in merged.modules()) == 3


def test_a_quantised_model_keeps_its_plain_norms() -> None:
    """Quantised are the layers; a norm whose own parameters are is of another type and stays."""
    made = torch.ao.quantization.quantize_dynamic(model(), {nn.Linear}, dtype=torch.qint8)
    want = made(X)
    assert list(replace_rms_norm_(made)) == NORMS
    torch.testing.assert_close(made(X), want)


def test_a_norm_that_is_watched_by_an_observer_stays() -> None:
    made = model()
    made.qconfig = torch.ao.quantization.default_qconfig
    torch.ao.quantization.prepare(
        made, inplace=True, allow_list={PlainNorm}, observer_non_leaf_module_list=[PlainNorm]
    )
    want = made(X)
    report = replace_rms_norm_(made)
    assert "0.norm" in report.left
    assert torch.equal(made(X), want)


class Hook:
    """As accelerate's AlignDevicesHook: the weights are elsewhere but for the time of a call."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = {k: v.detach().clone() for k, v in module.named_parameters()}
        for name in self.weights:
            module._parameters[name] = nn.Parameter(self.weights[name].to("meta"))


def offload(module: nn.Module) -> None:
    """As accelerate's add_hook_to_module."""
    hook = module._hf_hook = Hook(module)
    module._old_forward = module.forward

    @functools.wraps(module.forward)
    def forward(x):
        for name, value in hook.weights.items():
            module._parameters[name] = nn.Parameter(value)
        return module._old_forward(x)

    module.forward = forward


@pytest.mark.parametrize("replace", [replace_rms_norm_, replace_layer_norm_])
def test_an_offloaded_norm_stays(replace) -> None:
    made = nn.Sequential(PlainNorm(), nn.LayerNorm(N))
    want = made(X)
    for norm in made:
        offload(norm)
    report = replace(made)
    assert report == {}
    key = "0" if replace is replace_rms_norm_ else "1"
    assert report.left[key] == (
        "it has a hook of accelerate, which moves its parameters: replace, then dispatch"
    )
    assert torch.equal(made(X), want)


def test_offloading_of_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    made = model()
    want = made(X)
    made = accelerate.cpu_offload(made, execution_device=torch.device("cpu"))
    report = replace_rms_norm_(made)
    assert report == {}
    assert all("a hook of accelerate" in why for why in report.left.values())
    assert torch.equal(made(X), want)
    made = model()
    assert list(replace_rms_norm_(made)) == NORMS
    made = accelerate.cpu_offload(made, execution_device=torch.device("cpu"))
    torch.testing.assert_close(made(X), want)


@contextlib.contextmanager
def init_empty_weights():
    """As accelerate's: every parameter that is registered goes to the meta device."""
    register = nn.Module.register_parameter

    def to_meta(module, name, parameter):
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(module._parameters[name].to("meta"))

    nn.Module.register_parameter = to_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("how", [init_empty_weights, lambda: torch.device("meta")])
def test_empty_weights(how, inside: bool) -> None:
    """The norm is looked at with numbers of its own, wherever its parameters are."""
    with how():
        made = nn.Sequential(Block(), Block(), nn.RMSNorm(N))
        parameters = list(made.parameters())
        if inside:
            assert list(replace_rms_norm_(made)) == NORMS
    if not inside:
        assert list(replace_rms_norm_(made)) == NORMS
    assert [id(p) for p in made.parameters()] == [id(p) for p in parameters]
    assert all(p.is_meta for p in made.parameters())
    made.load_state_dict(model().state_dict(), assign=True)
    torch.testing.assert_close(made(X), model()(X))


def test_inside_of_a_compiled_model() -> None:
    """What is compiled is compiled again, because its modules are others."""
    torch._dynamo.reset()
    made = model()
    compiled = torch.compile(made, backend="aot_eager")
    want = compiled(X)
    assert list(replace_rms_norm_(compiled)) == [f"_orig_mod.{name}" for name in NORMS]
    assert all(type(m) is not PlainNorm for m in made.modules())
    torch.testing.assert_close(compiled(X), want)
    with torch.no_grad():
        made[0].norm.weight.mul_(2)
    torch.testing.assert_close(compiled(X), made(X))
    assert not torch.allclose(compiled(X), want)


def test_a_layer_norm_inside_of_a_compiled_model() -> None:
    torch._dynamo.reset()
    made = nn.Sequential(nn.Linear(N, N), nn.LayerNorm(N))
    made.compile(backend="aot_eager")
    before = made(X)
    assert list(replace_layer_norm_(made)) == ["1"]
    h = made[0](X)
    want = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(made(X), want)
    assert not torch.allclose(made(X), before)


@pytest.mark.parametrize(
    ("replace", "norm"), [(replace_rms_norm_, PlainNorm), (replace_layer_norm_, nn.LayerNorm)]
)
def test_a_norm_compiled_by_itself_stays(replace, norm) -> None:
    torch._dynamo.reset()
    made = nn.Sequential(torch.compile(norm(N), backend="eager"))
    want = made(X)
    report = replace(made)
    assert report == {}
    assert report.left == {
        "0._orig_mod": "wrapped by torch.compile by itself, which goes on to call it: "
        "replace, then compile"
    }
    assert torch.equal(made(X), want)


def test_a_graph_module_calls_the_new_norm() -> None:
    class Leaf(torch.fx.Tracer):
        def is_leaf_module(self, m, name):
            return isinstance(m, (PlainNorm, nn.Linear, nn.RMSNorm))

    made = model()
    traced = torch.fx.GraphModule(made, Leaf().trace(made))
    want = traced(X)
    assert list(replace_rms_norm_(traced)) == NORMS
    torch.testing.assert_close(traced(X), want)
    traced.get_submodule("2").weight.data.zero_()
    assert traced(X).abs().max() == 0
