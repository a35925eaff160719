"""Stand-ins for CUDA graphs on CPU tensors: a capture records what touches memory, a replay does that again.

What is recorded is what a GPU would be told, and no Python that tells it: operators of torch, those within an operator
that is written in Python included, launches of Triton's interpreter, calls of our compiled kernels, and of functions
that stand in for others'. As in a graph, a number is what it was at the capture, a tensor is the memory that it was in,
and a shape is the one that it had.

Stricter than a graph, which would read garbage: memory that was allocated during a capture is filled with ones before
each replay (NaN where it is read as floats), and memory from before it must still be there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor
from vllm.platforms import current_platform

from vllm_kvevict.kernels import native
from vllm_kvevict.kernels.interface import POINTER, SIGNATURES

Kernel = Callable[..., int]
_LAUNCH = GridExecutor.__call__
_DATA_PTR = torch.Tensor.data_ptr
# they read a tensor's values on the host, or the size of what they return is not known there
_WAITING = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim", "_unique2")
_ALLOCATING = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class CaptureError(RuntimeError):
    """Something was done during a capture that a graph cannot hold."""


class Memory:
    """A storage: kept if it was allocated during the capture, else only known by its address, as a graph knows it."""

    def __init__(self, storage: torch.UntypedStorage, is_graphs: bool) -> None:
        self.kept = storage if is_graphs else None
        self._weak = StorageWeakRef(storage)
        self._address = storage.data_ptr()

    def storage(self) -> torch.UntypedStorage:
        found = self.kept
        if found is None:
            found = torch.UntypedStorage._new_with_weak_ptr(self._weak.cdata)
        if found is None or found.data_ptr() != self._address:
            raise RuntimeError("a replay needs memory that has been freed since the capture")
        return found


@dataclass(frozen=True)
class Place:
    """Where a tensor was at the capture."""

    memory: Memory
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> torch.Tensor:
        return torch.empty(0, dtype=self.dtype).set_(self.memory.storage(), self.offset, self.size, self.stride)


class Memories:
    """All that a capture has seen, by the address of what torch knows of a storage."""

    def __init__(self) -> None:
        self._known: dict[int, Memory] = {}
        self._pointers: dict[int, Memory] = {}

    def of(self, tensor: torch.Tensor, is_graphs: bool = False) -> Memory:
        storage = tensor.untyped_storage()
        return self._known.setdefault(storage._cdata, Memory(storage, is_graphs))

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._known

    def place(self, tensor: torch.Tensor) -> Place:
        memory, offset = self.of(tensor), tensor.storage_offset()
        return Place(memory, tensor.dtype, offset, tuple(tensor.shape), tuple(tensor.stride()))

    def frozen(self, values: Any) -> Any:
        """Return ``values``, which may be nested, with the place of each tensor instead of it."""
        return _pytree.tree_map(self._frozen, values)

    def _frozen(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            # tensors of other layouts, such as packed weights, are seen by their own kernels alone
            return self.place(value) if value.layout == torch.strided else value
        if isinstance(value, _PLAIN) or type(value).__module__.startswith("triton.language"):
            return value
        raise CaptureError(f"a capture cannot hold {type(value).__qualname__}: nobody knows what memory it names")

    def note_pointer(self, tensor: torch.Tensor) -> int:
        address = _DATA_PTR(tensor)
        self._pointers[address] = self.of(tensor)
        return address

    def at(self, address: int) -> Memory:
        if address not in self._pointers:
            raise CaptureError("a compiled kernel got an address that no tensor of the capture has")
        return self._pointers[address]

    def graphs(self) -> list[torch.UntypedStorage]:
        return [memory.kept for memory in self._known.values() if memory.kept is not None]


def thawed(values: Any) -> Any:
    """Return what ``Memories.frozen`` was given: tensors that are in the same memory."""
    return _pytree.tree_map(lambda value: value.tensor() if isinstance(value, Place) else value, values)


@dataclass(frozen=True)
class Operator:
    """results: places of those results that are in memory of their own; None for the others, and what is no tensor"""

    call: torch._ops.OpOverload
    arguments: Any
    results: list[Place | None]

    def run(self) -> None:
        args, kwargs = thawed(self.arguments)
        for place, result in zip(self.results, _pytree.tree_leaves(self.call(*args, **kwargs)), strict=True):
            if place is not None:
                place.tensor().copy_(result)


@dataclass(frozen=True)
class Launch:
    executor: GridExecutor
    arguments: Any

    def run(self) -> None:
        args, kwargs = thawed(self.arguments)
        _LAUNCH(self.executor, *args, **kwargs)


@dataclass(frozen=True)
class KernelCall:
    kernel: Kernel
    arguments: tuple[Any, ...]
    memories: list[Memory]

    def run(self) -> None:
        storages = [memory.storage() for memory in self.memories]
        if self.kernel(*self.arguments) != 0:
            raise RuntimeError("a compiled kernel failed in a replay")
        del storages


@dataclass(frozen=True)
class StandInCall:
    function: Callable[..., Any]
    arguments: Any

    def run(self) -> None:
        args, kwargs = thawed(self.arguments)
        self.function(*args, **kwargs)


Work = Operator | Launch | KernelCall | StandInCall


class Recorder(TorchDispatchMode):
    """An open capture."""

    is_open: ClassVar[Recorder | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.work: list[Work] = []
        self.memories = Memories()
        self.constants: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        key = _key_of_python(func)
        if key is not None:
            with self:
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        self._check(func, args)
        arguments = self.memories.frozen((args, kwargs))
        output = func(*args, **kwargs)
        results = [self._place_of_new(leaf) for leaf in _pytree.tree_leaves(output)]
        is_work = func._schema.is_mutable or any(results)  # a view is none
        if is_work and _name(func) not in _ALLOCATING:
            self.work.append(Operator(func, arguments, results))
        return output

    def _check(self, func: torch._ops.OpOverload, args: tuple[Any, ...]) -> None:
        name = _name(func)
        tensors = [leaf for leaf in _pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        if name == "lift_fresh" and tensors[0].dim() == 0:  # a number that Python wrote
            self.constants += tensors
            return
        is_mask = name in ("index", "index_put", "index_put_") and any(t.dtype == torch.bool for t in tensors[1:])
        if name in _WAITING or is_mask or name == "lift_fresh":
            raise CaptureError(f"{func} during a capture: a GPU would be waited for")

    def _place_of_new(self, result: Any) -> Place | None:
        if not isinstance(result, torch.Tensor) or result in self.memories:
            return None
        self.memories.of(result, is_graphs=True)
        return self.memories.place(result)

    def launch(self, executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        """In place of ``GridExecutor.__call__``."""
        arguments = self.memories.frozen((args, kwargs))
        grid: tuple[int, ...] | None = executor.grid if not callable(executor.grid) else None

        def note_grid(values: Any) -> Any:
            nonlocal grid
            grid = original(values)
            return grid

        if grid is None:
            original, executor.grid = executor.grid, note_grid
        with _disable_current_modes():
            _LAUNCH(executor, *args, **kwargs)
            frozen = GridExecutor(executor.fn, executor.arg_names, grid, executor.pre_run_hooks)
        self.work.append(Launch(frozen, arguments))

    def stand_in(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        arguments = self.memories.frozen((args, kwargs))
        with _disable_current_modes():
            result = function(*args, **kwargs)
        self.work.append(StandInCall(function, arguments))
        return result

    def function(self, name: str, device: torch.device) -> Kernel | None:
        """In place of ``native.function``."""
        kernel = native.function.__wrapped__(name, device)
        if kernel is None:
            return None

        def call(*arguments: Any) -> int:
            pointers = [a for a, kind in zip(arguments, SIGNATURES[name], strict=True) if kind is POINTER and a]
            memories = [self.memories.at(address) for address in pointers]
            status = kernel(*arguments)
            self.work.append(KernelCall(kernel, arguments, memories))
            return status

        return call


def as_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function for others' compiled kernel, which writes to its arguments, as one that a graph launches."""

    def call(*args: Any, **kwargs: Any) -> Any:
        recorder = Recorder.is_open
        return function(*args, **kwargs) if recorder is None else recorder.stand_in(function, args, kwargs)

    return call


