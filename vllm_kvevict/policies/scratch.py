"""What scoring may hold beside its scores, however long the prompt is."""

from __future__ import annotations

MOST_BYTES = 2**25  # of what could grow with the prompt; tiles of a fixed size come on top


def fits(num_bytes: int) -> bool:
    """Whether so much may be held at once."""
    return num_bytes <= MOST_BYTES
