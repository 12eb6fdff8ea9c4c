"""The tools of a release, as far as they go without building one: release/ of the repository."""

import json
import runpy
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RELEASE = ROOT / "release"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(RELEASE))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return lambda name: runpy.run_path(str(RELEASE / f"{name}.py"))


def test_the_table_is_that_of_the_results(tool: Any) -> None:
    results = json.loads((ROOT / "docs" / "matrix.json").read_text())
    assert (ROOT / "docs" / "matrix.md").read_text() == tool("matrix")["render"](results)


def test_a_cell_that_failed_is_shown_as_such(tool: Any) -> None:
    cell = {"date": "2026-01-01", "note": "why"}
    shown = tool("matrix")["render"](
        {
            "g++-11": {**cell, "built": "NO", "run": "no"},
            "g++-12": {**cell, "built": "yes", "run": "NO"},
            "g++-13": {**cell, "built": "no", "run": "no"},
            "3.11/2.13": {**cell, "built": "yes", "run": "yes"},
            "3.12/2.13": {**cell, "built": "yes", "run": "no"},
        }
    )
    assert "| g++-11 | FAILED to build | not tried |" in shown
    assert "| g++-12 | built, FAILED | not tried |" in shown
    assert "| g++-13 | not here | not tried |" in shown
    assert "| Python 3.11 | not tried | not tried | built, run | not tried |" in shown
    assert "| Python 3.12 | not tried | not tried | built | not tried |" in shown


def wheel_of(path: Path, files: "dict[str, bytes]") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


GOOD = {
    "fused_rmsnorm/lib/torch-2.13/libfused_rmsnorm.so": b"ELF",
    "fused_rmsnorm/lib/torch-2.13/_eager.cpython-311-x86_64-linux-gnu.so": b"ELF",
}


@pytest.mark.parametrize(
    ("name", "others", "expected"),
    [
        ("x-manylinux_2_28_x86_64.whl", {}, None),
        ("x-linux_x86_64.whl", {}, "no manylinux tag"),
        ("x-manylinux_2_28_x86_64.whl", {"a.so": f"{ROOT}/csrc".encode()}, "names a path"),
        ("x-manylinux_2_28_x86_64.whl", {"x.libs/libc10.so": b""}, "other people's libraries"),
        (
            "x-manylinux_2_28_x86_64.whl",
            {"fused_rmsnorm/lib/torch-2.12/libfused_rmsnorm.so": b""},
            "torch-2.12",
        ),
    ],
)
def test_a_wheel_is_checked(
    tool: Any, tmp_path: Path, name: str, others: "dict[str, bytes]", expected: "str | None"
) -> None:
    wheel = tool("wheel")
    wheel["check"].__globals__["run"] = lambda *command: ""  # twine, which need not be here
    file = wheel_of(tmp_path / name, GOOD | others)
    if expected is None:
        wheel["check"](file, ["2.13"], [])
    else:
        with pytest.raises(AssertionError, match=expected):
            wheel["check"](file, ["2.13"], [])


def test_a_wheel_without_one_of_its_torches_is_refused(tool: Any, tmp_path: Path) -> None:
    file = wheel_of(tmp_path / "x-manylinux_2_28_x86_64.whl", GOOD)
    with pytest.raises(AssertionError, match=r"no operators for torch 2\.14"):
        tool("wheel")["check"](file, ["2.13", "2.14"], [])


def test_bill_of_materials(tool: Any, tmp_path: Path) -> None:
    """What is compiled in, of a build with CUDA and of one without; the same for the same bytes."""
    sbom = tool("sbom")["sbom"]
    wheel, sdist = wheel_of(tmp_path / "x.whl", GOOD), wheel_of(tmp_path / "x.tar.gz", GOOD)
    with_cuda = sbom(wheel, "CUDA backend: yes (nvcc 13.0.48, CUB 3.0.1, architectures 90)")
    names = {c["name"]: c.get("version") for c in with_cuda["components"]}
    assert names == {"pybind11": None, "cudart-static": "13.0.48", "cub": "3.0.1", "torch": None}
    without = sbom(wheel, "CUDA backend: NO: switched off by FUSED_RMSNORM_CUDA=0")
    assert [c["name"] for c in without["components"]] == ["pybind11", "torch"]
    assert [c["name"] for c in sbom(sdist, "")["components"]] == ["torch"]
    assert with_cuda == sbom(wheel, "CUDA backend: yes (nvcc 13.0.48, CUB 3.0.1, architectures 90)")
    json.dumps(with_cuda)
