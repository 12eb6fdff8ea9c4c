"""torch.compile: whole graphs, the bits of eager mode, and the mode that shows plain operations."""

import pytest
import torch

from fused_rmsnorm import AddRMSNorm, RMSNorm


@pytest.mark.parametrize("options", [{}, {"p": 0.25}, {"casting_mode": "llama"}, {"bias": True}])
def test_opaque_mode_has_the_bits_of_eager(options: dict) -> None:
    norm = RMSNorm(48, **options).bfloat16()
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 48).bfloat16().requires_grad_()
    dy = torch.randn(5, 48).bfloat16()
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


def test_fuse_mode_shows_plain_operations() -> None:
    torch._dynamo.reset()
    seen = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    norm = RMSNorm(32, compile_mode="fuse")
    x = torch.randn(4, 32)
    torch.testing.assert_close(torch.compile(norm, fullgraph=True, backend=backend)(x), norm(x))
    assert not any("rms_norm_fwd" in name or name.endswith("rms_norm.default") for name in seen)
