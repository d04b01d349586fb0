"""Builds the compiled parts with CMake and ninja: the op libraries (CPU, and CUDA where it can) and the host module.

The op libraries need torch's headers. In an isolated build torch is not importable; then only the host
module is built and the ops run on their references (use --no-build-isolation to get them, or PYSPEC_TORCH). Without a
C++ compiler nothing is built, and host structures run in plain Python too.

Environment variables: MAX_JOBS (compilers at a time), PYSPEC_ISAS (all: kernels for every instruction set, as in a
wheel; native: for this machine, as in an editable install), PYSPEC_CUDA (1: build the CUDA kernels; 0: do not),
PYSPEC_TORCH (the folder of a torch that this Python need not be able to import).
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent

# Not news to who asks for an editable install, and pip shows it at the end of every one.
warnings.filterwarnings("ignore", "Editable installation")


class CMakeBuild(build_ext):
    """Runs CMake once; its targets land in the package."""

    def run(self) -> None:
        # What is installed in place is for this machine; the rest may become wheels. setuptools' run() forgets inplace.
        self.isas = "native" if self.editable_mode or self.inplace else "all"
        super().run()

    def build_extension(self, ext: Extension) -> None:
        package = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        # one folder for editable installs, builds in place and wheels of every Python, or each would compile all again
        work = ROOT.resolve() / "build" / f"cmake-{self.plat_name}"
        work.mkdir(parents=True, exist_ok=True)
        torch = importlib.util.find_spec("torch")
        # cmake and ninja may be installed beside this Python without being on PATH
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja", path=environment["PATH"]) or "ninja",  # not an earlier one
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": package,
            "Python_EXECUTABLE": sys.executable,
            "Python_INCLUDE_DIR": sysconfig.get_path("include"),  # CMake would look for another processor's elsewhere
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TORCH_DIR": os.environ.get("PYSPEC_TORCH") or (Path(torch.origin).parent if torch else ""),
            "PYSPEC_ISAS": os.environ.get("PYSPEC_ISAS") or self.isas,
            "PYSPEC_CUDA": os.environ.get("PYSPEC_CUDA", ""),
            "HOST_MODULE_SUFFIX": self.get_ext_filename("x")[1:],
        }
        subprocess.run(
            ["cmake", "-S", ROOT, "-B", work, "-G", "Ninja", *(f"-D{key}={value}" for key, value in options.items())],
            check=True,
            env=environment,
        )
        shutil.rmtree(package / "lib", ignore_errors=True)  # or a library that is built no more would stay
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        subprocess.run(["cmake", "--build", work, "--parallel", jobs], check=True, env=environment)

    def copy_extensions_to_source(self) -> None:
        """For builds in place and editable installs, where setuptools itself copies only the host module."""
        super().copy_extensions_to_source()
        library = Path(self.build_lib) / "pyspec" / "lib"
        if library.exists():
            shutil.rmtree(ROOT / "pyspec" / "lib", ignore_errors=True)
            shutil.copytree(library, ROOT / "pyspec" / "lib", dirs_exist_ok=True)


setup(
    packages=sorted({*find_packages(include=["pyspec", "pyspec.*"]), "pyspec.kernels"}),
    package_data={"pyspec.caches": ["demo_codebooks.safetensors"], "pyspec.controllers": ["demo_*.safetensors"]},
    package_dir={"pyspec": "pyspec", "pyspec.kernels": "kernels/triton"},
    ext_modules=[Extension("pyspec._host", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
