"""benchmarks.gated, in a small form."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks.gated import __main__ as gated
from benchmarks.gated import pair


def test_runs_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--cases", "qwen3", "--dtypes", "float32", "--tokens", "4", "--seconds", "0.01"]
    assert gated.main([*args, "--out", str(tmp_path)]) == 0
    entries = json.loads((tmp_path / "gated.json").read_text())["entries"]
    assert len(entries) == len(gated.DIRECTIONS)
    assert all(set(e["times"]) == set(gated.NAMES) for e in entries.values())
    text = (tmp_path / "gated.md").read_text()
    assert text in capsys.readouterr().out
    assert sum(line.startswith("| qwen3 ") for line in text.splitlines()) == 2


def test_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--tokens", "1", "3", "--dtypes", "bfloat16", "--seconds", "0.01"]
    assert pair.main([*args, "--out", str(tmp_path)]) == 0
    entries = json.loads((tmp_path / "pair.json").read_text())["entries"]
    assert {(e["tokens"], e["direction"]) for e in entries.values()} == {
        (tokens, direction) for tokens in (1, 3) for direction in gated.DIRECTIONS
    }
    text = (tmp_path / "pair.md").read_text()
    assert text in capsys.readouterr().out
    assert sum(line.startswith(("| 1 ", "| 3 ")) for line in text.splitlines()) == 4


def test_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called by their own signatures; none where they are not installed."""
    seen = {}

    def rmsnorm_fn(x, weight, bias, z=None, eps=1e-5, group_size=None, norm_before_gate=True):
        seen["mamba_ssm"] = (bias, eps, group_size, norm_before_gate)
        return gated._mamba2(x, z, weight)

    def rms_norm_gated(x, g, weight, bias, activation="swish", eps=1e-5):
        seen["fla"] = (bias, activation, eps)
        return gated._qwen3(x, g, weight)

    for module, function in (
        ("mamba_ssm.ops.triton.layernorm_gated", rmsnorm_fn),
        ("fla.modules.fused_norm_gate", rms_norm_gated),
    ):
        for n in range(1, module.count(".") + 1):  # its packages
            package = ".".join(module.split(".")[:n])
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        made = types.ModuleType(module)
        setattr(made, function.__name__, function)
        monkeypatch.setitem(sys.modules, module, made)
    for case in ("mamba2", "qwen3"):
        composed, _, shapes = gated.CASES[case]
        tensors = [torch.randn(s) for s in shapes(4)]
        peer = gated.peer_of(case)
        assert peer
        torch.testing.assert_close(peer[1](*tensors), composed(*tensors))
    assert seen == {"mamba_ssm": (None, 1e-6, 512, False), "fla": (None, "swish", 1e-6)}
    assert gated.peer_of("heads") is None
    monkeypatch.setitem(sys.modules, "fla.modules.fused_norm_gate", None)
    assert gated.peer_of("qwen3") is None


def test_a_peer_has_a_column(tmp_path: Path) -> None:
    args = ["--cases", "qwen3", "--dtypes", "float32", "--tokens", "4", "--seconds", "0.01"]
    assert gated.main([*args, "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "gated.json").read_text())
    first, _ = data["entries"].values()
    first["times"]["fla"] = first["times"]["fused"]
    lines = gated.markdown(data).splitlines()
    (header,) = (line for line in lines if line.startswith("| norm "))
    assert header.endswith("| eager | compiled | fla |")
    ours = [line for line in lines if line.startswith("| qwen3 ")]
    assert ours[0].endswith("| 1.0 |")
    assert ours[1].endswith("|  |")


def test_refuses_to_time_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    composed, _, shapes = gated.CASES["heads"]
    wrong = lambda x, w: composed(x, w) * 1.001  # noqa: E731
    monkeypatch.setitem(gated.CASES, "heads", (composed, wrong, shapes))
    with pytest.raises(RuntimeError, match="fused is not the same function"):
        gated.time_case("heads", "forward", torch.float32, torch.device("cpu"), 0.01, 4)
