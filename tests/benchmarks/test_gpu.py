"""``make gpu`` without a GPU: every stage in its small form, stages that fail, and machines that
lack a program or a package."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

import fused_rmsnorm

gpu = pytest.importorskip(
    "benchmarks.gpu.__main__", reason="needs the repository's root on the path"
)


UNHURRIED = ("--limit", "7200")  # the machine may be busy with other things


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
    assert gpu.main(["--cpu", *stages, *UNHURRIED, "--out", str(out)]) == 0
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


def test_small_form_of_the_first_minutes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Correctness, lines of bandwidth, what ran where; and a second run has nothing left to do."""
    stages = ["--stages", "first", "host", "routes", *UNHURRIED, "--out", str(tmp_path)]
    assert gpu.main(["--cpu", *stages]) == 0
    parts = outcome(tmp_path)
    assert list(parts) == [
        *("first/check", "first/bandwidth", "host"),
        *("routes/as-installed/kernels", "routes/as-installed/bench"),
        *("routes/torch-aten/kernels", "routes/torch-aten/bench"),
    ]
    assert all(p["rc"] == 0 for p in parts.values()), parts
    assert "cases right, forward and backward, on cpu" in str(parts["first/check"]["output"])
    capsys.readouterr()
    for shape in ("4 × 64", "3 × 129"):
        assert str(parts["first/bandwidth"]["output"]).count(f"\n| {shape} | bfloat16 |") == 2
    for route in ("as-installed", "torch-aten"):
        output = str(parts[f"routes/{route}/kernels"]["output"])
        ran = json.loads(output[output.index("{\n") :])  # torch's profiler says something first
        assert ran["torch"] == torch.__version__
        assert any("rms_norm" in name for name in ran["F.rms_norm"])
        assert (tmp_path / "routes" / route / "norms.json").exists()
    assert gpu.main(["--cpu", "--go-on", *stages]) == 0
    assert "+ " not in capsys.readouterr().out


def test_the_first_stage_has_200_cases() -> None:
    assert len(set(gpu.FIRST)) * 2 * 4 == 200


def test_routes_are_chosen_by_the_environment() -> None:
    """And by nothing else: the rest is as it was."""
    for name, settings in gpu.ROUTES.items():
        env = gpu.surroundings(f"routes/{name}/bench", cpu=True)
        plain = gpu.surroundings("bench", cpu=True)
        assert env == {**plain, **settings}
    (aten,) = (settings for name, settings in gpu.ROUTES.items() if name == "torch-aten")
    native = pytest.importorskip("torch._native.common_utils", reason="has no routes yet")
    code = f"import {native.__name__} as n; print(n.check_native_jit_disabled())"
    for settings, expected in (({}, "False"), (aten, "True")):
        done = gpu.run([sys.executable, "-c", code], 100, {**os.environ, **settings})
        assert done["output"].strip() == expected


def wheel(folder: Path, name: str, code: str) -> None:
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(path, text)


def test_wheels_are_carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed without a network, for the parts of this run alone."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    assert gpu.install(tmp_path, tmp_path / "site") == 1  # nothing there
    wheel(tmp_path, "carried_peer", "answer = 42\n")
    assert gpu.install(tmp_path, tmp_path / "site") == 0
    code = "import carried_peer; print(carried_peer.answer)"
    done = gpu.run([sys.executable, "-c", code], 100, gpu.surroundings("bench", cpu=True))
    assert done["output"] == "42\n"


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
    parts = dict(p for stage in ("test", "host") for p in gpu.commands(stage, gpu.parse([])))
    host = {a for a in parts["host"] if a.startswith("tests/")}
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


def test_the_parts_of_a_stage_share_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commands(stage: str, args: object):
        yield f"{stage}/a", ["sh", "-c", "sleep 30; true"]
        yield f"{stage}/b", ["sh", "-c", "sleep 30; true"]

    monkeypatch.setattr(gpu, "commands", commands)
    begun = time.monotonic()
    assert gpu.main(["--cpu", "--stages", "bench", "--limit", "1", "--out", str(tmp_path)]) == 1
    assert {name: p["rc"] for name, p in outcome(tmp_path).items()} == {
        "bench/a": None,
        "bench/b": None,
    }
    assert time.monotonic() - begun < 25


def test_a_missing_tool_is_a_failed_stage() -> None:
    done = gpu.run(["no-such-compute-sanitizer"], limit=5)
    assert done["rc"] == 127
    assert "no-such-compute-sanitizer" in done["output"]


def test_the_probe_finds_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    import fused_rmsnorm.functional as ours

    norm, add, gated = ours.rms_norm, ours.add_rms_norm, ours.rms_norm_gated

    def wrong_rows(x: torch.Tensor, n: int, w: torch.Tensor, *a: object, **k: object) -> object:
        return norm(x, n, w.flip(0) if w.dim() > 1 else w, *a, **k)

    gpu.probe("cpu", (100,))
    for name, wrong, said in (
        ("rms_norm", lambda *a, **k: norm(*a, **k) * 1.01, r"y of \(35, 2, 100\).* plain"),
        ("rms_norm", wrong_rows, "per sample"),
        ("add_rms_norm", lambda *a, **k: add(*a, **{**k, "p": None}), "in wider rows"),
        ("rms_norm_gated", lambda x, z, *a, **k: gated(x, z * 1.02, *a, **k), "before a gate"),
    ):
        with monkeypatch.context() as m:
            m.setattr(ours, name, wrong)
            with pytest.raises(RuntimeError, match=said):
                gpu.probe("cpu", (100,))


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
