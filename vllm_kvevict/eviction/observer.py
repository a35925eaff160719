"""Who looks on while requests are evicted: the inspector, studies and tests. In a server nobody does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from vllm_kvevict.cache.compaction import Compaction
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.plan import EvictionPlan
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.foreign.code import contained


@dataclass(frozen=True)
class Choice:
    """What one eviction keeps, and by which scores. The tensors are the eviction's own, on its device.

    scores: [num_layers, num_kv_heads, num_tokens] float32, the policy's, before protection
    kept:   [num_layers, num_kv_heads, num_tokens] bool
    """

    method: Method
    plan: EvictionPlan
    pool: PagePool
    scores: torch.Tensor
    kept: torch.Tensor


class EvictionObserver:
    """Looks on while requests are evicted for the first time. It reads what it is shown, and copies what it will need.

    It cannot harm an eviction, nor take any of its time: it is called between the verbs, outside of the time that an
    eviction reports. If it raises, it is shown no more, and ``observed_by`` raises its error.
    """

    def chosen(self, choice: Choice) -> None:
        """A request keeps ``choice``. Nothing has moved."""

    def compacted(self, choice: Choice, compaction: Compaction, seconds: float) -> None:
        """What was kept has moved.

        seconds: what the eviction took in all
        """


@contextmanager
def observed_by(observer: EvictionObserver) -> Iterator[None]:
    """Show ``observer`` every eviction of this process while the context is open, in the thread that evicts.

    Raises what the observer has raised, when the context is left.
    """
    guarded = _Guarded(observer)
    _observers.append(guarded)
    try:
        yield
    finally:
        _observers.remove(guarded)
    if guarded.error is not None:
        raise guarded.error


def is_observed() -> bool:
    """Whether anybody looks on."""
    return bool(_observers)


def show(event: Callable[[EvictionObserver], None]) -> None:
    """Let all observers have their part in an event; ``event`` calls one of them."""
    for observer in tuple(_observers):
        observer.show(event)


class _Guarded:
    """An observer whose error goes no further; it is shown nothing after that."""

    def __init__(self, observer: EvictionObserver) -> None:
        self._observer = observer
        self.error: BaseException | None = None

    def show(self, event: Callable[[EvictionObserver], None]) -> None:
        if self.error is None:
            with contained(self._fail):
                event(self._observer)

    def _fail(self, error: BaseException) -> None:
        self.error = error


_observers: list[_Guarded] = []
