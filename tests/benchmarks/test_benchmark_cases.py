"""What the norms are timed on and against: variants of a case, rotation, the peers' adapters."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

bench_norms = pytest.importorskip(
    "benchmarks.norms.__main__", reason="needs the repository's root on the path"
)

from benchmarks.harness.results import load  # noqa: E402
from benchmarks.harness.timing import Contender, Timing  # noqa: E402
from benchmarks.norms import cases, peers, report, speed  # noqa: E402

BOTH = ("forward", "forward+backward")

# --- variants of a case


def timed(
    monkeypatch: pytest.MonkeyPatch, *case: object, compiled: bool = False, **variant: object
) -> tuple[dict[str, object], dict[str, Contender]]:
    """The entry of a case in bfloat16, and the contenders that would have been timed."""
    contenders: list[Contender] = []

    def called(given, **_):
        contenders.extend(given)
        return {c.name: [c.call(i) for i in c.inputs] and Timing(1, 1, 1, 0, 1, 1) for c in given}

    monkeypatch.setattr(speed, "measure", called)
    kind, rows, n, direction = case
    made = cases.Case(kind, rows, n, torch.bfloat16, direction, 1, compiled, **variant)
    entry = speed.time_case(made, torch.device("cpu"), 0.0)
    return {"key": made.key, **entry}, {c.name: c for c in contenders}


@pytest.mark.parametrize(("kind", "row_sets"), [("speed", (2, 3)), ("add", (4, 4))])
def test_fp32_weights_of_half_precision_inputs(monkeypatch, kind, row_sets) -> None:
    entry, contenders = timed(monkeypatch, kind, 6, 40, "forward+backward", weight="float32")
    assert entry["key"] == f"{kind}/1t/bfloat16/6x40/forward+backward/weight-float32"
    # twice rstd; the weight in fp32, twice, and its gradient
    assert entry["bytes"] == sum(row_sets) * 6 * 40 * 2 + 2 * 4 * 6 + 3 * 40 * 4
    assert report.row_name(entry) == "6 × 40, fp32 weight"
    ours = contenders["add_rms_norm" if kind == "add" else "rms_norm"]
    *inputs, w, b = ours.inputs[0].args
    assert {x.dtype for x in inputs} == {torch.bfloat16}
    assert w.dtype == b.dtype == torch.float32
    assert not torch.equal(w, w.bfloat16().float())  # values that bfloat16 does not have
    *_, dw = ours.call(ours.inputs[0])
    w = w.detach().double().requires_grad_()
    outs = speed._definition(inputs[0].double(), *inputs[1:], w, b, k=40)
    (want,) = torch.autograd.grad(outs, w, [g.double() for g in ours.inputs[0].grads])
    torch.testing.assert_close(dw.double(), want, rtol=1e-5, atol=1e-5)


def test_a_backward_is_timed_on_one_graph_again_and_again(monkeypatch) -> None:
    """Also a compiled one, which by default gives its buffers away (at 32 x 512; not at 6 x 40)."""
    _, contenders = timed(monkeypatch, "speed", 32, 512, "backward", compiled=True)
    want, found = contenders["torch_rms_norm"], contenders["compiled_rms_norm"]
    for _ in range(2):
        dx, dw = found.call(found.inputs[0])
        want_dx, want_dw = want.call(want.inputs[0])
        torch.testing.assert_close(dx, want_dx, rtol=3e-2, atol=3e-2)
        torch.testing.assert_close(dw, want_dw, rtol=3e-2, atol=0.3)  # torch's sums 32 rows in bf16


def test_a_layer_norm_that_takes_no_fp32_weight_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def layer_norm(x, shape, weight, bias, eps):
        raise RuntimeError("expected scalar type BFloat16 but found Float\nand more")

    monkeypatch.setattr(speed.F, "layer_norm", layer_norm)
    entry, contenders = timed(monkeypatch, "speed", 6, 40, "forward", weight="float32")
    message = "RuntimeError: expected scalar type BFloat16 but found Float"
    assert entry["failed"] == {"torch_layer_norm": message}
    assert "torch_layer_norm" not in contenders
    with pytest.raises(RuntimeError, match="expected scalar type"):
        timed(monkeypatch, "speed", 6, 40, "forward")


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_queries_of_packed_tokens(monkeypatch: pytest.MonkeyPatch, direction: str) -> None:
    heads = cases.HEADS
    entry, contenders = timed(monkeypatch, "speed", 5 * heads, 64, direction, layout="packed")
    assert entry["key"] == f"speed/1t/bfloat16/{5 * heads}x64/{direction}/packed"
    assert report.row_name(entry) == f"{5 * heads} × 64, packed QKV"
    plain, _ = timed(monkeypatch, "speed", 5 * heads, 64, direction)
    assert entry["bytes"] == plain["bytes"]
    assert plain["key"] == f"speed/1t/bfloat16/{5 * heads}x64/{direction}"
    assert report.row_name(plain) == f"{5 * heads} × 64"
    for name, c in contenders.items():
        x = c.inputs[0] if name == "clone" else c.inputs[0].args[0]
        assert (x.shape, x.stride()) == ((5, heads, 64), (3 * heads * 64, 64, 1))
        if name == "clone":
            assert torch.equal(c.call(x), x)
    assert "memcpy" not in contenders  # copies contiguous bytes
    with pytest.raises(ValueError, match=f"multiple of {heads}"):
        cases.Case("speed", 7, 64, torch.float32, "forward", 1, False, layout="packed")


def test_a_wrong_kernel_for_views_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    import fused_rmsnorm.functional as ours

    right = ours.rms_norm
    wrong = lambda x, *a, **k: right(x, *a, **k) * (1 if x.is_contiguous() else 1.05)  # noqa: E731
    monkeypatch.setattr(ours, "rms_norm", wrong)
    timed(monkeypatch, "speed", 48, 64, "forward")
    with pytest.raises(RuntimeError, match="wrong result"):
        timed(monkeypatch, "speed", 48, 64, "forward", layout="packed")


def test_the_grids_that_have_variants(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_norms, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(bench_norms, "time_case", lambda *_: {"times": {}})
    monkeypatch.setattr(bench_norms.report, "write", lambda path: "")

    def keys(part: str, *argv: str) -> list[str]:
        options = ["--threads", "1", "--out", str(tmp_path), "--only", part]
        assert bench_norms.main([*options, *argv]) == 0
        entries = load(tmp_path / "norms.json")["entries"]
        return [key for key in entries if "packed" in key or "weight" in key]

    assert keys("speed") == keys("add", "--gpu") == keys("speed", "--gpu", "--grid", "edges") == []
    assert keys("speed", "--full", "--dtypes", "float32") == []
    assert keys("speed", "--full") == [f"speed/1t/bfloat16/49152x128/{d}/packed" for d in BOTH]
    assert keys("speed", "--gpu") == [
        f"speed/1t/bfloat16/{shape}/{d}/{variant}"
        for shape, variant in (
            ("32768x4096", "weight-float32"),
            ("32768x8192", "weight-float32"),
            ("648720x64", "packed"),
            ("648720x128", "packed"),
        )
        for d in BOTH
    ]


def test_what_could_not_be_timed_is_reported() -> None:
    def entry(n: int, **failed: str) -> dict[str, object]:
        return {"rows": 8, "n": n, "dtype": "float32", "direction": "forward", "failed": failed}

    entries = {
        "speed/a": entry(1, quack="odd"),
        "speed/b": entry(2) | {"layout": "packed"},
        "speed/c": entry(3, quack="odd", torch_layer_norm="dtype") | {"weight": "float32"},
        "add/d": entry(4, quack="even"),
    }
    assert report.failures({"entries": entries}) == [
        "- quack, 8 × 1 float32 forward and 1 more: odd",
        "- F.layer_norm, 8 × 3, fp32 weight float32 forward: dtype",
        "- quack, 8 × 4 float32 forward: even",
    ]


def test_what_rotates_past_the_cache_of_a_gpu() -> None:
    gpu = torch.device("cuda")
    mib = 1 << 20
    assert speed._sets(1024, 2 * mib, gpu) == 64  # memory-bound, though small
    assert speed._sets(1024, 4 * mib, gpu) == 32
    assert speed._sets(989, 2 * mib, gpu) == 2  # inference: the latency decides
    assert speed._sets(1, 8192, gpu) == 4
    assert speed._sets(99, 32 * mib, gpu) == 4
    assert speed._sets(32768, 1024 * mib, gpu) == 2
    assert speed._sets(4096, 64 << 10, gpu) == 256


# --- peers, none of which can be imported here


def composed(x, w, eps, offset=0.0):
    return (x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps)).to(
        x.dtype
    ) * (w + offset)


def fake_peers() -> dict[str, SimpleNamespace]:
    """Modules with the functions that the adapters call, and their signatures of 2026."""

    class LigerRMSNormFunction:
        @staticmethod
        def apply(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
            assert (casting_mode, in_place) == ("llama", False)
            return composed(X, W, eps, offset)

    class LigerFusedAddRMSNormFunction:
        @staticmethod
        def apply(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=False, row_mode=None):
            assert (casting_mode, in_place) == ("llama", False)
            return composed(X + R, W, eps, offset), X + R

    def rmsnorm_of_quack(
        x,
        weight=None,
        bias=None,
        residual=None,
        out_dtype=None,
        residual_dtype=None,
        eps=1e-6,
        prenorm=False,
    ):
        assert bias is out_dtype is residual_dtype is None
        total = x if residual is None else x + residual
        y = composed(total, weight, eps)
        return (y, total) if prenorm and residual is not None else y

    def rms_norm_fn(
        x,
        weight,
        bias,
        residual=None,
        x1=None,
        weight1=None,
        bias1=None,
        eps=1e-6,
        dropout_p=0.0,
        rowscale=None,
        prenorm=False,
        residual_in_fp32=False,
        zero_centered_weight=False,
        return_dropout_mask=False,
        out_dtype=None,
        out=None,
        residual_out=None,
    ):
        assert x1 is weight1 is bias1 is rowscale is None
        return rmsnorm_of_quack(x, weight, bias, residual, eps=eps, prenorm=prenorm)

    @torch.no_grad()
    def rmsnorm_of_flashinfer(input, weight, eps=1e-6, out=None, enable_pdl=None):
        return composed(input, weight, eps)

    @torch.no_grad()
    def fused_add_rmsnorm(input, residual, weight, eps=1e-6, enable_pdl=None):
        residual += input
        input.copy_(composed(residual, weight, eps))

    return {
        "liger_kernel.ops.rms_norm": SimpleNamespace(LigerRMSNormFunction=LigerRMSNormFunction),
        "liger_kernel.ops.fused_add_rms_norm": SimpleNamespace(
            LigerFusedAddRMSNormFunction=LigerFusedAddRMSNormFunction
        ),
        "quack.rmsnorm": SimpleNamespace(rmsnorm=rmsnorm_of_quack),
        "flash_attn.ops.triton.layer_norm": SimpleNamespace(rms_norm_fn=rms_norm_fn),
        "flashinfer.norm": SimpleNamespace(
            rmsnorm=rmsnorm_of_flashinfer, fused_add_rmsnorm=fused_add_rmsnorm
        ),
    }


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("kind", ["speed", "add"])
def test_peers_are_called_as_they_are_defined(monkeypatch, kind, direction) -> None:
    for path, module in fake_peers().items():
        parts = path.split(".")
        for i in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(parts[i - 1]))
        monkeypatch.setitem(sys.modules, path, module)
    assert peers.absent() == {}
    on_gpu = speed._peers(kind, torch.device("cuda"))
    monkeypatch.setattr(speed, "_peers", lambda kind, device: on_gpu)
    entry, contenders = timed(monkeypatch, kind, 6, 40, direction)
    assert entry["failed"] == {}
    names = {"liger", "quack", "flash_attn"} | ({"flashinfer"} if direction == "forward" else set())
    assert set(report.OTHERS) & set(contenders) == names
    rms_norm = contenders["torch_rms_norm"]
    for name in names:
        assert entry["errors"][name] <= 2 * entry["errors"]["torch_rms_norm"]
        c = contenders[name]
        if name == "flashinfer":  # has no gradient; and the add has overwritten its arguments
            assert (c.inputs[0] is rms_norm.inputs[0]) == (kind == "speed")
            continue
        assert c.inputs[0] is rms_norm.inputs[0]
        got, want = (speed._outputs(k.call(k.inputs[0])) for k in (c, rms_norm))
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    first = speed._inputs(
        cases.Case(kind, 6, 40, torch.bfloat16, direction, 1, False), torch.device("cpu"), 1
    )[0]
    pairs = zip(rms_norm.inputs[0].args, first.args, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)  # of the others, nobody has
