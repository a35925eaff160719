"""Names to classes, for policies and allocators; third parties join through an entry-point group."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import entry_points
from typing import Generic, TypeVar

Base = TypeVar("Base")


class Registry(Generic[Base]):
    """Classes of one kind by name: the ones registered here and the ones of installed packages.

    kind:        what a user calls an entry, for messages: "eviction policy"
    base:        every entry is a subclass of it
    entry_group: entry-point group in which other packages name theirs
    """

    def __init__(self, kind: str, base: type[Base], entry_group: str) -> None:
        self.kind = kind
        self.base = base
        self.entry_group = entry_group
        self._classes: dict[str, type[Base]] = {}

    def register(self, name: str) -> Callable[[type[Base]], type[Base]]:
        """Return a class decorator that adds the class under ``name``.

        Raises TypeError for a class of another kind, ValueError for a name that is taken.
        """

        def add(cls: type[Base]) -> type[Base]:
            self._add(name, cls)
            return cls

        return add

    def names(self) -> list[str]:
        """Return all names in order, those of other packages included."""
        return sorted(self._classes.keys() | self._entry_points.keys())

    def get(self, name: str) -> type[Base]:
        """Return the class called ``name``.

        Raises ValueError that lists the names, with a suggestion, when there is none.
        """
        if name not in self._classes and name in self._entry_points:
            self._add(name, self._entry_points[name].load())
        if name not in self._classes:
            close = difflib.get_close_matches(str(name), self.names(), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown {self.kind} {name!r}.{hint} Available: {', '.join(self.names())}")
        return self._classes[name]

    @cached_property
    def _entry_points(self):  # type: ignore[no-untyped-def]
        return {entry.name: entry for entry in entry_points(group=self.entry_group)}

    def _add(self, name: str, cls: type[Base]) -> None:
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise TypeError(f"{self.kind} {name!r}: expected a subclass of {self.base.__name__}, got {cls!r}")
        if self._classes.get(name, cls) is not cls:
            raise ValueError(f"{self.kind} {name!r} is registered already, by {self._classes[name].__module__}")
        self._classes[name] = cls
