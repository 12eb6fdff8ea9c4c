"""What SECURITY.md says, read back from the sources and from the libraries that were built."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import fused_rmsnorm

ROOT = Path(__file__).parents[2]
PACKAGE = Path(fused_rmsnorm.__file__).parent
LIBRARIES = sorted(PACKAGE.rglob("*.so"))
# Of the package itself; the build calls CMake, with a list of arguments.
FORBIDDEN_MODULES = {
    *(
        "pickle",
        "marshal",
        "shelve",
        "subprocess",
        "socket",
        "urllib",
        "http",
        "ctypes",
        "tempfile",
    ),
    *("multiprocessing", "code", "runpy", "requests"),
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "open", "__import__", "input", "system", "popen"}


def readelf(*arguments: object) -> str:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not here: it comes with the compiler that builds this")
    command = ["readelf", "--wide", *(str(a) for a in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_what_is_looked_at():
    names = {p.name.split(".")[0] for p in LIBRARIES}
    assert names == {"libfused_rmsnorm_kernels", "libfused_rmsnorm", "_info", "_eager"}


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_hardening(library):
    segments = readelf("--segments", library)
    assert "GNU_RELRO" in segments
    (stack,) = [line for line in segments.splitlines() if "GNU_STACK" in line]
    assert " RW " in stack
    assert "RWE" not in segments  # nothing that is both written and executed
    dynamic = readelf("--dynamic", library)
    assert re.search(r"FLAGS.*\bNOW\b", dynamic)
    assert "TEXTREL" not in dynamic


def test_stack_guards():
    """In every library that has an array on a stack to guard."""
    guarded = {p.name.split(".")[0] for p in LIBRARIES if "__stack_chk_fail" in readelf("-s", p)}
    assert guarded >= {"libfused_rmsnorm_kernels", "libfused_rmsnorm", "_info"}


def called(tree: ast.AST) -> set[str]:
    """Names that are called: f(...), and the last of a.b.f(...) unless it is torch's."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            f = node.func
            if isinstance(f, ast.Name):
                names.add(f.id)
            elif isinstance(f, ast.Attribute) and ast.unparse(f) not in ("re.compile",):
                names.add(f.attr)
    return names


def imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize(
    "source", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_the_package_runs_and_reads_nothing_of_others(source):
    tree = ast.parse(source.read_text())
    assert not imported(tree) & FORBIDDEN_MODULES
    assert not called(tree) & FORBIDDEN_CALLS


@pytest.mark.parametrize("source", ["cmake/build.py", "setup.py", "requirements/ensure.py"])
def test_the_build_uses_no_shell(source):
    text = (ROOT / source).read_text()
    assert "shell=True" not in text
    assert not called(ast.parse(text)) & {"eval", "exec", "system", "popen"}
    assert not imported(ast.parse(text)) & {"urllib", "socket", "http", "requests", "pickle"}


def test_the_build_downloads_nothing():
    described = [ROOT / "CMakeLists.txt", *(ROOT / "cmake").glob("*.cmake")]
    for file in described:
        assert not re.search(r"FetchContent|ExternalProject|DOWNLOAD|https?://", file.read_text())


def test_the_libraries_of_c_call_no_shell():
    """Neither do the extension's own files: no system, popen, dlopen of a given name, or exec."""
    for source in (ROOT / "csrc").rglob("*.*"):
        assert not re.search(
            r"\b(system|popen|dlopen|exec[lv]p?e?|fopen|ofstream)\(", source.read_text()
        )
