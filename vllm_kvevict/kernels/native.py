"""Finds the compiled CPU kernels (csrc/cpu) and describes their C interface to Python."""

import ctypes
import functools
import logging
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, cast

# torch must come first: it loads the OpenMP runtime that the kernels then share, threads and all
import torch  # noqa: F401

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]
POINTER, INT32, INT64, FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, loaded once per process, or None where they were not built (logged once).

    Every function takes raw pointers and reads memory unchecked: call the launchers of this folder instead.

    Raises OSError if the library is there but cannot be loaded.
    """
    # not importlib.util.find_spec: with an editable installation it also finds the library of another checkout
    spec = PathFinder.find_spec("_cpu", [str(PACKAGE)])
    if spec is None or spec.origin is None:
        logger.warning(
            "CPU kernels are not built: using their slower torch references. To build them, install a C++ compiler "
            "and reinstall, or run `python setup.py build_ext --inplace` in a checkout."
        )
        return None
    return ctypes.CDLL(spec.origin)


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
