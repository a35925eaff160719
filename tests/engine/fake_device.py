"""A device that cannot be waited for: tensors of a step have shapes and dtypes, and nothing to read.

Whatever would make the host wait for a GPU raises here: asking a tensor for its numbers, sizes that depend on them, and
copies that block. What the host knows by itself, tensors on the CPU and NumPy arrays, is as real as ever.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_kvevict.cache import staging
from vllm_kvevict.engine.worker.whole_rows import ON_HOST
from vllm_kvevict.kernels import operators

aten = torch.ops.aten
# operators that wait by themselves: a number is read, a size is counted
_WAITING = {
    aten._local_scalar_dense.default,
    aten.item.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
}
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index_put.default}


class WaitError(AssertionError):
    """The host would wait for the device."""


class _NoWaits(TorchDispatchMode):
    """Raises where fake tensors by themselves say nothing.

    What is made from no tensor is fake: on a GPU it would be made there, or could not be used beside the others.
    """

    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        touched = [each for each in leaves if isinstance(each, torch.Tensor)]
        on_device = [isinstance(each, FakeTensor) for each in touched]
        if any(on_device) and func in _WAITING:
            raise WaitError(f"{func} waits for the device")
        if any(on_device) and not all(fake or not each.dim() for fake, each in zip(on_device, touched, strict=True)):
            raise WaitError(f"{func} copies a tensor of the host to the device, or back, and waits for that")
        indices = args[1] if any(on_device) and func in _INDEXING else []
        if any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in indices):
            raise WaitError(f"{func} by a mask waits for the device")
        result = func(*args, **(kwargs or {}))
        is_made = not touched and isinstance(result, torch.Tensor)
        return self._device.of(result) if is_made else result


def _from_list(*_: Any, **__: Any) -> torch.Tensor:
    raise WaitError("a list becomes a tensor in memory that is not pinned, whose copy to a device waits")


class FakeDevice:
    """Moves tensors, and objects of ours that hold them, to a device that cannot be waited for, and back."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._undo: list[Callable[[], None]] = []

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self._mode.from_tensor(tensor)

    def move(self, holder: Any) -> None:
        """Move all tensors that an object of ours holds, itself or through other objects of ours."""
        seen: set[int] = set()
        self._move(holder, seen)

    def _move(self, holder: Any, seen: set[int]) -> None:
        if id(holder) in seen or not type(holder).__module__.startswith("vllm_kvevict"):
            return
        seen.add(id(holder))
        for name, value in list(getattr(holder, "__dict__", {}).items()):
            moved = self._moved(value, seen)
            if moved is not value:
                object.__setattr__(holder, name, moved)
                self._undo.append(lambda name=name, value=value: object.__setattr__(holder, name, value))

    def _moved(self, value: Any, seen: set[int]) -> Any:
        if isinstance(value, torch.Tensor):
            return self.of(value)
        if isinstance(value, tuple | list) and any(isinstance(each, torch.Tensor) for each in value):
            moved = [self._moved(each, seen) for each in value]
            return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
        if isinstance(value, dict):
            for each in value.values():
                self._move(each, seen)
        self._move(value, seen)
        return value

    def metadata(self, common: Any) -> Any:
        """Return vLLM's description of a batch with its device's part on this device; what is said to be the CPU's,
        and NumPy arrays, stay.
        """
        on_device = {
            field.name: self.of(value)
            for field in dataclasses.fields(common)
            if isinstance(value := getattr(common, field.name), torch.Tensor)
            and "cpu" not in field.name
            and field.name not in ON_HOST
        }
        return dataclasses.replace(common, **on_device)

    @contextmanager
    def without_waits(self) -> Iterator[None]:
        """Inside, kernels only return tensors of the right shape, and waiting raises ``WaitError`` or torch's own."""
        to_device = staging.to_device
        with pytest.MonkeyPatch.context() as patch:
            for name, module in list(sys.modules.items()):
                if name.startswith("vllm_kvevict.") and vars(module).get("to_device") is to_device:
                    patch.setattr(module, "to_device", lambda values, device: self.of(torch.from_numpy(values)))
            for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch.Tensor, "new_tensor")):
                patch.setattr(owner, name, _from_list)
            patch.setattr(operators, "is_tracing", lambda: True)  # calls become calls of the operators
            with _NoWaits(self):
                yield

    def restore(self) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
