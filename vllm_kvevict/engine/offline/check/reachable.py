"""What the objects of a worker really hold, for comparison with what was counted."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch


def storages(root: Any) -> dict[int, int]:
    """Return the bytes of every tensor storage that objects of the project reach from ``root``, by its address."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    todo = [root]
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(one, dict):
            todo += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set | frozenset):
            todo += one
        elif type(one).__module__.startswith("vllm_kvevict"):
            todo += vars(one).values() if hasattr(one, "__dict__") else ()
            todo += [getattr(one, each.name) for each in fields(one)] if is_dataclass(one) else ()
    found.pop(0, None)  # empty tensors
    return found


def bridges_of(worker: Any) -> list[Any]:
    """Return those of the model of a worker, and of its draft model if it has one."""
    return [bridge for bridge in (worker.eviction, worker.draft_eviction) if bridge is not None]


def held_beside_cache(worker: Any) -> int:
    """Return the bytes of all that our objects of a worker hold, but for the cache and the weights of the model."""
    ours = storages([worker.eviction, worker.draft_eviction, worker.side_memory])
    models = [worker.model_runner.get_model()] + ([worker.get_draft_model()] if worker.draft_eviction else [])
    tensors = [tensor for model in models for tensor in (*model.state_dict().values(), *model.buffers())]
    theirs = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    theirs |= {bridge.pool.pages.untyped_storage().data_ptr() for bridge in bridges_of(worker)}
    return sum(size for address, size in ours.items() if address not in theirs)
