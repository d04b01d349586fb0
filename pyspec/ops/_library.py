"""How an op is found: one schema, several implementations, torch's own dispatch by device.

Schemas and fakes are defined here, in Python, once. The compiled libraries only implement them, one for CPU
tensors and one for CUDA tensors; there Triton has the other ops. So an install without a compiler works on the
reference, slowly, and says so once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from pyspec.ops._checks import BadData

_LIBRARY = torch.library.Library("pyspec", "DEF")
_FOLDER = Path(__file__).parent.parent / "lib"
_BACKENDS = ("reference", "compiled", "triton", "cuda")
_OPS: dict[str, Op] = {}
_forced: str | None = None


@functools.cache
def compiled_library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled CPU library and where it is, or None and the reason."""
    library, where = _load(
        "libpyspec_cpu.so", "was not built (no C++ compiler at install, or an isolated build without torch)"
    )
    if library is not None:
        for name in ("name", "reason", "available", "compiled", "found"):
            getattr(library, f"pyspec_isa_{name}").restype = ctypes.c_char_p
    return library, where


def instruction_sets() -> dict[str, list[str] | str]:
    """The instruction sets that CPU kernels were compiled for, those that this processor has, and the one in use.

    Empty where the compiled library is not there.

    Raises:
        ValueError: PYSPEC_ISA names one that was not compiled or that this processor lacks.
    """
    library, _ = compiled_library()
    if library is None:
        return {}
    compiled, found, available = (
        getattr(library, f"pyspec_isa_{name}")().decode().split(", ") for name in ("compiled", "found", "available")
    )
    used = library.pyspec_isa_name().decode()
    if used not in available:
        raise ValueError(f"PYSPEC_ISA must be one of {', '.join(available)} on this processor, got {used}")
    return {"compiled": compiled, "found": found, "used": used, "reason": library.pyspec_isa_reason().decode()}


@functools.cache
def cuda_library() -> tuple[ctypes.CDLL | None, str]:
    """The library of CUDA C++ kernels and what it was compiled for, or None and the reason."""
    library, where = _load(
        "libpyspec_cuda.so", "was not built (it is in no wheel: from source, it takes nvcc and a torch with CUDA)"
    )
    if library is not None:
        library.pyspec_cuda_architectures.restype = ctypes.c_char_p
        where = f"compiled for sm_{library.pyspec_cuda_architectures().decode()}"
    return library, where


def _load(name: str, missing: str) -> tuple[ctypes.CDLL | None, str]:
    path = _FOLDER / name
    if not path.exists():
        return None, f"{name} {missing}"
    try:
        library = ctypes.CDLL(str(path))
        torch.ops.load_library(str(path))
    except OSError as error:  # load_library hides the reason that dlopen gave, CDLL shows it
        return None, (
            f"{name} does not load in torch {torch.__version__} on {platform.machine()}: {error}. It takes torch 2.10 "
            "or later and the wheel of this processor: pip install --force-reinstall pyspec-kernels 'torch>=2.10'"
        )
    return library, str(path)


