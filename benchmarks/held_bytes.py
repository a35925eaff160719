"""Counts the memory that tensors hold, those made inside a context."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from vllm_kvevict.cache import staging
from vllm_kvevict.eviction import held_scores


class HeldBytes(TorchDispatchMode):
    """now, most: bytes that tensors made inside this context hold at once"""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor.untyped_storage(), inputs)
        return result

    def _hold(self, storage: Any, inputs: set[int]) -> None:
        if storage._cdata in inputs or storage._cdata in self._seen:
            return  # a view, or an operation in place
        self._seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())

    def _release(self, key: int, num_bytes: int) -> None:
        self._seen.remove(key)
        self.now -= num_bytes


@contextmanager
def held_bytes() -> Iterator[HeldBytes]:
    """Count as on a device: what waits on the host does not count there."""

    def on_host(*arguments: Any) -> torch.Tensor:
        with _disable_current_modes():
            return staging.on_host(*arguments)

    with patch.object(held_scores, "on_host", on_host), HeldBytes() as held:
        yield held
