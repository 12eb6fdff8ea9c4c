"""One wheel for several versions of torch: python release/wheel.py 2.11 2.13 (make wheel).

Builds it, checks it, and tries it in a fresh environment with each of these versions, which pip
installs one after the other (a CUDA build of torch takes 5 GB; each environment is deleted again).
The same sources give the same bytes: times in the archive are those of SOURCE_DATE_EPOCH, by
default the last commit's.

FUSED_RMSNORM_CUDA, TORCH_CUDA_ARCH_LIST, MAX_JOBS    as for cmake/build.py
FUSED_RMSNORM_WHEEL_DIR    where CMake builds (default: build/wheel/cmake)
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import matrix
import sbom
import torches

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
BUILD = Path(os.environ.get("FUSED_RMSNORM_WHEEL_DIR") or ROOT / "build" / "wheel" / "cmake")
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
# What torch brings and a wheel must not: found in the torch that runs.
TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so", "libtorch_python.so", "libc10.so")


def run(*command: object, **options: object) -> str:
    """Standard output; what goes wrong is shown and ends all."""
    words = [str(c) for c in command]
    done = subprocess.run(words, text=True, stdout=subprocess.PIPE, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nfailed with exit status {done.returncode}: {words}")
    return str(done.stdout)


def epoch() -> str:
    """For reproducible archives: seconds since 1970."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    return given or run("git", "-C", ROOT, "log", "-1", "--format=%ct").strip()


def build(roots: list[Path]) -> Path:
    """The wheel, in dist/, with the tag that auditwheel finds for it."""
    environment = {
        **os.environ,
        "SOURCE_DATE_EPOCH": epoch(),
        "FUSED_RMSNORM_TORCHES": os.pathsep.join(map(str, roots)),
        "FUSED_RMSNORM_BUILD_DIR": str(BUILD),
    }
    os.umask(0o022)  # modes are in the archive, too
    with tempfile.TemporaryDirectory() as temporary:
        setup = [sys.executable, "setup.py", "-q", "egg_info", "-e", temporary]
        setup += ["build", "-b", f"{temporary}/build"]
        setup += ["bdist_wheel", "-b", f"{temporary}/bdist", "-d", f"{temporary}/wheel"]
        done = subprocess.run(setup, cwd=ROOT, env=environment, check=False)
        if done.returncode:
            raise SystemExit(done.returncode)
        (plain,) = Path(temporary, "wheel").glob("*.whl")
        exclude = [f"--exclude={name}" for name in TORCH_LIBRARIES]
        repair = ["auditwheel", "repair", *exclude, "-w", f"{temporary}/tagged", plain]
        run(sys.executable, "-m", *repair, env=environment)
        (tagged,) = Path(temporary, "tagged").glob("*.whl")
        DIST.mkdir(exist_ok=True)
        return Path(shutil.copy(tagged, DIST))


def check(wheel: Path, minors: list[str], roots: list[Path]) -> None:
    """What can be seen without torch: its contents, its tag, its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    for minor in minors:
        folder = f"fused_rmsnorm/lib/torch-{minor}/"
        assert f"{folder}libfused_rmsnorm.so" in contents, f"no operators for torch {minor}"
        assert any(name.startswith(f"{folder}_eager.") for name in contents)
    held = {name.split("/")[2] for name in contents if "/lib/torch-" in name}
    assert held == {f"torch-{minor}" for minor in minors}, held
    copied = [name for name in contents if Path(name).name in TORCH_LIBRARIES or ".libs/" in name]
    assert not copied, f"other people's libraries: {copied}"
    here = [ROOT, *roots, Path.home()] + ([Path(sys.prefix)] if sys.prefix != "/usr" else [])
    for name, data in contents.items():
        for path in (f"{folder}/" for folder in here):
            assert path.encode() not in data, f"{name} names a path of this machine: {path}"
    assert "-manylinux_" in wheel.name, "auditwheel found no manylinux tag"
    run(sys.executable, "-m", "twine", "check", "--strict", wheel)


def try_with(wheel: Path, minor: str, example: bool) -> str:
    """The wheel in a fresh environment with this torch; what its smoke test said."""
    with tempfile.TemporaryDirectory(prefix=f"torch-{minor}-") as folder:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        run(sys.executable, "-m", "venv", f"{folder}/env")
        python = f"{folder}/env/bin/python"
        pip = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir"]
        run(*pip, "--disable-pip-version-check", f"torch=={minor}.*", wheel, env=environment)
        smoke = shutil.copy(ROOT / "release" / "smoke.py", folder)
        said = run(python, smoke, minor, cwd=folder, env=environment)
        if example:
            said += cpp_example(Path(folder), python, environment)
        return said


def cpp_example(folder: Path, python: str, environment: dict[str, str]) -> str:
    """tests/packaging/example against the installed wheel, as a user of LibTorch builds it."""
    code = "import torch, fused_rmsnorm; print(torch.__path__[0], fused_rmsnorm.__path__[-1])"
    torch_root, package = run(python, "-c", code, cwd=folder, env=environment).split()
    source = shutil.copytree(ROOT / "tests" / "packaging" / "example", folder / "example")
    configure = ["cmake", "-S", source, "-B", folder / "build", "-DCMAKE_BUILD_TYPE=Release"]
    run(*configure, f"-DCMAKE_PREFIX_PATH={package}", f"-DTORCH_ROOT={torch_root}", env=environment)
    run("cmake", "--build", folder / "build", env=environment)
    run("ctest", "--test-dir", folder / "build", "--output-on-failure", env=environment)
    return "find_package(fused_rmsnorm) from the installed wheel: a C++ program trains\n"


def main(minors: list[str]) -> None:
    start = time.perf_counter()
    roots = [torches.root(minor, ROOT / "build" / "torches") for minor in minors]
    wheel = build(roots)
    check(wheel, minors, roots)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    size = wheel.stat().st_size / 1e6
    print(f"{wheel.relative_to(ROOT)}: {size:.1f} MB, sha256 {digest}", flush=True)
    sbom.write(wheel, (BUILD / "summary.txt").read_text())
    for minor in minors:
        said = try_with(wheel, minor, example=minor == minors[-1])
        print(said, end="", flush=True)
        note = f"make wheel: {said.splitlines()[0]}"
        matrix.record({f"{PYTHON}/{minor}": {"built": "yes", "run": "yes", "note": note}})
    print(f"Python {PYTHON}, torch {', '.join(minors)}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