@functools.cache
def _triton_reason() -> str | None:
    """None where Triton can be imported, else why not."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton is not installed ({error})"
    return None


class Op:
    """One op of torch.ops.pyspec: its overload, its reference, and which backend serves which device.

    Args:
        name: the op's name in every folder.
        schema: arguments and results in torch's schema language, without the name.
        reference: plain PyTorch with the schema's arguments; the specification.
        fake: shapes and dtypes of the results, for tracing.
        triton: loads and returns the Triton launcher; called on first use on a CUDA tensor.
        cuda: whether the op's GPU kernel is in the library of CUDA C++ kernels.
        check: of the same arguments, raises BadData where numbers that they hold point outside of a tensor. It is for
            the reference; compiled kernels check for themselves on the CPU, and nothing does on a GPU, where looking
            would mean waiting.
        gradient: setup_context and backward, as torch.library.register_autograd takes them; without, an argument that
            wants a gradient is refused.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        reference: Callable,
        fake: Callable,
        triton: Callable | None = None,
        *,
        cuda: bool = False,
        check: Callable | None = None,
        gradient: tuple[Callable, Callable] | None = None,
    ):
        self.name = name
        self.reference = reference
        self._check = check
        self._triton = triton
        self._cuda = cuda
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        torch.library.register_fake(f"pyspec::{name}", fake, lib=_LIBRARY)
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        self.compiled = compiled_library()[0] is not None and has_kernel(f"pyspec::{name}", "CPU")
        if not self.compiled:
            _LIBRARY.impl(name, self._slow_reference, "CPU")
        self.compiled_cuda = cuda and cuda_library()[0] is not None and has_kernel(f"pyspec::{name}", "CUDA")
        if not self.compiled_cuda:
            _LIBRARY.impl(name, self._on_cuda, "CUDA")
        self.overload = getattr(torch.ops.pyspec, name).default
        self._differentiable = None
        if gradient is None:
            _LIBRARY.impl(name, self._on_autograd, "Autograd", with_keyset=True)
        else:
            setup, backward = gradient
            torch.library.register_autograd(f"pyspec::{name}", backward, setup_context=setup, lib=_LIBRARY)
            methods = {"forward": self._below_autograd, "setup_context": setup, "backward": backward}
            methods = {key: staticmethod(method) for key, method in methods.items()}
            self._differentiable = type(name, (torch.autograd.Function,), methods)
        _OPS[name] = self

    def __call__(self, *args):
        if torch.compiler.is_compiling():
            return self.overload(*args) if _forced is None else self._forced_call(*args)
        try:
            if _forced is None and torch.is_inference_mode_enabled():  # where autograd is not, and recordings are made
                return self.overload(*args)
            if self._differentiable is not None and wants_gradient(args):
                return self._differentiable.apply(*args)
            self._refuse_gradients(args)
            return self._below_autograd(*args)
        except RuntimeError as error:
            # what STD_TORCH_CHECK of a binding says, behind the place in its source
            if message := re.fullmatch(r"\w+, \S+:\d+, (.*)", str(error), re.DOTALL):
                raise BadData(message[1]) from None
            raise

    def _below_autograd(self, *args):
        with torch._C._AutoDispatchBelowAutograd():  # _on_autograd costs as much as a small kernel
            return self.overload(*args) if _forced is None else self._forced_call(*args)

    def _on_autograd(self, keyset, *args):
        self._refuse_gradients(args)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def _refuse_gradients(self, args) -> None:
        if wants_gradient(args):
            names = (argument.name for argument in self.overload._schema.arguments)
            refuse_gradients(self.name, **dict(zip(names, args, strict=False)))

    def _run_reference(self, *args):
        if self._check is not None:
            self._check(*args)
        return outside_autocast(self.reference)(*args)

    def _slow_reference(self, *args):
        _warn_slow(compiled_library()[1])
        return self._run_reference(*args)

    def _on_cuda(self, *args):
        name, reason = self.backend_for("cuda")
        if name == "reference":
            _warn_slow(reason)
            return self._run_reference(*args)
        return self._triton()(*args)

    def _forced_call(self, *args):
        if _forced == "reference":
            return self.reference(*args) if torch.compiler.is_compiling() else self._run_reference(*args)
        device = _device_of(args)
        name, reason = self.backend_for(device)
        if name != _forced:
            raise RuntimeError(f"backend {_forced!r} was asked for but {self.name} on {device} has {name!r}: {reason}")
        return self.overload(*args)

    def backend_for(self, device: str) -> tuple[str, str]:
        """The backend that serves a device type, and why."""
        if device == "cpu":
            library, where = compiled_library()
            if self.compiled:
                return "compiled", f"{library.pyspec_isa_name().decode()}: {library.pyspec_isa_reason().decode()}"
            return "reference", where if library is None else "the compiled library does not have it"
        if self._cuda:
            library, where = cuda_library()
            if self.compiled_cuda:
                return "cuda", where
            return "reference", where if library is None else "the library of CUDA kernels does not have it"
        if self._triton is None:
            return "reference", f"{self.name} has no GPU kernel"
        missing = _triton_reason()
        return ("reference", missing) if missing else ("triton", "compiled at first use")


def outside_autocast(function: Callable) -> Callable:
    """A function of tensors in their own dtypes: PyTorch's ops inside do not see the caller's autocast."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with torch.autocast(_device_of((*args, *kwargs.values())), enabled=False):
            return function(*args, **kwargs)

    return call


def wants_gradient(args) -> bool:
    """Whether autograd is to follow a call with these arguments."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args)


def refuse_gradients(op: str, **arguments) -> None:
    """Raises RuntimeError where an argument, a tensor or a list of them, wants a gradient, which op does not have."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        for name, value in arguments.items():
            if torch._C._any_requires_grad(value):
                raise RuntimeError(
                    f"{name} must not require a gradient, pyspec.ops.{op} has none: call it under torch.no_grad() or "
                    f"with {name}.detach()"
                )


def _device_of(args) -> str:
    return next(arg.device.type for arg in args if isinstance(arg, torch.Tensor))


@functools.cache
def _warn_slow(reason: str) -> None:
    warnings.warn(f"pyspec runs on its slow reference implementation: {reason}", RuntimeWarning, stacklevel=4)


def backends() -> list[dict[str, str]]:
    """Which implementation serves each op on each device: op, device, backend and reason."""
    return [backend_of(op, device) for op in _OPS for device in ("cpu", "cuda")]


def backend_of(op: str, device: str) -> dict[str, str]:
    """The row of `backends` of one op on one device."""
    name, reason = _OPS[op].backend_for(device)
    return {"op": op, "device": device, "backend": name, "reason": reason}


def _checked_backend(name: str | None, where: str) -> str | None:
    if name is not None and name not in _BACKENDS:
        raise ValueError(f"{where} must be one of {', '.join(_BACKENDS)}, got {name!r}")
    return name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Asks for one backend ("reference", "compiled", "triton" or "cuda"); an op that lacks it raises RuntimeError.

    "compiled" is C++ for CPU tensors; "triton" and "cuda" are for CUDA tensors, and every op has at most one of them.

    The environment variable PYSPEC_BACKEND does the same for a whole process.
    """
    global _forced
    previous, _forced = _forced, _checked_backend(name, "backend")
    try:
        yield
    finally:
        _forced = previous


_forced = _checked_backend(os.environ.get("PYSPEC_BACKEND") or None, "PYSPEC_BACKEND")
