"""Values that somebody else chose, for messages: never longer than a message may be, whatever a client sends."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Any

LONGEST_NAME = 200
_LONGEST = 200


def quoted(value: object) -> str:
    """Return ``repr(value)``, cut to 200 characters; costs no more for a value of any size."""
    text = _SHORT.repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def suggestion(name: object, known: Iterable[str], instead: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return a sentence, behind a space, with the name that was meant; nothing where none is near.

    instead: what to name in place of some of the known names
    """
    close = difflib.get_close_matches(str(name)[:LONGEST_NAME], known, n=1)
    return f" Did you mean {instead.get(close[0], close[0])!r}?" if close else ""


class _Short(reprlib.Repr):
    """reprlib's, but for values that it sorts, converts or writes out whole before it cuts them."""

    repr_bytes = reprlib.Repr.repr_str

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxdict, self.maxtuple = 3, 4, 4, 4
        self.maxstring = self.maxlong = self.maxother = 100

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() <= 256 else f"a number of {x.bit_length()} bits"

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        if level <= 0:
            return "{...}"
        pieces = [f"{self.repr1(k, level - 1)}: {self.repr1(v, level - 1)}" for k, v in islice(x.items(), self.maxdict)]
        return "{" + ", ".join([*pieces, *(["..."] if len(x) > self.maxdict else [])]) + "}"


_SHORT = _Short()
