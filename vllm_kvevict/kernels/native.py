"""Finds the compiled kernels (csrc/cpu, csrc/cuda) and describes their C interface to Python."""

import ctypes
import functools
import logging
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, cast

# torch must come first: it loads the OpenMP runtime that the kernels then share, threads and all
import torch

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]
POINTER, INT32, INT64, FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, loaded once per process, or None where they were not built (logged once).

    Every function takes raw pointers and reads memory unchecked: call the launchers of this folder instead.

    Raises OSError if the library is there but cannot be loaded.
    """
    found = _find("_cpu")
    if found is None:
        logger.warning(
            "CPU kernels are not built: using their slower torch references. To build them, install a C++ compiler "
            "and reinstall, or run `python setup.py build_ext --inplace` in a checkout."
        )
    return found


@functools.cache
def cuda_library() -> ctypes.CDLL | None:
    """Return the compiled CUDA kernels as ``library`` does those of the CPU; without them Triton's run, unlogged."""
    return _find("_cuda")


def _find(module: str) -> ctypes.CDLL | None:
    # not importlib.util.find_spec: with an editable installation it also finds the library of another checkout
    spec = PathFinder.find_spec(module, [str(PACKAGE)])
    return None if spec is None or spec.origin is None else ctypes.CDLL(spec.origin)


@functools.cache
def function(name: str, *argtypes: Any) -> Callable[..., int] | None:
    """Return the compiled function ``name``, whose status 0 means success; None where the kernels were not built.

    argtypes: of its arguments, ``POINTER`` for the data of a tensor

    Raises AttributeError if the library was built before the function was written; build it again then.
    """
    kernels = library()
    if kernels is None:
        return None
    found: Any = getattr(kernels, name)
    found.argtypes, found.restype = argtypes, INT32
    return cast("Callable[..., int]", found)


@functools.cache
def cuda_function(name: str, *argtypes: Any) -> Callable[..., None]:
    """Return a function that launches ``name`` on the current stream of the current device.

    It raises RuntimeError if the launch fails. Raises RuntimeError itself where the CUDA kernels were not built.
    """
    kernels = cuda_library()
    if kernels is None:
        raise RuntimeError(f"{name}: the CUDA kernels are not built; that needs nvcc.")
    found: Any = getattr(kernels, name)
    found.argtypes, found.restype = (*argtypes, POINTER), INT32

    def launch(*arguments: Any) -> None:
        status = found(*arguments, torch.cuda.current_stream().cuda_stream)
        if status != 0:
            raise RuntimeError(f"{name}: the launch failed with cudaError_t {status}.")

    return launch
