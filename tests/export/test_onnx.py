"""ONNX export, run by onnxruntime: the standard operator, or the arithmetic written out."""

import logging

import pytest
import torch
from cases import numbers
from reference import Options, assert_forward
from torch import nn

from fused_rmsnorm import AddRMSNorm, RMSNorm, RMSNormGated
from fused_rmsnorm import functional as F

pytest.importorskip("onnxscript", reason="ONNX export needs onnxscript")
pytest.importorskip("onnxruntime", reason="what was exported is run by onnxruntime")

from fused_rmsnorm.onnx import translation_table

N = 24


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)  # the exporter reports what else is not installed
    yield
    logging.disable(logging.NOTSET)


def export(module, args, opset):
    rows = {0: torch.export.Dim.DYNAMIC}
    return torch.onnx.export(
        module.eval(),
        args,
        dynamo=True,
        opset_version=opset,
        verbose=False,
        dynamic_shapes=tuple(rows for _ in args),
        custom_translation_table=translation_table(opset),
    )


def kinds(program) -> list[str]:
    assert {n.domain for n in program.model_proto.graph.node} == {""}  # torch's and ours inlined
    return [n.op_type for n in program.model_proto.graph.node]


CASES = [
    (23, torch.float32, torch.float32, {}),
    (23, torch.bfloat16, torch.bfloat16, {"eps": 1e-3, "weight_offset": 1.0}),
    (23, torch.float16, torch.float32, {"casting_mode": "llama"}),
    (23, torch.bfloat16, torch.float32, {"bias": True}),
    (23, torch.float64, torch.float64, {"bias": True}),
    (23, torch.float32, torch.float32, {"p": 0.07}),
    (23, torch.float32, torch.float32, {"elementwise_affine": False}),
    (18, torch.float32, torch.float32, {}),
    (18, torch.bfloat16, torch.bfloat16, {"casting_mode": "llama", "weight_offset": 1.0}),
    (18, torch.float16, torch.float16, {"p": 0.5, "bias": True, "eps": 0.1}),
]


@pytest.mark.parametrize(("opset", "dtype", "weight_type", "settings"), CASES, ids=str)
def test_numbers(opset, dtype, weight_type, settings):
    """Another number of rows than at export; within the same error bound as the kernels."""
    norm = RMSNorm(N, **settings).to(weight_type)
    for i, parameter in enumerate(norm.parameters()):
        nn.init.zeros_(parameter).data.add_(numbers(N, weight_type, "cpu", i))
    program = export(norm, (numbers((3, 2, N), dtype, "cpu", 0),), opset)
    x = numbers((5, 2, N), dtype, "cpu", 1)
    x[0] *= 1e-2  # where eps counts
    (y,) = program(x)
    names = Options.__dataclass_fields__.keys() & settings.keys()
    assert_forward(y, x, norm.weight, norm.bias, Options(**{k: settings[k] for k in names}))
    standard = opset >= 23 and dtype != torch.float64 and "p" not in settings
    assert kinds(program).count("RMSNormalization") == standard
    assert ("ReduceMean" in kinds(program)) != standard


def test_plain_norm_is_one_standard_operator():
    """As torch.nn.RMSNorm exports; nothing is left of rstd."""
    ours, native = (export(m, (torch.ones(3, N),), 23) for m in (RMSNorm(N), nn.RMSNorm(N)))
    assert kinds(ours) == kinds(native) == ["RMSNormalization"]


def test_a_block_and_the_fused_add():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = AddRMSNorm(N, eps=1e-5), nn.Linear(N, N)
            self.last = RMSNorm((2, N // 2))

        def forward(self, x, residual):
            y, residual = self.norm(x, residual)
            return self.last((self.linear(y) + residual).unflatten(-1, (2, N // 2))), residual

    torch.manual_seed(0)
    block = Block()
    nn.init.normal_(block.norm.weight)
    example, x = ([numbers((rows, N), torch.float32, "cpu", i) for i in (0, 1)] for rows in (3, 5))
    program = export(block, tuple(example), 23)
    assert kinds(program).count("RMSNormalization") == 2
    y, s = program(*x)
    torch.testing.assert_close(s, x[0] + x[1], rtol=0, atol=0)
    exact = block.double()(*(t.double() for t in x))[0]
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("opset", [18, 23])
def test_the_sum_is_rounded_before_it_is_normalised(opset):
    x, residual = (numbers((5, N), torch.bfloat16, "cpu", i) for i in (0, 1))
    y, s = export(AddRMSNorm(N, elementwise_affine=False), (x[:3], residual[:3]), opset)(
        x, residual
    )
    assert torch.equal(s, x + residual)
    assert_forward(y, x + residual, None, None, Options())


@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize(
    ("opset", "dtype", "weight_type", "settings"),
    [
        (23, torch.float32, torch.float32, {"bias": True}),
        (23, torch.bfloat16, torch.float32, {"casting_mode": "llama", "activation": "sigmoid"}),
        (18, torch.float16, torch.float16, {"casting_mode": "llama", "p": 0.5}),
        (18, torch.float64, torch.float64, {"group_size": 8, "weight_offset": 1.0}),
    ],
    ids=str,
)
def test_gated(opset, dtype, weight_type, settings, norm_before_gate):
    norm = RMSNormGated(N, norm_before_gate=norm_before_gate, **settings).to(weight_type)
    nn.init.normal_(norm.weight)
    example, x = ([numbers((rows, N), dtype, "cpu", i) for i in (0, 1)] for rows in (3, 5))
    (y,) = export(norm, tuple(example), opset)(*x)
    unit = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, norm(*x).detach(), rtol=unit, atol=unit)


@pytest.mark.parametrize("mode", ["torch", "llama"])
@pytest.mark.parametrize("opset", [18, 23])
def test_rows_of_weight_and_a_wider_residual(opset, mode):
    """Llama's rounding is none of a sum wider than the input."""

    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(numbers((2, N), torch.float32, "cpu", 5))
            self.add = AddRMSNorm(N, casting_mode=mode)

        def forward(self, x, residual):
            y, s = self.add(x, residual)
            return F.rms_norm(y, N, self.weight), s

    norms = Norms()
    x = numbers((4, 2, N), torch.bfloat16, "cpu", 0)
    r = numbers((4, 2, N), torch.float32, "cpu", 1)
    y, s = export(norms, (x, r), opset)(x, r)
    expected = norms(x, r)
    assert torch.equal(s, expected[1])
    rounded = y.dtype == torch.bfloat16  # else fp32, as nothing rounds it
    unit = 2**-7 if rounded else 1e-5
    torch.testing.assert_close(y, expected[0].detach(), rtol=unit, atol=unit)


def test_without_the_table():
    """The exporter names the operator that it does not know."""
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=r"fused_rmsnorm\.rms_norm_fwd"):
        torch.onnx.export(RMSNorm(N).eval(), (torch.ones(3, N),), dynamo=True, verbose=False)
