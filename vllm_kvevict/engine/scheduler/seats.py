"""Places for requests whose last queries the workers remember: there is memory for so many, and the next one waits."""

from __future__ import annotations

from collections.abc import Collection


class Seats:
    """Who has one of ``num_seats``. One that is offered in a step is taken if the request runs in it."""

    def __init__(self, num_seats: int) -> None:
        self._num_seats = num_seats
        self._taken: set[str] = set()
        self._offered: set[str] = set()

    def __len__(self) -> int:
        """How many there are."""
        return self._num_seats

    @property
    def num_taken(self) -> int:
        """How many requests have one."""
        return len(self._taken)

    def forget_offers(self) -> None:
        """A step begins: what was offered in the last one and not taken is free."""
        self._offered.clear()

    def offer(self, req_id: str) -> bool:
        """Return whether there is a seat for a request that waits."""
        if len(self._taken) + len(self._offered - {req_id}) >= self._num_seats:
            return False
        self._offered.add(req_id)
        return True

    def take(self, running: Collection[str]) -> None:
        """Those of the requests that run in this step take the seats that they were offered."""
        self._taken |= self._offered.intersection(running)

    def give_back(self, req_id: str) -> None:
        """A request needs none any more; nothing happens if it has none."""
        self._taken.discard(req_id)
