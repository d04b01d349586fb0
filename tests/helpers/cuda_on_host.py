"""Compiles CUDA sources for the CPU with cuda_on_host.h, and loads the result."""

import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parents[1] / "cuda_on_host"
ROOT = HERE.parents[1]
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas", "-ffp-contract=off"]
FLAGS += [f"-I{HERE}", f"-I{ROOT / 'kernels'}"]
NAMESPACE = "pyspec_on_host"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


# What the environment variable CUDA_ON_HOST may ask for, beside plain kernels.
MODES = {
    "": [],
    # What C++ leaves undefined, reported on stderr: alignment, shifts, bounds, casts of floats.
    "undefined": ["-fsanitize=undefined,float-cast-overflow"],
    # races.h, in place of the runtime that the compiler would link.
    "races": ["-fsanitize=thread", "-nodefaultlibs", "-lstdc++", "-lm", "-lc", "-lgcc_s"],
}


def build_on_host(*sources: Path, flags: tuple[str, ...] = (), mode: str | None = None) -> Path:
    """A shared library of .cu and .cpp sources; kept in build/cuda_on_host until anything it is made of changes.

    mode: one of MODES, of the environment by default.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler to run CUDA kernels on the CPU with")
    mode = os.environ.get("CUDA_ON_HOST", "") if mode is None else mode
    command = [compiler, *FLAGS, "-x", "c++", *map(str, sources), *flags, *MODES[mode]]
    made_of = [*sources, *HERE.glob("*.h")]
    for folder, pattern in (("kernels", "**/*.h"), ("csrc", "*.h"), ("csrc/cuda", "*.h")):
        made_of += (ROOT / folder).glob(pattern)
    digest = hashlib.sha256(repr(command).encode())
    for path in sorted(made_of):
        digest.update(path.read_bytes())
    library = ROOT / "build/cuda_on_host" / f"{sources[-1].stem}_{digest.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        temporary = library.with_suffix(f".{os.getpid()}")  # several test processes may build it at once
        subprocess.run([*command, "-o", str(temporary)], check=True)
        temporary.replace(library)
    return library


def kernel_name(demangled: str) -> str:
    """Without its result, namespace and parameters."""
    name = demangled.replace("(anonymous namespace)::", "").removeprefix("void ")
    return name[: name.index("(")]


@dataclass(frozen=True)
class Launch:
    """A launch that was noted; name: the kernel with its template arguments, as "topk_kernel<unsigned int, 0>"."""

    name: str
    grid: tuple[int, int, int]
    threads: int
    shared: int  # bytes of dynamic shared memory


class HostLibrary(ctypes.CDLL):
    """A library of kernels; call(name, ...) runs one of its functions, which returns a cudaError_t."""

    def __init__(self, path: Path):
        super().__init__(str(path))
        self.cuda_on_host_error.restype = self.cuda_on_host_note.restype = ctypes.c_char_p
        self.cuda_on_host_set.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_uint64]

    def set(self, multiprocessors: int = 4, blocks_in_flight: int = 1, seed: int = 0, shared: int = 99 << 10) -> None:
        """The device from now on, with so many bytes of shared memory for a block.

        seed: 0 runs blocks and threads in ascending order, another in one drawn from it.
        """
        self.cuda_on_host_set(multiprocessors, blocks_in_flight, shared, seed)

    @contextlib.contextmanager
    def noting(self) -> Iterator[list[Launch]]:
        """Inside, launches run nothing; they are in the list when it ends."""
        found = []
        self.cuda_on_host_note(1)
        try:
            yield found
        finally:
            lines = self.cuda_on_host_note(0).decode().splitlines()
        symbols = subprocess.run(["nm", "-C", self._name], capture_output=True, text=True, check=True).stdout
        names = {int(place, 16): name for place, name in re.findall(r"^(\w+) \w (.*)$", symbols, re.M)}
        for line in lines:
            place, *grid, threads, shared = map(int, line.split())
            found.append(Launch(kernel_name(names[place]), tuple(grid), threads, shared))

    def call(self, name: str, *args) -> None:
        """Raises RuntimeError with the report of a launch that failed."""
        if self[name](*args):
            raise RuntimeError(self.cuda_on_host_error().decode())


def fenced_memory(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """size bytes behind which nothing can be touched, and the bytes in front of them, all 0xa7.

    A kernel that goes behind them fails with its thread's number; one that writes before them leaves a trace there.
    """
    room = (size + 15) // 16 * 16  # so that they begin aligned
    begin = (room // mmap.PAGESIZE + 1) * mmap.PAGESIZE
    area = mmap.mmap(-1, begin + mmap.PAGESIZE)
    fence = ctypes.addressof(ctypes.c_char.from_buffer(area)) + begin
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    memory = torch.frombuffer(area, dtype=torch.uint8, count=begin).fill_(0xA7)
    return memory[begin - room : begin - room + size], memory[: begin - room]


@functools.cache
def op_on_host(name: str) -> tuple[Callable, HostLibrary]:
    """The CUDA kernel of an op behind its own binding, for CPU tensors, and the library that both are in."""
    torch_folder = Path(torch.__file__).parent
    includes = [torch_folder / "include", torch_folder / "include/torch/csrc/api/include"]
    flags = [f"-isystem{folder}" for folder in includes] + ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]
    flags += [f"-DPYSPEC_CUDA_LIBRARY(m)=STABLE_TORCH_LIBRARY_IMPL({NAMESPACE}, CPU, m)"]
    flags += [f"-L{torch_folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    sources = [HERE / "boundary.cpp", ROOT / f"csrc/cuda/{name}.cpp", ROOT / f"kernels/cuda/{name}.cu"]
    library = build_on_host(*sources, flags=tuple(flags))
    schema = str(getattr(torch.ops.pyspec, name).default._schema).removeprefix("pyspec::")
    _LIBRARY.define(schema)
    torch.ops.load_library(str(library))
    return getattr(getattr(torch.ops, NAMESPACE), name).default, HostLibrary(library)
