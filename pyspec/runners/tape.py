"""Tapes: launches of the compiled CPU kernels, recorded once and then run by all threads in one call.

While a tape records, this thread's ops compute nothing: what they return has shape and dtype but no memory, so
anything but pyspec's ops and views of their results reads zeros. csrc/cpu/tape.h says how a tape lays out its memory.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from pyspec.ops._library import compiled_library


@cache
def _library() -> ctypes.CDLL:
    library = compiled_library()[0]
    library.pyspec_tape_begin.restype = ctypes.c_void_p
    library.pyspec_tape_end.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
    library.pyspec_tape_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.pyspec_tape_bytes.argtypes = [ctypes.c_void_p]
    library.pyspec_tape_bytes.restype = ctypes.c_int64
    library.pyspec_tape_free.argtypes = [ctypes.c_void_p]
    library.pyspec_tape_end.restype = library.pyspec_tape_run.restype = ctypes.c_char_p
    return library


class Arena:
    """Memory that tapes share which never run at the same time."""

    def __init__(self):
        self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def reserve(self, nbytes: int) -> None:
        """Makes it at least so large; what it held is lost."""
        if nbytes + 64 > self.memory.nbytes:
            self.memory = torch.empty(nbytes + 64, dtype=torch.uint8, device="cpu")

    @property
    def address(self) -> int:
        """Of the first byte, which is aligned to 64."""
        return -(-self.memory.data_ptr() // 64) * 64


class Tape:
    """What the ops in `program` launch, to be run again and again.

    Args:
        program: calls ops on tensors that outlive the tape, and returns some of their results. What changes between
            runs it reads from tensors on the CPU, whose shapes stay the same.
        arena: for the tensors in between.

    Attributes:
        results: where each run leaves what program returned.
        nbytes: that the tensors in between take of the arena.
        handle, arena: what those need who run it without Python, see run_address.
    """

    def __init__(self, program: Callable[[], Sequence[Tensor]], arena: Arena):
        library = _library()
        if library.pyspec_tape_is_recording():
            raise RuntimeError("a tape cannot be recorded here: this thread records one already")
        try:  # from before it begins: an interrupt may come at any time, and must not leave it open
            self.handle = library.pyspec_tape_begin()
            if self.handle is None:
                raise RuntimeError("a tape cannot be recorded here: there are no addresses left")
            self._free = weakref.finalize(self, library.pyspec_tape_free, self.handle)
            found = program()
            self.results = [torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu") for tensor in found]
            words = [
                (ctypes.c_void_p * len(found))(*(tensor.data_ptr() for tensor in tensors))
                for tensors in (found, self.results)
            ]
            error = library.pyspec_tape_end(self.handle, len(found), *words)
        finally:
            library.pyspec_tape_stop()
        if error:
            raise RuntimeError(error.decode())
        self.nbytes = library.pyspec_tape_bytes(self.handle)
        self.arena = arena
        arena.reserve(self.nbytes)
        self._run = library.pyspec_tape_run

    def run(self) -> list[Tensor]:
        """Runs the launches on all of torch's threads and returns `results`."""
        if error := self._run(self.handle, self.arena.address):
            raise RuntimeError(error.decode())
        return self.results


def run_address() -> int:
    """The address of the function that runs a tape, given its handle and its arena's address; it returns an error."""
    return ctypes.cast(_library().pyspec_tape_run, ctypes.c_void_p).value


def can_record() -> bool:
    """Whether ops on CPU tensors have compiled kernels now, which a tape needs."""
    from pyspec.ops import _library as ops

    return compiled_library()[0] is not None and ops._forced in (None, "compiled")
