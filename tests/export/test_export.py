"""Models taken out of Python: torch.export, AOTInductor, fx, and TorchScript by trace and by
source. ONNX has a file of its own."""

import copy
import io
import warnings

import pytest
import torch
from cases import numbers
from reference import same_bits
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fused_rmsnorm
from fused_rmsnorm import AddRMSNorm, PRMSNorm, RMSNorm, RMSNormGated
from fused_rmsnorm import functional as F

N = 24
ROWS = torch.export.Dim("rows", max=1024)

# The exporter and TorchScript announce their own changes.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)


class Block(nn.Module):
    """Every kind of norm between other layers."""

    def __init__(self, compile_mode="opaque"):
        super().__init__()
        mode = {"compile_mode": compile_mode}
        self.linear = nn.Linear(N, N)
        self.norm = RMSNorm((4, 6), bias=True, weight_offset=1.0, **mode)
        self.partial = PRMSNorm(N, 0.3, **mode)
        self.add = AddRMSNorm(N, eps=1e-3, casting_mode="llama", **mode)
        for i, parameter in enumerate(self.parameters()):
            parameter.data.copy_(numbers(parameter.shape, torch.float32, "cpu", i))

    def forward(self, x):
        h = self.norm(self.linear(x).view(-1, 4, 6)).view(-1, N)
        y, s = self.add(self.partial(h), x)
        return y.sin() + s


def rows(n, seed=9):
    return numbers((n, N), torch.float32, "cpu", seed)