def _name(func: torch._ops.OpOverload) -> str:
    return func._schema.name.partition("::")[2]


def _key_of_python(func: torch._ops.OpOverload) -> torch._C.DispatchKey | None:
    """Return the key under which an operator is written in Python for CPU tensors, None if it is not."""
    namespace, _, name = func._schema.name.partition("::")
    overload = func._schema.overload_name
    path = f"{namespace}/{name}" + (f".{overload}" if overload else "")
    for key in ("CPU", "CompositeExplicitAutograd", "CompositeImplicitAutograd"):
        if f"{path}/{key}" in torch.library._impls and namespace != "aten":
            return getattr(torch._C.DispatchKey, key)
    return None


class Graph:
    """In place of ``torch.cuda.CUDAGraph``."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._recorded: Recorder | None = None
        self.num_replays = 0

    @property
    def work(self) -> list[Work]:
        if self._recorded is None:
            raise RuntimeError("nothing was captured")
        return self._recorded.work

    @property
    def num_bytes(self) -> int:
        """Of memory that was allocated during the capture."""
        return 0 if self._recorded is None else sum(each.nbytes() for each in self._recorded.memories.graphs())

    @contextmanager
    def capturing(self) -> Iterator[None]:
        if self._recorded is not None:
            raise RuntimeError("a graph is captured once")
        recorder = Recorder()
        modules = [module for name, module in sys.modules.items() if name.startswith("vllm_kvevict.")]
        with pytest.MonkeyPatch.context() as patched, recorder:
            patched.setattr(Recorder, "is_open", recorder)
            patched.setattr(GridExecutor, "__call__", lambda *args, **kwargs: recorder.launch(*args, **kwargs))
            patched.setattr(torch.Tensor, "data_ptr", lambda tensor: recorder.memories.note_pointer(tensor))
            for module in modules:
                if vars(module).get("function") is native.function and module is not native:
                    patched.setattr(module, "function", recorder.function)
            yield
        self._recorded = recorder

    @torch.inference_mode()
    def replay(self) -> None:
        if self._recorded is None:
            raise RuntimeError("nothing was captured")
        for storage in self._recorded.memories.graphs():
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(0xFF)
        for each in self._recorded.work:
            each.run()
        self.num_replays += 1

    def reset(self) -> None:
        self._recorded = None


class Capture:
    """In place of ``torch.cuda.graph``."""

    def __init__(self, cuda_graph: Graph, pool: Any = None, stream: Any = None, **_: Any) -> None:
        self._graph, self._stack = cuda_graph, ExitStack()

    def __enter__(self) -> None:
        self._stack.enter_context(self._graph.capturing())

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


@contextmanager
def graphs_on_cpu() -> Iterator[None]:
    """Inside, what asks torch for CUDA graphs gets the ones of this file."""
    platform = type(current_platform)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cuda, "CUDAGraph", Graph)
        patched.setattr(torch.cuda, "graph", Capture)
        patched.setattr(platform, "graph_pool_handle", staticmethod(lambda: (0, 1)), raising=False)
        patched.setattr(platform, "_global_graph_pool", None)
        yield
