"""For pip: hands the build to cmake/build.py. All that is built is described in CMakeLists.txt."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
spec = spec_from_file_location("fused_rmsnorm_build", ROOT / "cmake" / "build.py")
driver = module_from_spec(spec)
spec.loader.exec_module(driver)


class CMakeBuild(build_ext):
    """Nothing goes by extension: ``ext_modules`` only says that there is something to build."""

    def run(self) -> None:
        """Builds into the checkout's package (editable) or the one that becomes a wheel."""
        parent = ROOT / "python" if self.inplace else Path(self.build_lib)
        driver.build(parent / "fused_rmsnorm")


setup(
    ext_modules=[Extension("fused_rmsnorm._info", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
