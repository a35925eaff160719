"""Finds the compiled kernels (csrc/cpu, csrc/cuda) and describes their C interface to Python."""

import ctypes
import functools
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

# torch must come first: it loads the OpenMP runtime that the kernels then share, threads and all
import torch

from vllm_kvevict.kernels.interface import CUDA_SIGNATURES, INT32, SIGNATURES, declarations, digest

logger = logging.getLogger("vllm.kvevict")  # a child of vLLM's, which shows what it logs

PACKAGE = Path(__file__).parents[1]
# torch's: where torch has none of that name, the loader would take the system's, the second one of the process
RUNTIME = re.compile(rb"lib(?:gomp|cudart)\.so[.0-9]*")
Signatures = dict[str, tuple[Any, ...]]


def check(device: torch.device) -> None:
    """Load the compiled kernels for tensors on ``device``, so that the log says at a worker's start what is missing.

    Logs and raises as ``library`` and ``cuda_library`` do.
    """
    if device.type == "cuda":
        cuda_library()
    else:
        library()


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, loaded once per process, or None where they were not built (logged once).

    Every function takes raw pointers and reads memory unchecked: call the launchers of this folder instead.

    Raises RuntimeError if it was built from other declarations.
    """
    if not (PACKAGE / "_cpu.so").is_file():
        logger.warning(
            "CPU kernels are not built: using their slower torch references. To build them, install a C++ compiler "
            "and reinstall, or run `python setup.py build_ext --inplace` in a checkout."
        )
        return None
    return _load_or_log(PACKAGE / "_cpu.so", SIGNATURES)


@functools.cache
def cuda_library() -> ctypes.CDLL | None:
    """Return the compiled CUDA kernels as ``library`` does those of the CPU; without them Triton's run, unlogged."""
    path = PACKAGE / "_cuda.so"
    return _load_or_log(path, CUDA_SIGNATURES) if path.is_file() else None


def _load_or_log(path: Path, signatures: Signatures) -> ctypes.CDLL | None:
    try:
        return load(str(path), signatures)
    except OSError as error:
        logger.warning("%s cannot be loaded, and slower code runs in its place: %s", path, error)
        return None


def load(path: str, signatures: Signatures) -> ctypes.CDLL:
    """Return a library whose functions take the arguments that ``signatures`` say.

    Raises OSError if it cannot be loaded, or not without a second OpenMP or CUDA runtime, and RuntimeError if it was
    built from other declarations.
    """
    absent = [name for name in runtimes_of(path) if not _is_loaded(name)]
    if absent:
        raise OSError(f"it needs {' and '.join(absent)}, which torch has not brought into this process")
    found, expected = ctypes.CDLL(path), digest(declarations(signatures))
    built = "no digest"
    if hasattr(found, "kvevict_interface"):
        found.kvevict_interface.restype = ctypes.c_char_p
        built = found.kvevict_interface().decode()
    if built != expected:
        raise RuntimeError(
            f"{path}: expected a library of interface {expected}, got {built}: it was built from other sources. "
            f"Build it again with `python setup.py build_ext --inplace`, or reinstall the package"
        )
    return found


def runtimes_of(path: str) -> list[str]:
    """Return the OpenMP and CUDA runtimes that a library names."""
    return sorted({name.decode() for name in RUNTIME.findall(Path(path).read_bytes())})


def _is_loaded(name: str) -> bool:
    try:
        ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
    except OSError:
        return False
    return True


@functools.cache
def function(name: str, device: torch.device) -> Callable[..., int] | None:
    """Return the compiled function ``name`` for tensors on ``device``, whose status 0 means success.

    None where that is no CPU, or the kernels were not built.
    """
    kernels = library() if device.type == "cpu" else None
    if kernels is None:
        return None
    found: Any = getattr(kernels, name)
    found.argtypes, found.restype = SIGNATURES[name], INT32
    return cast("Callable[..., int]", found)


def pointers(*tensors: torch.Tensor | None) -> list[int | None]:
    """Return the addresses of tensors, null for those that there are not, as compiled functions take them."""
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


@functools.cache
def cuda_function(name: str) -> Callable[..., None]:
    """Return a function that launches ``name`` on the current stream of the current device.

    It raises RuntimeError if the launch fails. Raises RuntimeError itself where the CUDA kernels were not built.
    """
    kernels = cuda_library()
    if kernels is None:
        raise RuntimeError(f"{name}: the CUDA kernels are not built; that needs nvcc.")
    found: Any = getattr(kernels, name)
    found.argtypes, found.restype = CUDA_SIGNATURES[name], INT32

    def launch(*arguments: Any) -> None:
        status = found(*arguments, torch.cuda.current_stream().cuda_stream)
        if status != 0:
            raise RuntimeError(f"{name}: the launch failed with cudaError_t {status}.")

    return launch
