"""benchmarks.gated, in a small form."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gated import __main__ as gated


def test_runs_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--cases", "qwen3", "--dtypes", "float32", "--tokens", "4", "--seconds", "0.01"]
    assert gated.main([*args, "--out", str(tmp_path)]) == 0
    entries = json.loads((tmp_path / "gated.json").read_text())["entries"]
    assert len(entries) == len(gated.DIRECTIONS)
    assert all(set(e["times"]) == set(gated.NAMES) for e in entries.values())
    text = (tmp_path / "gated.md").read_text()
    assert text in capsys.readouterr().out
    assert sum(line.startswith("| qwen3 ") for line in text.splitlines()) == 2


def test_refuses_to_time_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    composed, _, shapes = gated.CASES["heads"]
    wrong = lambda x, w: composed(x, w) * 1.001  # noqa: E731
    monkeypatch.setitem(gated.CASES, "heads", (composed, wrong, shapes))
    with pytest.raises(RuntimeError, match="fused is not the same function"):
        gated.time_case("heads", "forward", torch.float32, torch.device("cpu"), 0.01, 4)
