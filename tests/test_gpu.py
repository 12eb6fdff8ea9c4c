"""``make gpu`` without a GPU: every stage in its small form, and stages that fail."""

import json
from pathlib import Path

import pytest
import torch

gpu = pytest.importorskip("benchmarks.gpu", reason="needs the repository's root on the path")


def outcome(folder: Path) -> dict[str, dict[str, object]]:
    return json.loads((folder / "gpu.json").read_text())["parts"]


def test_small_form_of_the_later_stages(tmp_path: Path) -> None:
    assert (
        gpu.main(["--cpu", "--stages", "sanitize", "bench", "paper", "--out", str(tmp_path)]) == 0
    )
    parts = outcome(tmp_path)
    assert list(parts) == ["sanitize/none", "bench", "paper"]
    assert all(p["rc"] == 0 for p in parts.values())
    speeds = json.loads((tmp_path / "norms.json").read_text())["entries"]
    assert {e["n"] for k, e in speeds.items() if k.startswith("speed/")} == {64, 129}
    assert "| F.layer_norm | F.rms_norm |" in (tmp_path / "norms.md").read_text()
    assert (tmp_path / "speed.png").exists()
    assert "DNA 1-D CNN" in (tmp_path / "paper.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "no GPU" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_stage_over_its_limit_fails_and_the_next_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commands(stage: str, cpu: bool, seconds: float, out: Path):
        yield stage, ["sleep", "30"] if stage == "test" else ["true"]

    monkeypatch.setattr(gpu, "commands", commands)
    stages = ["--stages", "test", "bench", "--limit", "0.2"]
    assert gpu.main(["--cpu", *stages, "--out", str(tmp_path)]) == 1
    assert {name: p["rc"] for name, p in outcome(tmp_path).items()} == {"test": None, "bench": 0}


def test_a_missing_tool_is_a_failed_stage() -> None:
    done = gpu.run(["no-such-compute-sanitizer"], limit=5)
    assert done["rc"] == 127
    assert "no-such-compute-sanitizer" in done["output"]


def test_the_probe_finds_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    import fused_rmsnorm.functional as ours

    right = ours.rms_norm
    monkeypatch.setattr(gpu, "PROBED", (100,))
    gpu.probe("cpu")
    monkeypatch.setattr(ours, "rms_norm", lambda *args: right(*args) * 1.01)
    with pytest.raises(RuntimeError, match="y of 70 x 100"):
        gpu.probe("cpu")
