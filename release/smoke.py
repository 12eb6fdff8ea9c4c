"""Does an installed fused_rmsnorm work with this torch? Forward, backward, compile, state dict.

Run by release/wheel.py in fresh environments, and by release/matrix.py: python smoke.py MINOR
"""

import sys
import time

start = time.perf_counter()
import torch  # noqa: E402

torch_loaded = time.perf_counter()
import fused_rmsnorm  # noqa: E402
from fused_rmsnorm import functional  # noqa: E402

loaded = time.perf_counter()


def definition(
    x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor, k: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """y, dx and dw of RMSNorm over the first ``k`` numbers of each row, computed in ``dtype``."""
    x, w = (t.detach().to(dtype).requires_grad_() for t in (x, w))
    y = x * torch.rsqrt(x[..., :k].square().mean(-1, keepdim=True) + 1e-6) * w
    return [y.detach(), *torch.autograd.grad(y, (x, w), dy.to(dtype))]


def forward_and_backward(dtype: torch.dtype) -> None:
    """One rounding to ``dtype``, before it an error like PyTorch's own in the arithmetic type."""
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    for n, p in ((128, None), (1000, 0.0625), (4097, None)):
        k = n if p is None else -(-n // 16)
        x = torch.randn(33, n).to(dtype).requires_grad_()
        w = torch.rand(n).add(0.5).to(dtype).requires_grad_()
        dy = torch.randn(33, n).to(dtype)
        y = functional.rms_norm(x, n, w, 1e-6, p=p)
        got = [y.detach(), *torch.autograd.grad(y, (x, w), dy)]
        composed = definition(x, w, dy, k, arithmetic)
        exact = definition(x, w, dy, k, torch.float64)
        for name, ours, theirs, want in zip(("y", "dx", "dw"), got, composed, exact, strict=True):
            errors = ((t.double() - want).abs().max() / want.abs().max() for t in (ours, theirs))
            error, own = (e.item() for e in errors)
            limit = torch.finfo(dtype).eps + 2 * max(own, torch.finfo(arithmetic).eps)
            assert ours.dtype == dtype
            assert error <= limit, f"{name} of {n} {dtype}: error {error:.2e}, limit {limit:.2e}"


def compiled() -> None:
    norm = fused_rmsnorm.AddRMSNorm(256)
    x, residual = torch.randn(7, 256, requires_grad=True), torch.randn(7, 256)
    results = []
    for f in (norm, torch.compile(norm, fullgraph=True)):
        y, s = f(x, residual)
        results.append((y, s, *torch.autograd.grad((y * s).sum(), (x, norm.weight))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), (
        "compiled differs from eager"
    )


def state_dict() -> None:
    theirs, ours = torch.nn.RMSNorm(48, eps=1e-5), fused_rmsnorm.RMSNorm(48, eps=1e-5)
    torch.nn.init.uniform_(theirs.weight)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert isinstance(ours, torch.nn.RMSNorm)
    x = torch.randn(5, 48)
    torch.testing.assert_close(ours(x), theirs(x))


def main(minor: str) -> None:
    info = fused_rmsnorm.build_info()
    assert torch.__version__.startswith(minor + "."), torch.__version__
    assert str(info["torch"]).startswith(minor + "."), info
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        forward_and_backward(dtype)
    compiled()
    state_dict()
    print(
        f"torch {torch.__version__} (CUDA {torch.version.cuda}), operators built against "
        f"{info['torch']}, {info['cpu_capability']}: forward, backward, compile, state dict right; "
        f"import {1e3 * (loaded - torch_loaded):.0f} ms after torch's {torch_loaded - start:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1])
