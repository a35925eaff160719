"""What scoring and choosing may hold in memory, however long prompts are.

One bound serves twice: for what works on one tile of the heads of some requests, and for the scores that wait on the
device until all layers have them. It is the same for all models of a process, and no result depends on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from weakref import finalize

DEFAULT_MOST_BYTES = 2**26
# what belongs to one layer, or to one head while tokens are chosen, is held whatever it takes

_most_bytes = DEFAULT_MOST_BYTES
_num_held = 0


def set_most_bytes(num_bytes: int) -> None:
    """Change the bound, when an engine starts."""
    global _most_bytes
    _most_bytes = num_bytes


def most_bytes() -> int:
    """Return the bound in bytes."""
    return _most_bytes


def fits(num_bytes: int) -> bool:
    """Whether so much may be held at once."""
    return num_bytes <= _most_bytes


def holds(owner: object, num_bytes: int) -> bool:
    """Whether so much fits beside all that is held so already; if it does, it is counted until ``owner`` is gone."""
    global _num_held
    if not fits(_num_held + num_bytes):
        return False
    _num_held += num_bytes
    finalize(owner, _release, num_bytes)
    return True


def _release(num_bytes: int) -> None:
    global _num_held
    _num_held -= num_bytes


def tiles(num_bytes: Iterable[int]) -> list[tuple[int, int]]:
    """Return bounds of tiles that fit, as few as can be in order; one that does not fit is a tile of its own.

    num_bytes: of each of what is to be worked on, in order
    """
    bounds, first, total, end = [], 0, 0, 0
    for end, num in enumerate(num_bytes):
        if end > first and not fits(total + num):
            bounds.append((first, end))
            first, total = end, 0
        total += num
    return [*bounds, (first, end + 1)]
