"""What a wheel for several versions of torch is built against: the headers of each, and four
libraries for the linker. Out of torch's own wheels; none of its dependencies is needed.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LIBRARIES = ("libtorch.so", "libtorch_cpu.so", "libc10.so", "libtorch_python.so")


def root(minor: str, folder: Path) -> Path:
    """The folder torch, with what is needed of the newest torch of this minor version, below
    ``folder``; downloaded (half a gigabyte for a CUDA build) if it is not there."""
    target = folder / minor
    if (target / "torch" / "version.py").exists():
        return target / "torch"
    with tempfile.TemporaryDirectory() as downloads:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
        subprocess.run([*pip, "-d", downloads, f"torch=={minor}.*"], check=True)
        (wheel,) = Path(downloads).glob("torch-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            libraries = {f"torch/lib/{name}" for name in LIBRARIES}
            names = archive.namelist()
            wanted = [n for n in names if n.startswith("torch/include/") or n in libraries]
            archive.extractall(target, wanted)
            archive.extract("torch/version.py", target)  # last: it says that all is there
    return target / "torch"
