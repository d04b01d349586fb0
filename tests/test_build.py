"""What is compiled, and for what: the oldest torch, the instruction sets, and a machine without a compiler."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
import setuptools
import torch

from pyspec.ops import _library

ROOT = Path(__file__).parent.parent
CMAKE = (ROOT / "CMakeLists.txt").read_text()
_SETS = re.findall(r"define PYSPEC_EACH_SET((?:.*\\\n)*.*)", (ROOT / "csrc/cpu/instruction_sets.h").read_text())
SETS, ARM_SETS = (re.findall(r"X\((\w+), __VA_ARGS__\)", listed) for listed in _SETS[:2])
KERNELS = sorted(path.stem for path in (ROOT / "kernels/cpu").glob("*.cpp"))
ARM_COMPILER = shutil.which("aarch64-linux-gnu-g++")
FLAGS = (
    "-mavx2 -mfma -mf16c -mavxvnni -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512bf16 "
    "-mamx-tile -mamx-bf16 -mamx-int8"
)
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def test_oldest_torch_is_one_everywhere():
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    major, minor = map(int, oldest.split("."))
    assert f"TORCH_TARGET_VERSION=0x{(major << 8) + minor:04x}000000000000ULL" in CMAKE
    assert re.findall(r'^c\w+ = "([\d.]+)"$', (ROOT / "build.toml").read_text(), re.MULTILINE) == [oldest, oldest]
    for name in ("README.md", "docs/getting_started.md"):
        assert f"torch {oldest}" in (ROOT / name).read_text(), name


def test_a_wheel_holds_the_package_and_nothing_else(monkeypatch):
    pytest.importorskip("pybind11", reason="setup.py compiles with it")
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **settings: given.update(settings))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    folders = {path.parent for path in (ROOT / "pyspec").rglob("*.py")}
    wanted = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"pyspec.kernels"}
    assert set(given["packages"]) == wanted


def test_a_source_distribution_has_all_that_is_compiled(tmp_path):
    pytest.importorskip("pybind11", reason="setup.py compiles with it")
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path], cwd=ROOT, check=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("csrc/**/*", "kernels/**/*.[ch]*", "pyspec/**/*.py")
    wanted = {path.relative_to(ROOT).as_posix() for pattern in folders for path in ROOT.glob(pattern) if path.is_file()}
    wanted |= {"CMakeLists.txt", "pyproject.toml", "setup.py", "README.md", "LICENSE"}
    wanted |= {"pyspec/caches/demo_codebooks.safetensors", "kernels/triton/linear.py"}
    wanted |= {file.relative_to(ROOT).as_posix() for file in (ROOT / "pyspec/controllers").glob("*.safetensors")}
    assert wanted <= names, sorted(wanted - names)
    assert not [name for name in names if name.startswith(("tests/", "build/")) or name.endswith(".so")]


def test_wheels_are_for_the_same_machines_whoever_builds_them(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "release")
    import wheels

    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())
    chosen = project["tool"]["cibuildwheel"]
    assert project["project"]["requires-python"] == f">={wheels.PYTHONS[0]}"
    assert chosen["build"] == f"cp31{{{','.join(version[3:] for version in wheels.PYTHONS)}}}-*"
    assert chosen["linux"]["archs"] == list(wheels.PROCESSORS)
    excluded = re.findall(r"--exclude (\S+)", chosen["linux"]["repair-wheel-command"])
    assert excluded == list(wheels.TORCH_LIBRARIES)
    assert chosen["linux"]["manylinux-aarch64-image"] == f"manylinux_2_{wheels.OLDEST_GLIBC}"
    name = "pyspec_kernels-0.1.0-cp311-cp311-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl"
    assert wheels.oldest_glibc(name) == 27


@pytest.mark.parametrize("name", ["libpyspec_cpu.so", "libpyspec_cuda.so"])
def test_a_library_of_another_machine_says_what_to_install(name, monkeypatch, tmp_path):
    (tmp_path / name).write_bytes(b"\x7fELF" + bytes(60))
    monkeypatch.setattr(_library, "_FOLDER", tmp_path)
    library, reason = _library._load(name, "was not built")
    assert library is None and reason.startswith(f"{name} does not load in torch {torch.__version__} on ")
    assert reason.endswith("the wheel of this processor: pip install --force-reinstall pyspec-kernels 'torch>=2.10'")


def configure(build: Path, **options: str) -> tuple[int, str]:
    """Runs CMake as setup.py does: its exit status, and what it said."""
    pybind11 = pytest.importorskip("pybind11")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if not all(shutil.which(tool, path=environment["PATH"]) for tool in ("cmake", "ninja")):
        pytest.skip("cmake and ninja build the library")
    given = {
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": build,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "TORCH_DIR": Path(torch.__file__).parent,
        "PYSPEC_CUDA": "0",
    } | options
    command = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *(f"-D{name}={value}" for name, value in given.items())]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    return result.returncode, " ".join((result.stdout + result.stderr).split())


def compiled(build: Path, sets: list[str] = SETS) -> dict[str, set[str]]:
    """The kernels that a build folder compiles for each instruction set."""
    found = re.findall(
        r"^build CMakeFiles/kernels_(\w+)\.dir/kernels/cpu/(\w+)\.cpp\.o:", (build / "build.ninja").read_text(), re.M
    )
    return {name: {kernel for owner, kernel in found if owner == name} for name in sets}


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """What a wheel compiles."""
    build = tmp_path_factory.mktemp("all")
    status, said = configure(build, PYSPEC_ISAS="all")
    assert status == 0, said
    return compiled(build)


@pytest.fixture(scope="module")
def everything_for_arm(tmp_path_factory):
    """What a wheel for Arm compiles, by a compiler of this machine."""
    if ARM_COMPILER is None:
        pytest.skip("takes a cross compiler: apt-get install g++-aarch64-linux-gnu")
    build = tmp_path_factory.mktemp("arm")
    target = {"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": "aarch64", "CMAKE_CXX_COMPILER": ARM_COMPILER}
    status, said = configure(build, **target, Python_INCLUDE_DIR=sysconfig.get_path("include"))
    assert status == 0, said
    return compiled(build, ARM_SETS)


def is_x86() -> bool:
    return os.uname().machine in ("x86_64", "AMD64")


@pytest.mark.skipif(not is_x86(), reason="elsewhere there is one instruction set")
def test_a_build_for_this_machine_has_what_it_can_run(everything, tmp_path):
    """Nothing less, or PYSPEC_ISA could not be tested here; and nothing more."""
    status, said = configure(tmp_path, PYSPEC_ISAS="native")
    assert status == 0, said
    source = tmp_path / "processor.cpp"
    source.write_text('#include "instruction_sets.h"\nint main() { return pyspec::processor_instruction_set(); }')
    subprocess.run(
        [COMPILER, "-DPYSPEC_X86", f"-I{ROOT / 'csrc/cpu'}", source, "-o", tmp_path / "processor"], check=True
    )
    best = subprocess.run([tmp_path / "processor"]).returncode
    assert compiled(tmp_path) == {name: everything[name] if i <= best else set() for i, name in enumerate(SETS)}
    assert f"PYSPEC_BEST_BUILT={best}" in (tmp_path / "build.ninja").read_text()


@pytest.mark.skipif(not is_x86() or COMPILER is None, reason="takes a C++ compiler for x86")
def test_no_set_builds_on_avx_vnni(tmp_path):
    """Processors with AVX-512 may lack it."""
    source = tmp_path / "below.cpp"
    source.write_text(
        '#include "instruction_sets.h"\nusing namespace pyspec;\n'
        "static_assert(set_below(kSet_avx_vnni) == kSet_avx2 && set_below(kSet_avx512) == kSet_avx2);\n"
        "static_assert(set_below(kSet_avx512_vnni) == kSet_avx512 && set_below(kSet_avx2) == kSet_portable);\n"
    )
    subprocess.run(
        [COMPILER, "-std=c++17", "-fsyntax-only", "-DPYSPEC_X86", f"-I{ROOT / 'csrc/cpu'}", source], check=True
    )


def test_an_unknown_choice_is_named(tmp_path):
    status, said = configure(tmp_path, PYSPEC_ISAS="avx2")
    assert status != 0 and "PYSPEC_ISAS must be all or native, got avx2" in said


def test_without_a_compiler_nothing_is_compiled(tmp_path):
    status, said = configure(tmp_path, CMAKE_CXX_COMPILER="")
    assert status == 0 and "There is no C++ compiler that works: nothing is compiled" in said
    assert ".cpp.o:" not in (tmp_path / "build.ninja").read_text()


def assembly(compiler: str, flags: str, kernel: str, name: str) -> str:
    """A kernel for one instruction set, not optimised, without what differs by how many functions there are."""
    defined = [f"-DPYSPEC_ISA_{name}=1", "-DPYSPEC_ISA=any", f"-I{ROOT / 'kernels'}"]
    command = [compiler, "-std=c++17", "-O0", "-S", "-o", "-", *flags.split(), *defined]
    made = subprocess.run([*command, ROOT / f"kernels/cpu/{kernel}.cpp"], capture_output=True, text=True, check=True)
    return re.sub(r"\.L\w*\d+", "", made.stdout)


def check_sets(kernel: str, sets: list[str], everything: dict[str, set[str]], compiler: str, flags: str) -> None:
    """Every kernel is compiled for all sets but those at the end whose code would be that of the set before.

    All flags are given to each, so that only the code under PYSPEC_ISA_... differs.
    """
    always = [name for name in sets if everything[name] == set(KERNELS)]
    assert sets[: len(always)] == always and kernel in everything[always[-1]]
    others = sets[len(always) :]
    chosen = {name for name in others if kernel in everything[name]}
    if not chosen:  # a set has all that those before it have, so the last tells for all
        others = others[-1:]
    code, changed = assembly(compiler, flags, kernel, always[-1]), set()
    for name in others:
        before, code = code, assembly(compiler, flags, kernel, name)
        if code != before:
            changed.add(name)
    assert changed == chosen


@pytest.mark.skipif(not is_x86() or COMPILER is None, reason="takes a C++ compiler for x86")
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_is_compiled_for_the_sets_that_change_its_code(kernel, everything):
    check_sets(kernel, [name for name in SETS if name != "avx_vnni"], everything, COMPILER, FLAGS)
    check_sets(kernel, SETS[: SETS.index("avx_vnni") + 1], everything, COMPILER, FLAGS)  # no other builds on it


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_is_compiled_for_the_sets_of_arm_that_change_its_code(kernel, everything_for_arm):
    check_sets(kernel, ARM_SETS, everything_for_arm, ARM_COMPILER, "-march=armv8.2-a+dotprod+i8mm+bf16")
