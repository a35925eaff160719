"""Runs a function of CPU tensors on the GPU, so that one test serves both."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch

HAS_GPU = torch.cuda.is_available()


class Mirror:
    """Copies of tensors on another device; views of one storage stay views of one storage.

    Lists, tuples and dataclasses are copied with what they hold; everything else is taken as it is.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def copy(self, tree: Any) -> Any:
        if isinstance(tree, torch.Tensor):
            return self._copy_tensor(tree)
        if isinstance(tree, list | tuple):
            copies = [self.copy(item) for item in tree]
            return type(tree)(*copies) if hasattr(tree, "_fields") else type(tree)(copies)
        if is_dataclass(tree) and not isinstance(tree, type):
            copy = object.__new__(type(tree))
            for field in fields(tree):
                object.__setattr__(copy, field.name, self.copy(getattr(tree, field.name)))
            return copy
        return tree

    def write_back(self) -> None:
        """Copy what the storages hold now to those they were copied from."""
        for original, copy in self._storages.values():
            original.copy_(copy)

    def _copy_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            copy = torch.empty(storage.nbytes(), dtype=torch.uint8, device=self._device).untyped_storage()
            copy.copy_(storage)
            self._storages[storage._cdata] = storage, copy
        empty = torch.empty(0, dtype=tensor.dtype, device=self._device)
        copy = self._storages[storage._cdata][1]
        return empty.set_(copy, tensor.storage_offset(), tensor.shape, tensor.stride())


def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` for CPU tensors: computed on the GPU; its result and what it changed come back."""

    @functools.wraps(function)
    def wrapper(*arguments: Any) -> Any:
        mirror = Mirror("cuda")
        result = function(*mirror.copy(arguments))
        mirror.write_back()
        return Mirror("cpu").copy(result)

    return wrapper
