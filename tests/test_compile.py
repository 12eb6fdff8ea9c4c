"""torch.compile: whole graphs, the bits of eager mode, and the mode that shows plain operations."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from fused_rmsnorm import AddRMSNorm, RMSNorm


def operators_compiled(norm: torch.nn.Module, x: torch.Tensor) -> set[str]:
    """What a compiler such as Inductor is handed for one forward and backward."""
    torch._dynamo.reset()
    seen = set()

    def collect(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        seen.update(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    backend = aot_autograd(fw_compiler=collect, bw_compiler=collect)
    y = torch.compile(norm, fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(y, norm(x))
    y.sum().backward()
    return seen


@pytest.mark.parametrize("options", [{}, {"p": 0.25}, {"casting_mode": "llama"}, {"bias": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opaque_mode_has_the_bits_of_eager(options: dict, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    norm = RMSNorm(999, **options).to(dtype)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    x = torch.randn(64, 999).to(dtype).requires_grad_()
    dy = torch.randn(64, 999).to(dtype)
    want, got = norm(x), compiled(x)
    assert torch.equal(got, want)
    inputs = (x, *norm.parameters())
    grads = zip(*(torch.autograd.grad(y, inputs, dy) for y in (got, want)), strict=True)
    assert all(torch.equal(a, b) for a, b in grads)


def test_inductor_and_dynamic_batches() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    norm = AddRMSNorm(32)
    compiled = torch.compile(norm, fullgraph=True, backend=counter)
    for rows in (3, 5, 8, 13):
        x, residual = torch.randn(rows, 32), torch.randn(rows, 32)
        for a, b in zip(compiled(x, residual), norm(x, residual), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count <= 2  # one recompile, for a batch size that varies


def test_opaque_mode_keeps_the_fused_operators() -> None:
    seen = operators_compiled(RMSNorm(32), torch.randn(4, 32, requires_grad=True))
    assert {"fused_rmsnorm.rms_norm_fwd.default", "fused_rmsnorm.rms_norm_bwd.default"} <= seen


def test_fuse_mode_shows_plain_operations() -> None:
    norm = RMSNorm(32, compile_mode="fuse")
    seen = operators_compiled(norm, torch.randn(4, 32, requires_grad=True))
    assert seen
    assert all(name.startswith(("aten.", "prims.")) or "getitem" in name for name in seen)
