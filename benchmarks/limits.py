"""What the processor can do at most, measured: the limits that the kernels' benchmarks name their share of."""

import functools
from collections.abc import Callable

import torch

from benchmarks.timing import measure

COPIED_BYTES = 512 * 2**20  # twice the last level cache of the largest processors we know
MATRIX_SIZE = 2048
ROUNDS = 3


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second, read and written counted both, of a copy that no cache holds, by all threads."""
    source = torch.ones(COPIED_BYTES // 4)
    target = torch.zeros_like(source)
    return 2 * COPIED_BYTES / _least_seconds(lambda: target.copy_(source))


@functools.cache
def matrix_rate(dtype: torch.dtype = torch.float32) -> float:
    """Floating point operations per second of a large matrix product, by all threads."""
    left, right = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE).to(dtype)
    product = torch.empty_like(left)
    return 2 * MATRIX_SIZE**3 / _least_seconds(lambda: torch.mm(left, right, out=product))


def _least_seconds(call: Callable[[], object]) -> float:
    # the best of a few medians: whatever else runs meanwhile only takes from a limit
    return min(measure(call, 5).median for _ in range(ROUNDS))


def shares(seconds: float, num_bytes: float = 0, operations: float = 0) -> str:
    """Say which share of each limit a call reaches that moves so many bytes and computes so many operations."""
    parts = []
    if num_bytes:
        limit = copy_bandwidth()
        parts.append(f"{num_bytes / seconds / limit:.1%} of the copy bandwidth, {limit / 1e9:.1f} GB/s")
    if operations:
        limit = matrix_rate()
        parts.append(f"{operations / seconds / limit:.1%} of the float32 matrix rate, {limit / 1e9:.0f} GFLOP/s")
    return "; ".join(parts)
