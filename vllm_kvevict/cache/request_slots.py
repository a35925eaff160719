"""Which row of a table belongs to which request."""

from __future__ import annotations

import numpy as np


class RequestSlots:
    """Rows 0 to ``max_num_reqs - 1``, given to requests and taken back.

    generation: changes whenever a request gets a slot or gives one back
    """

    def __init__(self, max_num_reqs: int) -> None:
        self.max_num_reqs = max_num_reqs
        self._free = list(range(max_num_reqs))[::-1]
        self._slots: dict[str, int] = {}
        self.generation = 0
        self._found: tuple[list[str], int, np.ndarray] = ([], -1, np.empty(0, dtype=np.int32))

    def __contains__(self, req_id: object) -> bool:
        return req_id in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, req_id: str) -> int:
        return self._slots[req_id]

    def get(self, req_id: str) -> int:
        """Return the slot of a request, -1 if it has none."""
        return self._slots.get(req_id, -1)

    def take(self, req_id: str) -> int:
        """Return a slot that is ``req_id``'s from now on.

        Raises ValueError if it has one, or none is left.
        """
        if req_id in self._slots:
            raise ValueError(f"req_id: {req_id!r} has a slot already")
        if not self._free:
            raise ValueError(f"req_id: no slot left for {req_id!r}, all {len(self._slots)} are in use")
        slot = self._slots[req_id] = self._free.pop()
        self.generation += 1
        return slot

    def give_back(self, req_id: str) -> bool:
        """Take the slot of a request back; return whether it had one."""
        slot = self._slots.pop(req_id, None)
        if slot is None:
            return False
        self._free.append(slot)
        self.generation += 1
        return True

    def of(self, req_ids: list[str]) -> np.ndarray:
        """Return [num_reqs] int32 slots, -1 where a request has none: the same array while nothing has changed."""
        known_ids, generation, slots = self._found
        if generation != self.generation or known_ids != req_ids:
            slots = np.array([self.get(req_id) for req_id in req_ids], dtype=np.int32)
            self._found = (list(req_ids), self.generation, slots)
        return slots
