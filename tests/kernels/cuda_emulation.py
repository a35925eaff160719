"""The CUDA kernels emulated on the CPU: built once per process, if there is a C++ compiler."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from vllm_kvevict.kernels import select as selecting
from vllm_kvevict.kernels.interface import SIGNATURES
from vllm_kvevict.kernels.native import pointers

COMPILER = shutil.which("c++") or shutil.which("g++")
SOURCE = Path(__file__).with_suffix(".cpp")


@functools.cache
def emulation() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "emulation.so"
        subprocess.run([COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", SOURCE, "-o", built], check=True)
        return ctypes.CDLL(built)


def select(
    scores: torch.Tensor,
    num_kept: torch.Tensor,
    num_sink: int = 0,
    num_recent: int = 0,
    kv_lens: torch.Tensor | None = None,
) -> torch.Tensor:
    scores, num_kept, kv_lens = selecting._contiguous(scores, num_kept, kv_lens)
    kept = torch.empty(scores.shape, dtype=torch.bool)
    function = emulation().emulated_select
    function.argtypes, function.restype = SIGNATURES["kvevict_select"], None
    function(*pointers(scores, num_kept, kv_lens, kept), num_kept.numel(), scores.shape[-1], num_sink, num_recent)
    return kept


def move_tokens(keys: torch.Tensor, values: torch.Tensor, source: torch.Tensor, destination: torch.Tensor) -> None:
    function = emulation().emulated_move_tokens
    function.argtypes, function.restype = SIGNATURES["kvevict_move_tokens"], None
    function(
        keys.data_ptr(), *keys.stride(), keys.shape[2],
        values.data_ptr(), *values.stride(), values.shape[2],
        source.data_ptr(), destination.data_ptr(), source.numel(), keys.shape[1], keys.element_size(),
    )  # fmt: skip
