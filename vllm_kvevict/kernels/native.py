"""Finds the compiled CPU kernels (csrc/cpu) and describes their C interface to Python."""

import ctypes
import functools
import logging
from importlib.machinery import PathFinder
from pathlib import Path

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
    kernels = ctypes.CDLL(spec.origin)
    kernels.kvevict_window_attention.argtypes = [
        *(POINTER, INT64, INT64),  # query: data, strides
        *(POINTER, INT64, INT64, INT64),  # keys: data, strides
        *(POINTER, INT64),  # page_table: data, stride of a head
        POINTER,  # column_sums
        *(INT32, INT32, INT64, INT64, INT64, INT64, INT64, INT64, FLOAT),  # dtypes, sizes, scale
    ]
    kernels.kvevict_window_attention.restype = INT32
    kernels.kvevict_limit_lanes.argtypes = [INT32]
    kernels.kvevict_limit_lanes.restype = INT32
    kernels.kvevict_move_tokens.argtypes = [
        *(POINTER, INT64, INT64, INT64, INT64),  # keys: data, strides, head_size
        *(POINTER, INT64, INT64, INT64, INT64),  # values: data, strides, head_size
        *(POINTER, POINTER, INT64),  # source, destination, num_tokens
        *(INT64, INT64),  # block_size, element_bytes
    ]
    kernels.kvevict_move_tokens.restype = INT32
    return kernels
