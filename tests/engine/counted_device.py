"""A device whose work is counted: its tensors have numbers, and whoever reads them on the host has waited.

Unlike on ``FakeDevice`` whole steps run here as ever, and evict what they evict. vLLM's own kernels run beside it, and
are not counted.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadataBuilder

from tests.engine.fake_device import FakeDevice
from tests.launches import VIEWS, is_waiting
from vllm_kvevict.cache import staging
from vllm_kvevict.engine.worker.backends.base import EvictionImpl, EvictionMetadata, EvictionMetadataBuilder
from vllm_kvevict.engine.worker.backends.cpu import EvictionCPUImpl, EvictionCPUMetadataBuilder, SchedulerMetadata
from vllm_kvevict.engine.worker.bridge import EvictionBridge
from vllm_kvevict.engine.worker.model import ModelWeights
from vllm_kvevict.kernels import operators
from vllm_kvevict.kernels.rotary import Rotary
from vllm_kvevict.policies import Need
from vllm_kvevict.policies.inputs import LayerWeights

_READS = (torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.item)
_FROM_LISTS = (torch.tensor, torch.as_tensor)


@dataclasses.dataclass
class Work:
    """Of one step: the operators that were launched, and what the host has waited for."""

    launches: Counter[str] = dataclasses.field(default_factory=Counter)
    waits: list[str] = dataclasses.field(default_factory=list)


class OnDevice(torch.Tensor):
    """A tensor of the device."""

    work: Work
    tensor: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, tensor: torch.Tensor, work: Work) -> OnDevice:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            tensor.shape,
            strides=tensor.stride(),
            storage_offset=tensor.storage_offset(),
            dtype=tensor.dtype,
            device=tensor.device,
        )

    def __init__(self, tensor: torch.Tensor, work: Work) -> None:
        self.tensor, self.work = tensor, work

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        work, name = next(each.work for each in leaves if isinstance(each, OnDevice)), func.overloadpacket.__name__
        if name not in VIEWS:
            work.launches[name] += 1
        of_host = any(not isinstance(each, OnDevice) and each.dim() and each.numel() for each in leaves)
        if of_host or is_waiting(func, args, kwargs or {}):
            work.waits.append(name)
        result = func(*on_host(args), **on_host(kwargs or {}))
        return tree_map_only(torch.Tensor, lambda tensor: OnDevice(tensor, work), result)


def on_host(value: Any) -> Any:
    """Return ``value`` with its tensors as they are, where vLLM's kernels find them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: on_host(getattr(value, name)) for name in fields})
    return tree_map_only(OnDevice, lambda each: each.tensor, value)


class _MadeThere(TorchFunctionMode):
    """What is made for a device is on this one, and what is read of it is waited for."""

    def __init__(self, device: CountedDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READS and isinstance(args[0], OnDevice):
            self._device.work.waits.append(func.__name__)
            return func(args[0].tensor, *args[1:], **kwargs)
        result = func(*args, **kwargs)
        if kwargs.get("device") is None or not isinstance(result, torch.Tensor) or isinstance(result, OnDevice):
            return result
        self._device.work.launches[func.__name__] += 1
        if func in _FROM_LISTS:
            self._device.work.waits.append(func.__name__)
        return self._device.of(result)


class CountedDevice(FakeDevice):
    """Runs our part of an engine's steps on such a device.

    work: of the present step
    """

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, OnDevice) else OnDevice(tensor, self.work)

    def back(self, holder: Any) -> None:
        """Move everything that an object of ours holds back to the host."""
        to_there, self.of = self.of, on_host  # type: ignore[method-assign]
        try:
            self.move(holder)
        finally:
            self.of = to_there  # type: ignore[method-assign]
            self._undo.clear()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, what is made on a device is made on this one."""
        to_device, to_host = staging.to_device, staging.to_host

        def copied_there(values: Any, _: torch.device) -> torch.Tensor:
            self.work.launches["to_device"] += 1
            return self.of(torch.from_numpy(values))

        def copied_back(tensor: torch.Tensor) -> torch.Tensor:
            self.work.waits.append("to_host")
            return on_host(tensor)

        with pytest.MonkeyPatch.context() as patch:
            for name, module in list(sys.modules.items()):
                for function, copied in ((to_device, copied_there), (to_host, copied_back)):
                    if name.startswith("vllm_kvevict.") and vars(module).get(function.__name__) is function:
                        patch.setattr(module, function.__name__, copied)
            patch.setattr(operators, "is_tracing", lambda: True)  # calls become calls of the operators
            with _MadeThere(self):
                yield

    @contextmanager
    def serving(self, bridge: EvictionBridge, stepped: Callable[[Work], None]) -> Iterator[None]:
        """Inside, the steps of an engine run on this device; ``stepped`` hears of each, when it is over."""
        build, forward, end_step = EvictionMetadataBuilder.build, EvictionImpl.forward, bridge.end_step
        build_whole, attend_whole = CPUAttentionMetadataBuilder.build, CPUAttentionBackendImpl.forward
        attend_folded = EvictionCPUImpl.attend_folded

        def build_here(builder: EvictionMetadataBuilder, prefix: int, common: Any, fast_build: bool = False) -> Any:
            if builder.bridge is None or builder.bridge.step.is_over:
                return build(builder, prefix, common, fast_build)
            self.work = Work()
            self.move(bridge)
            with self.at_work():
                return build(builder, prefix, self.metadata(common), fast_build)

        def forward_here(impl: Any, layer: Any, *arguments: Any, output: torch.Tensor, **scales: Any) -> Any:
            if not isinstance(arguments[4], EvictionMetadata):
                return forward(impl, layer, *arguments, output=output, **scales)
            there = [self.of(each) if isinstance(each, torch.Tensor) else each for each in (*arguments, output)]
            with self.at_work():
                return on_host(forward(impl, layer, *there))

        def end_step_here() -> Any:
            try:
                with self.at_work():
                    return end_step()
            finally:
                self.back(bridge)
                stepped(self.work)

        def attend_whole_here(impl: Any, layer: Any, *arguments: Any) -> Any:
            with torch._C.DisableTorchFunction():
                attend_whole(impl, layer, *map(on_host, arguments))
            return arguments[5]

        weights_of = ModelWeights.of

        def weights_here(weights: ModelWeights, layer: int, needs: frozenset[Need]) -> LayerWeights:
            found = weights_of(weights, layer, needs)
            rotary = found.rotary and Rotary(self.of(found.rotary.cos_sin), found.rotary.is_neox_style)
            return dataclasses.replace(found, rotary=rotary)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ModelWeights, "of", weights_here)
            patch.setattr(EvictionMetadataBuilder, "build", build_here)
            patch.setattr(EvictionImpl, "forward", forward_here)
            patch.setattr(bridge, "end_step", end_step_here)
            patch.setattr(
                CPUAttentionMetadataBuilder,
                "build",
                lambda builder, prefix, common, *rest: build_whole(builder, prefix, on_host(common), *rest),
            )
            patch.setattr(CPUAttentionBackendImpl, "forward", attend_whole_here)
            # of CPU attention, which has no device to wait for
            patch.setattr(EvictionCPUMetadataBuilder, "_launch", lambda builder, _: SchedulerMetadata(builder, None))
            patch.setattr(EvictionCPUImpl, "attend_folded", lambda *arguments: attend_folded(*map(on_host, arguments)))
            yield
