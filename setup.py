"""Drives CMake for pip: all that is built is described in CMakeLists.txt.

FUSED_RMSNORM_CUDA=0|1     CUDA half off, or its absence an error; otherwise it follows nvcc
FUSED_RMSNORM_BUILD_DIR    where CMake builds (default build/cmake), kept between runs
TORCH_CUDA_ARCH_LIST       as for torch's own extensions
MAX_JOBS                   parallel compilers (default: all cores)
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configures, builds and installs the one CMake project into the package's folder."""

    def run(self) -> None:
        """Nothing goes by extension: ``ext_modules`` only says that there is something to build."""
        package = (
            ROOT / "python" if self.inplace else Path(self.build_lib)
        ).resolve() / "fused_rmsnorm"
        build = Path(os.environ.get("FUSED_RMSNORM_BUILD_DIR", ROOT / "build" / "cmake"))
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"),
            f"-DFUSED_RMSNORM_CUDA={os.environ.get('FUSED_RMSNORM_CUDA', 'auto')}",
            f"-DCMAKE_INSTALL_PREFIX={package}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
        subprocess.run(["cmake", "--install", str(build)], check=True, stdout=subprocess.DEVNULL)
        print((build / "summary.txt").read_text().strip(), flush=True)


setup(
    ext_modules=[Extension("fused_rmsnorm._info", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
