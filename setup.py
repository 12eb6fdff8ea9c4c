"""For pip: hands the build to cmake/build.py. All that is built is described in CMakeLists.txt."""

import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CMAKE = runpy.run_path(str(ROOT / "cmake" / "build.py"))


class CMakeBuild(build_ext):
    """Nothing goes by extension: ``ext_modules`` only says that there is something to build."""

    def run(self) -> None:
        """Builds into the checkout's package (editable) or the one that becomes a wheel."""
        parent = ROOT / "python" if self.inplace else Path(self.build_lib)
        CMAKE["build"](parent / "fused_rmsnorm")


setup(
    ext_modules=[Extension("fused_rmsnorm._info", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
