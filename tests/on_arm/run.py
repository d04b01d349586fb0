"""Runs tests with the kernels of Arm processors, under qemu: python tests/on_arm/run.py [arguments of pytest]

Without arguments a few cases of every op's every test, in minutes; some_cases.py chooses. With `tests/ops` all of them.
The kernels are cross-compiled by CMake, as on such a machine, into a program without torch (driver.cpp) that an
emulator runs. The library's bindings are compiled for this machine, with entry points that send a kernel's params there
(proxy.cpp). So tests are the usual ones, on instruction sets that this processor does not have.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORK = ROOT / "build/on_arm"
COMPILER = "aarch64-linux-gnu-g++"
# By instruction set, worst first: a processor that has no better, and the tests of the kernels compiled for it.
PROCESSORS = {
    "neon": ("cortex-a57", "*"),
    "neon_dot": ("neoverse-n1", "linear linear_codes expert_linear"),
    "neon_bf16": ("max", "*linear* gear quantised* *attention*"),
}


def missing() -> str | None:
    """What this machine lacks to run Arm's kernels; None where it has all."""
    tools = (COMPILER, "qemu-aarch64", "cmake", "ninja")
    return next((f"{tool} is not installed" for tool in tools if shutil.which(tool) is None), None)


def cross_compile(portable: bool) -> list[Path]:
    """The kernels' object files, of every instruction set; of the portable one if asked."""
    work = WORK / "cmake"
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": work,
        "Python_EXECUTABLE": sys.executable,
        "Python_INCLUDE_DIR": sysconfig.get_path("include"),
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "TORCH_DIR": Path(torch.__file__).parent,
        "PYSPEC_CUDA": "0",
    }
    given = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run(["cmake", "-S", ROOT, "-B", work, "-G", "Ninja", *given], check=True, stdout=subprocess.DEVNULL)
    sets = r"\w+" if portable else r"neon\w*"
    objects = re.findall(rf"^build (CMakeFiles/kernels_{sets}\.dir/\S+\.o):", (work / "build.ninja").read_text(), re.M)
    subprocess.run(["ninja", "-C", work, *objects], check=True, stdout=subprocess.DEVNULL)
    return [work / name for name in objects]


def entry_points(objects: list[Path]) -> list[str]:
    symbols = subprocess.run(["nm", "--defined-only", "-g", *objects], check=True, capture_output=True, text=True)
    return sorted(set(re.findall(r" T (pyspec_\w+)$", symbols.stdout, re.M)))


def build_driver(objects: list[Path], entries: list[str]) -> Path:
    (WORK / "kernels.inc").write_text("".join(f"PYSPEC_ENTRY_POINT({name})\n" for name in entries))
    driver = WORK / "driver"
    flags = ["-std=c++17", "-O2", "-static", "-DPYSPEC_ARM=1", f"-I{ROOT}", f"-I{ROOT / 'kernels'}", f"-I{WORK}"]
    subprocess.run([COMPILER, *flags, HERE / "driver.cpp", *objects, "-o", driver], check=True)
    return driver


def build_library(entries: list[str], driver: Path) -> Path:
    """The op library with proxies for kernels, in a tree of links to all else that the repository has."""
    tables, headers = {}, sorted((ROOT / "kernels/params").glob("*.h"))
    for source in (ROOT / "csrc/cpu").glob("*.cpp"):
        tables |= dict(re.findall(r"PYSPEC_KERNEL_TABLE\((\w+),\s*([\w:]+)\)", source.read_text()))
    proxies = [f'#include "params/{header.name}"\n' for header in headers]
    for entry in entries:
        name = max((name for name in tables if entry.startswith(f"{name}_")), key=len)
        params = tables[name] if "::" in tables[name] else f"pyspec::{tables[name]}"
        proxies.append(f"PYSPEC_PROXY({name}, {entry.removeprefix(name + '_')}, {params})\n")
    (WORK / "proxies.inc").write_text("".join(proxies))
    tree = WORK / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    (tree / "pyspec/lib").mkdir(parents=True)
    for folder in (ROOT, ROOT / "pyspec"):
        for path in folder.iterdir():
            if path.name not in (".git", "build", "pyspec", "lib", "__pycache__"):
                (tree / path.relative_to(ROOT)).symlink_to(path)
    if not (tree / "pyspec/kernels").exists():
        (tree / "pyspec/kernels").symlink_to(ROOT / "kernels/triton")
    where = Path(torch.__file__).parent
    includes = [ROOT / "kernels", ROOT / "csrc/cpu", where / "include", where / "include/torch/csrc/api/include", WORK]
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-DPYSPEC_ARM=1"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL", *(f"-I{path}" for path in includes)]
    flags += [f'-DPYSPEC_DRIVER="{driver}"', '-DPYSPEC_BEST_BUILT=std::atoi(std::getenv("PYSPEC_EMULATED_SET"))']
    compiler = [*os.environ.get("CMAKE_CXX_COMPILER_LAUNCHER", "").split(), os.environ.get("CXX", "g++")]

    def compile(source: Path) -> Path:
        made = WORK / f"{source.stem}.o"
        subprocess.run([*compiler, *flags, "-c", source, "-o", made], check=True)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        made = list(threads.map(compile, [*sorted((ROOT / "csrc/cpu").glob("*.cpp")), HERE / "proxy.cpp"]))
    libraries = [f"-L{where / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    library = tree / "pyspec/lib/libpyspec_cpu.so"
    subprocess.run([compiler[-1], "-shared", *made, "-o", library, *libraries], check=True)
    return tree


def build(portable: bool = False) -> tuple[Path, Path]:
    """The driver, and a tree of the repository whose library runs kernels in it."""
    WORK.mkdir(parents=True, exist_ok=True)
    objects = cross_compile(portable)
    entries = entry_points(objects)
    driver = build_driver(objects, entries)
    return driver, build_library(entries, driver)


def environment(tree: Path, name: str) -> dict[str, str]:
    """Of a process in the tree that runs an instruction set's kernels, on its processor."""
    number = list(PROCESSORS).index(name)
    wanted = {"PYSPEC_ISA": name, "PYSPEC_EMULATED": PROCESSORS[name][0], "PYSPEC_EMULATED_SET": str(number + 1)}
    return os.environ | wanted | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}


def main() -> None:
    if reason := missing():
        return print(f"Arm's kernels are not tested here: {reason}")
    driver, tree = build(portable=len(sys.argv) > 1)
    for number, (name, (processor, files)) in enumerate(PROCESSORS.items(), 1):
        found = subprocess.run(["qemu-aarch64", "-cpu", processor, driver]).returncode
        assert found == number, f"{processor} has instruction set {number}, found {found}"
        some = {
            path.relative_to(ROOT) for stem in files.split() for path in (ROOT / "tests/ops").glob(f"test_{stem}.py")
        }
        tests = sys.argv[1:] or ["-p", "tests.on_arm.some_cases", "-n", "auto", "--maxprocesses", "8", *sorted(some)]
        print(f"==== {name} on {processor} ====", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *tests]
        ran = subprocess.run(command, env=environment(tree, name), cwd=tree)
        if ran.returncode:
            sys.exit(ran.returncode)


if __name__ == "__main__":
    main()