def targets(graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


def ours(graph) -> list[str]:
    prefix = "fused_rmsnorm."
    return [t.removeprefix(prefix) for t in targets(graph) if t.startswith(prefix)]


def assert_same(exported, model):
    """The bits of the model, also for a batch size that the export did not see."""
    for x in (rows(5), rows(17, 10)):
        assert same_bits(exported(x), model(x))


def written_and_read(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    """The graph holds the operators by their names; run_decompositions those below; both run with
    the model's bits, also written to a file and read again."""
    model = Block()
    program = torch.export.export(model, (rows(5),), dynamic_shapes=({0: ROWS},), strict=strict)
    assert ours(program.graph) == ["rms_norm.default"] * 2 + ["add_rms_norm.default"]
    assert_same(program.module(), model)
    assert_same(written_and_read(program).module(), model)
    assert_same(torch.export.unflatten(program), model)
    lower = program.run_decompositions()
    assert ours(lower.graph) == ["rms_norm_fwd.default"] * 2 + ["add_rms_norm_fwd.default"]
    assert_same(lower.module(), model)
    assert_same(written_and_read(lower).module(), model)


def test_training_an_exported_model():
    model = Block()
    exported = torch.export.export(model, (rows(5),)).module()
    grads = []
    for m in (model, exported):
        m(rows(5)).sin().sum().backward()
        grads.append({name: p.grad for name, p in m.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    assert all(same_bits(grads[1][name], grad) for name, grad in grads[0].items())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("p", [None, 0.07])
def test_export_with_a_hidden_size_that_varies(p, strict):
    class Norm(nn.Module):
        def forward(self, x, w):
            return F.rms_norm(x, x.shape[-1:], w, p=p)

    n = torch.export.Dim("n", min=2, max=4096)
    args = rows(3), rows(3)[0]
    program = torch.export.export(Norm(), args, dynamic_shapes=({1: n}, {0: n}), strict=strict)
    for size in (N, 100, 101):
        x, w = (numbers(s, torch.float32, "cpu", 1) for s in ((3, size), size))
        for exported in (program, program.run_decompositions()):
            assert same_bits(exported.module()(x, w), Norm()(x, w))


def test_fuse_mode_exports_plain_operations():
    """For a runtime that does not have the operators."""
    model = Block("fuse")
    program = torch.export.export(model, (rows(5),), dynamic_shapes=({0: ROWS},))
    lower = program.run_decompositions()
    assert ours(lower.graph) == []
    assert all(t.startswith(("aten.", "<built-in function getitem>")) for t in targets(lower.graph))
    for x in (rows(5), rows(17, 10)):
        torch.testing.assert_close(lower.module()(x), Block()(x))


def test_aot_inductor(tmp_path):
    """Compiled, packed, loaded and run, with the operators inside; from C++ in test_cpp.py."""
    model = Block()
    with torch.no_grad():
        program = torch.export.export(model, (rows(5),), dynamic_shapes=({0: ROWS},))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        loaded = torch._inductor.aoti_load_package(path)
        for x in (rows(5), rows(17, 10)):
            torch.testing.assert_close(loaded(x), model(x))
            # What stands around the norms is Inductor's: the norms alone keep their bits.
            by_parts = torch.compile(model, fullgraph=True, dynamic=True)(x)
            assert same_bits(loaded(x), by_parts)


def kinds() -> list:
    """Modules with their arguments, for 5 rows and for 3."""
    cases = []
    options = {"weight_offset": 1, "casting_mode": "llama"}
    for norm, shape, dtype in (
        (RMSNorm(N), (N,), torch.float32),
        (RMSNorm((4, 6), bias=True), (4, 6), torch.float32),
        (RMSNorm(N, elementwise_affine=False, eps=1e-3), (N,), torch.float64),
        (PRMSNorm(N, 0.3, **options), (N,), torch.bfloat16),
        (AddRMSNorm((4, 6), bias=True), (4, 6), torch.bfloat16),
    ):
        count = 1 + isinstance(norm, AddRMSNorm)
        args = [[numbers((n, *shape), dtype, "cpu", i) for i in range(count)] for n in (5, 3)]
        cases.append(pytest.param(norm, *args, id=f"{norm} {dtype}"))
    return cases


def assert_same_calls(actual, norm, args):
    y, expected = actual(*args), norm(*args)
    y, expected = ((t,) if isinstance(t, torch.Tensor) else t for t in (y, expected))
    assert all(same_bits(a, e) for a, e in zip(y, expected, strict=True))


def through_a_file(scripted):
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize(("norm", "args", "others"), kinds())
def test_jit_trace(norm, args, others):
    """Traced, saved and loaded: for other batch sizes, too, and with gradients."""
    traced = through_a_file(torch.jit.trace(norm, tuple(args)))
    assert "fused_rmsnorm::" in str(traced.inlined_graph)
    for given in (args, others):
        assert_same_calls(traced, norm, given)


@pytest.mark.parametrize(("norm", "args", "others"), kinds())
def test_jit_script(norm, args, others):
    """Compiled from source as torch.nn.RMSNorm is; also saved, loaded and frozen."""
    scripted = torch.jit.script(norm)
    assert list(scripted.state_dict()) == list(norm.state_dict())
    loaded = through_a_file(scripted)
    frozen = torch.jit.freeze(copy.deepcopy(loaded).eval())
    for function in (scripted, loaded, frozen):
        for given in (args, others, args):  # the profiling executor specialises after some calls
            assert_same_calls(function, norm, given)


WRONG_SHAPES = {
    "as many elements": (RMSNorm((4, 6)), [(3, 6, 4)], "input"),
    "no weight to compare with": (RMSNorm(8, elementwise_affine=False), [(3, 7)], "input"),
    "whole groups": (RMSNorm(8, group_size=4, elementwise_affine=False), [(3, 12)], "input"),
    "a residual": (AddRMSNorm((4, 6)), [(3, 4, 6), (3, 6, 4)], "residual"),
    "a gate": (RMSNormGated((4, 6)), [(3, 4, 6), (3, 6, 4)], "gate"),
    "too few dimensions": (RMSNorm((4, 6)), [(24,)], "input"),
}


@pytest.mark.parametrize("kind", WRONG_SHAPES)
def test_jit_script_refuses_what_eager_mode_refuses(kind):
    norm, shapes, name = WRONG_SHAPES[kind]
    args = [torch.ones(shape) for shape in shapes]
    message = rf"{name} must end in normalized_shape \[.*\], but has shape \[.*\]"
    with pytest.raises(RuntimeError, match=message):
        norm(*args)
    with pytest.raises(torch.jit.Error, match=message):  # what TorchScript makes of it
        torch.jit.script(norm)(*args)


def test_jit_script_of_a_model():
    """torch.jit.script leaves what it compiled in place of the module: the model has to stay what
    it was, with its parameters, bits, gradients and fuse mode."""
    model = nn.Sequential(nn.Linear(N, N), RMSNorm(N), PRMSNorm(N, compile_mode="fuse"))
    before = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    x = rows(5)
    expected = torch.autograd.grad(model(x).sin().sum(), model.parameters())
    scripted = torch.jit.script(model)
    assert same_bits(scripted(x), before(x))
    for m in (scripted, model):
        for a, e in zip(
            torch.autograd.grad(m(x).sin().sum(), m.parameters()), expected, strict=True
        ):
            assert same_bits(a, e)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(isinstance(m, RMSNorm) for m in model[1:])
    assert same_bits(copy.deepcopy(model)(x), before(x))
    torch._dynamo.reset()
    graph = torch.export.export(model, (x,)).graph
    assert ours(graph) == ["rms_norm.default", "rms_norm_composite.default"]


@pytest.mark.parametrize("kind", [RMSNorm, PRMSNorm, AddRMSNorm, RMSNormGated])
def test_jit_script_leaves_a_module_of_its_class(kind):
    model = nn.ModuleDict({"norm": kind(N)})
    text = repr(model)
    torch.jit.script(model)
    assert isinstance(model["norm"], kind)
    assert repr(model) == text


def test_jit_script_of_an_operator():
    @torch.jit.script
    def norm(x: torch.Tensor, w: torch.Tensor):
        return torch.ops.fused_rmsnorm.rms_norm(x, w, None, 1e-5, 0.3, 0.0, "torch")

    x, w = rows(5), rows(1)[0]
    assert same_bits(norm(x, w), F.rms_norm(x, N, w, 1e-5, p=0.3))


def test_jit_script_of_a_derived_class():
    """With a forward of its own it scripts if that does, and is not replaced by ours."""

    class Doubled(RMSNorm):
        bias: torch.Tensor | None

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return torch.ops.fused_rmsnorm.rms_norm(input, self.weight * 2)

    norm = Doubled(N)
    x = rows(5)
    assert same_bits(torch.jit.script(norm)(x), norm(x))


def test_fx_symbolic_trace():
    """The functions are leaves, by their own names, as torch.nn.functional's are."""
    model = Block()
    traced = torch.fx.symbolic_trace(model)
    called = [n.target for n in traced.graph.nodes if n.op == "call_function"]
    assert [f for f in called if f in (F.rms_norm, F.add_rms_norm)] == [
        F.rms_norm,
        F.rms_norm,
        F.add_rms_norm,
    ]
    assert_same(traced, model)
    traced.graph.lint()
    traced.recompile()
    assert_same(copy.deepcopy(traced), model)
    leaf = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(N, N), RMSNorm(N)))
    assert "fused_rmsnorm.functional.rms_norm" in str(leaf.graph)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode):
    """The operators by name, forward and backward."""
    norm = AddRMSNorm(N)

    def gradients(x, w):
        y, s = F.add_rms_norm(x, x.sin(), N, w)
        return torch.autograd.grad((y + s).sum(), (x, w))

    x = rows(5).requires_grad_()
    graph = make_fx(gradients, tracing_mode=mode)(x, norm.weight)
    assert ours(graph.graph) == ["add_rms_norm_fwd.default", "rms_norm_bwd.default"]
    for a, e in zip(graph(x, norm.weight), gradients(x, norm.weight), strict=True):
        assert same_bits(a, e)


def test_import_says_nothing_of_torchscript():
    """The stand-ins for torch.jit.script are made when it asks for them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fused_rmsnorm.RMSNorm(N)(rows(2)).shape == (2, N)
