"""``make gpu`` without a GPU: every stage in its small form, stages that fail, and machines that
lack a program or a package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_rmsnorm

gpu = pytest.importorskip("benchmarks.gpu", reason="needs the repository's root on the path")


def outcome(folder: Path) -> dict[str, dict[str, object]]:
    return json.loads((folder / "gpu.json").read_text())["parts"]


def without(folder: Path, *modules: str) -> str:
    """A folder for PYTHONPATH in which these modules fail to import."""
    folder.mkdir()
    for name in modules:
        (folder / f"{name}.py").write_text("raise ModuleNotFoundError('hidden by a test')\n")
    return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def test_small_form_of_the_later_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without tqdm and matplotlib, whose stages then only lack a bar and plots."""
    monkeypatch.setenv("PYTHONPATH", without(tmp_path / "lacks", "tqdm", "matplotlib"))
    out = tmp_path / "out"
    stages = ["--stages", "paper", "bench", "test", "sanitize"]
    assert gpu.main(["--cpu", *stages, "--out", str(out)]) == 0
    parts = outcome(out)
    assert list(parts) == ["test/chosen", "sanitize/none", "bench", "paper"]  # in their order
    assert all(p["rc"] == 0 for p in parts.values()), parts
    assert "passed" in str(parts["test/chosen"]["output"])
    assert "no plots: matplotlib is not installed" in str(parts["bench"]["output"])
    entries = json.loads((out / "norms.json").read_text())["entries"]
    assert {e["n"] for k, e in entries.items() if k.startswith("speed/")} == {64, 129}
    assert {e["n"] for k, e in entries.items() if k.startswith("add/")} == {64, 129}
    assert (out / "norms.md").read_text().count("\n| 4 × 64") >= 4
    assert "DNA 1-D CNN" in (out / "paper.md").read_text()
    assert not list(out.glob("*.png"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "no GPU" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_without_a_build_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "LIBRARY", tmp_path / "missing.so")
    assert gpu.main(["--cpu", "--stages", "bench", "--out", str(tmp_path / "out")]) == 2
    assert "not built" in capsys.readouterr().out


def test_a_build_without_cuda_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests would pass on the CPU alone and nobody would know."""
    args = gpu.parse(["--stages", "build"])
    (_, compile_), (name, check) = gpu.commands("build", args)
    assert compile_[1:] == ["cmake/build.py"]
    assert gpu.surroundings("build/compile", cpu=False)["FUSED_RMSNORM_CUDA"] == "1"
    done = gpu.run(check, 100, gpu.surroundings(name, cpu=False))
    cuda = fused_rmsnorm.build_info()["cuda"]
    assert (done["rc"] == 0) == cuda
    assert ("built without CUDA" in done["output"]) != cuda


def test_the_whole_suite_is_run_in_parts() -> None:
    """Each test file by exactly one of them."""
    parts = dict(gpu.commands("test", gpu.parse([])))
    host = {a for a in parts["test/host"] if a.startswith("tests/")}
    assert host == {a.removeprefix("--ignore=") for a in parts["test/gpu"] if "--ignore" in a}
    assert host
    assert all((gpu.ROOT / path).exists() for path in host)
    assert not [a for a in parts["test/gpu"] if a.startswith("tests/")]


def test_a_stage_over_its_limit_fails_and_the_next_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commands(stage: str, args: object):
        yield stage, ["sh", "-c", "sleep 30; true"] if stage == "test" else ["true"]

    monkeypatch.setattr(gpu, "commands", commands)
    stages = ["--stages", "test", "bench", "--limit", "0.2"]
    assert gpu.main(["--cpu", *stages, "--out", str(tmp_path)]) == 1
    assert {name: p["rc"] for name, p in outcome(tmp_path).items()} == {"test": None, "bench": 0}
    assert float(str(outcome(tmp_path)["test"]["seconds"])) < 20  # what sh started is gone, too


def test_a_missing_tool_is_a_failed_stage() -> None:
    done = gpu.run(["no-such-compute-sanitizer"], limit=5)
    assert done["rc"] == 127
    assert "no-such-compute-sanitizer" in done["output"]


def test_the_probe_finds_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    import fused_rmsnorm.functional as ours

    norm, add = ours.rms_norm, ours.add_rms_norm
    monkeypatch.setattr(gpu, "PROBED", (100,))
    gpu.probe("cpu")
    with monkeypatch.context() as m:
        m.setattr(ours, "rms_norm", lambda *a, **k: norm(*a, **k) * 1.01)
        with pytest.raises(RuntimeError, match="y of 70 x 100"):
            gpu.probe("cpu")
    monkeypatch.setattr(ours, "add_rms_norm", lambda *a, **k: add(*a, **{**k, "p": None}))
    with pytest.raises(RuntimeError, match="in wider rows"):
        gpu.probe("cpu")


def ensure(folder: Path, text: str) -> "subprocess.CompletedProcess[str]":
    """With a pip that gets nothing, as without a network."""
    (folder / "wanted.txt").write_text(text)
    (folder / "pip.py").write_text("print('pip was asked')\nraise SystemExit(1)")
    return subprocess.run(
        [sys.executable, str(gpu.ROOT / "requirements" / "ensure.py"), str(folder / "wanted.txt")],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_requirements_that_are_there_need_no_pip(tmp_path: Path) -> None:
    done = ensure(tmp_path, "torch>=2.9  # 2.11 is more: by number, not by letter\n\npytest>=8\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_requirements_that_are_missing_are_named(tmp_path: Path) -> None:
    text = "pytest>=8\nno-such-a>=2.5\ntorch>=99\nno-such-b  # optional: no colours\n"
    done = ensure(tmp_path, text)
    assert done.returncode == 1
    assert "no-such-b is missing and cannot be installed: no colours" in done.stdout
    assert "(offline?): no-such-a>=2.5, torch>=99\n" in done.stderr
    done = ensure(tmp_path, "no-such-b  # optional: no colours\n")
    assert done.returncode == 0
    assert "pip was asked" in done.stdout
