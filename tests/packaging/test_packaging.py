"""What pip is given, and what is built from it: the source distribution, the libraries, the import
that chooses among them. What needs several versions of torch is done by `make wheel`."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
import torch

import fused_rmsnorm
from fused_rmsnorm import _library

ROOT = Path(__file__).parents[2]
PACKAGE = Path(fused_rmsnorm.__file__).parent
setuptools = pytest.importorskip("setuptools", reason="makes the source distribution")


def tracked(*folders: str) -> set[str]:
    """Source files below the folders."""
    files = (p for f in folders for p in (ROOT / f).rglob("*") if p.is_file())
    made = (".so", ".pyc")
    return {str(p.relative_to(ROOT)) for p in files if p.suffix not in made}


@pytest.mark.skipif(
    tuple(int(n) for n in setuptools.__version__.split(".")[:1]) < (77,),
    reason="older setuptools do not read pyproject.toml's license",
)
def test_source_distribution(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, "sdist", "-d", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {n.split("/", 1)[1] for n in tar.getnames() if "/" in n}
    assert archive.name == f"fused_rmsnorm-{fused_rmsnorm.__version__}.tar.gz"
    package = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "python" / "fused_rmsnorm").rglob("*")
        if p.suffix in (".py", ".pyi", ".typed") or p.name == "VERSION"
    }
    wanted = tracked("csrc", "cmake") | package
    wanted |= {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"}
    assert wanted <= names
    assert not [n for n in names if n.endswith((".so", ".pyc")) or n.startswith("tests/")]


def test_the_build_says_what_is_missing(tmp_path: Path) -> None:
    """CMake on no path, and an interpreter without torch: a sentence each, no traceback."""
    build = "import pathlib, runpy, sys; b = runpy.run_path(sys.argv[1])\n"
    script = str(ROOT / "cmake" / "build.py")
    no_cmake = "b['build'].__globals__['tool'] = lambda name: None\n"
    no_torch = "sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
    for code, expected in (
        (no_cmake + "b['build'](pathlib.Path('x'))", "CMake >= 3.24, which is missing"),
        (no_torch + "b['torch_root']()", "install torch >= 2.11"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", build + code, script],
            cwd=tmp_path,
            env={"PATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert expected in done.stderr
        assert "Traceback" not in done.stderr


def binutils(*command: object) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not here: it comes with the compiler that builds this")
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=True
    ).stdout


def test_kernels_know_no_torch_and_export_norm_h_only() -> None:
    """One library serves every torch, and clashes with nothing: what is not in norm.h is hidden."""
    kernels = PACKAGE / "lib" / "libfused_rmsnorm_kernels.so"
    needed = re.findall(r"NEEDED.*\[(.*)\]", binutils("readelf", "-d", kernels))
    assert not [name for name in needed if "torch" in name or "c10" in name or "cudart" in name]
    symbols = binutils("nm", "-D", "--defined-only", kernels).splitlines()
    exported = {line.split()[2] for line in symbols}
    header = re.sub(r"//.*", "", (ROOT / "csrc" / "norm.h").read_text())
    backends = ["cpu", "cuda"] if fused_rmsnorm.build_info()["cuda"] else ["cpu"]
    declared = {
        f"fused_rmsnorm_v3_{backend}_{name}"  # as C, with the version of norm.h's structs
        for backend in backends
        for body in re.findall(rf"\nnamespace {backend} {{\n(.*?)\n}}", header, re.S)
        for name in re.findall(r"(\w+)\([^;]*;", body)
    }
    assert len(declared) >= 7
    assert exported == declared


def test_libraries_hold_no_path_of_the_machine() -> None:
    for library in PACKAGE.rglob("*.so"):
        data = library.read_bytes()
        for path in (str(ROOT), sys.prefix + "/lib"):
            assert path.encode() not in data, f"{library} names {path}"


IMPORT = "import torch; torch.__version__ = {version!r}\nimport fused_rmsnorm"


@pytest.mark.parametrize("version", ["2.99.0", "2.99.0a0+gitabcdef", "3.0"])
def test_unknown_torch_is_one_clear_line(version: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT.format(version=version)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: this build of fused_rmsnorm is for torch ")
    assert ", ".join(_library.built_for()) in last
    assert f"but torch is {version}" in last
    assert "pip install --no-build-isolation" in last
    assert "OSError" not in done.stderr  # nothing about files and symbols before it


def test_the_newest_build_is_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("2.9", "2.14", "2.100"):
        folder = tmp_path / f"torch-{version}"
        folder.mkdir()
        (folder / "libfused_rmsnorm.so").touch()
    (tmp_path / "torch-2.15").mkdir()  # nothing in it
    monkeypatch.setattr(_library, "LIBRARIES", tmp_path)
    assert _library.built_for() == ["2.9", "2.14", "2.100"]


@pytest.mark.parametrize("module", ["_eager", "_info"])
@pytest.mark.parametrize("there", [True, False], ids=["for another Python", "not there"])
def test_another_python_is_one_clear_line(module: str, there: bool, tmp_path: Path) -> None:
    """A checkout that one Python built and another imports; Python itself spoke of a circle."""
    shutil.copytree(
        PACKAGE, tmp_path / "fused_rmsnorm", ignore=shutil.ignore_patterns("__pycache__")
    )
    (extension,) = (tmp_path / "fused_rmsnorm").rglob(f"{module}.*.so")
    if there:
        extension.rename(extension.with_name(f"{module}.cpython-399-x86_64-linux-gnu.so"))
    else:
        extension.unlink()
    done = subprocess.run(
        [sys.executable, "-c", "import fused_rmsnorm"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1]
    if there:
        assert "this build of fused_rmsnorm is for cpython-399-x86_64-linux-gnu, but this" in last
        assert str(sysconfig.get_config_var("SOABI")) in last
    else:
        assert f"{module} is missing" in last
    assert last.startswith("ImportError: ")
    assert "pip install --no-build-isolation" in last


def test_a_library_that_does_not_load_says_so(tmp_path: Path) -> None:
    """Built against another torch, or broken: the linker's reason, and what to do."""
    shutil.copytree(
        PACKAGE, tmp_path / "fused_rmsnorm", ignore=shutil.ignore_patterns("__pycache__")
    )
    # The one that this torch takes: the package may hold others, for other versions.
    folder = tmp_path / "fused_rmsnorm" / "lib" / f"torch-{_library.minor(torch.__version__)}"
    library = folder / "libfused_rmsnorm.so"
    assert library.exists()
    library.write_bytes(b"not a library")
    done = subprocess.run(
        [sys.executable, "-c", "import fused_rmsnorm"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "does not load with torch" in last
    assert "invalid ELF header" in last or "file too short" in last
    assert "pip install --no-build-isolation" in last


def test_the_namespace_has_one_name_in_one_place() -> None:
    """Per language: registration.h and _ops.py. Two builds in one process differ there only."""
    cpp = {
        p.name
        for p in (ROOT / "csrc").rglob("*.*")
        if re.search(r"\bTORCH_LIBRARY|\"fused_rmsnorm::|\bfused_rmsnorm_[A-Z]", p.read_text())
    }
    python = {
        p.name
        for p in (ROOT / "python").rglob("*.py")
        if re.search(r"torch\.ops\.fused_rmsnorm|[\"']fused_rmsnorm::", p.read_text())
    }
    assert cpp == {"registration.h"}
    assert python == {"_ops.py"}


def test_the_version_is_the_same_everywhere() -> None:
    (cited,) = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited == fused_rmsnorm.__version__
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## {re.escape(cited)}\b", changes, re.M)


def test_torches_of_a_release_are_the_same_everywhere() -> None:
    """What `make wheel` builds for, the matrix, conda and the workflows."""
    (default,) = re.findall(r"^TORCHES \?= (.+)$", (ROOT / "Makefile").read_text(), re.M)
    minors = default.split()
    (matrix,) = re.findall(r"^TORCHES = (.+)$", (ROOT / "release" / "matrix.py").read_text(), re.M)
    assert ast.literal_eval(matrix) == minors
    conda = (ROOT / "conda" / "conda_build_config.yaml").read_text().split("pytorch:")[1]
    assert re.findall(r'"([\d.]+)"', conda) == minors
    checks = (ROOT / ".github" / "workflows" / "checks.yml").read_text()
    assert set(re.findall(r"2\.1\d", checks.split("torch:", 1)[1])) == set(minors)
