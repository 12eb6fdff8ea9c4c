"""What pip is given: the source distribution holds all that a wheel is built from."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import fused_rmsnorm

ROOT = Path(__file__).parents[1]
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
        f"python/fused_rmsnorm/{p.name}"
        for p in (ROOT / "python" / "fused_rmsnorm").iterdir()
        if p.suffix in (".py", ".pyi", ".typed") or p.name == "VERSION"
    }
    wanted = tracked("csrc", "cmake") | package
    wanted |= {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"}
    assert wanted <= names
    assert not [n for n in names if n.endswith((".so", ".pyc"))]


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
