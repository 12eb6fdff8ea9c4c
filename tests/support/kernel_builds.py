"""The C++ programs of tests/kernels/cpu: built once per kind, by whichever test comes first."""

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

DRIVER = Path(__file__).parents[1] / "kernels" / "cpu"
FOLDER = DRIVER.parents[2] / "build"


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    return done.stdout


def objects() -> str:
    """For CMake: what the library was linked of, where make has just built it, so that nothing is
    compiled twice."""
    folder = os.environ.get("FUSED_RMSNORM_BUILD_DIR")
    found = Path(folder).glob("CMakeFiles/fused_rmsnorm_kernels.dir/csrc/cpu/*.o") if folder else ()
    return "-DFUSED_RMSNORM_CPU_OBJECTS=" + ";".join(sorted(str(p.resolve()) for p in found))


def build(kind: str, *options: str, target: str = "all") -> Path:
    """The folder with the programs. Two processes wait for each other."""
    folder = FOLDER / f"cpu-kernels-{kind}"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    if kind == "plain":
        options = (*options, objects())
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run("cmake", "-S", DRIVER, "-B", folder, *generator, *options)
        jobs = os.cpu_count() or 1
        run("cmake", "--build", folder, "--target", target, "--parallel", jobs)
    return folder
