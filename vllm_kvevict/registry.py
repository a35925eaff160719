"""Names to classes, for policies and allocators; third parties join through an entry-point group."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from vllm_kvevict.foreign.code import contained, said
from vllm_kvevict.foreign.values import LONGEST_NAME, quoted, suggestion

logger = logging.getLogger("vllm.kvevict")  # a child of vLLM's, which shows what it logs

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
        self._families: dict[str, Callable[[str], type[Base]]] = {}
        self._members: dict[str, type[Base]] = {}
        self._broken: dict[str, str] = {}

    def register(self, name: str) -> Callable[[type[Base]], type[Base]]:
        """Return a class decorator that adds the class under ``name``.

        Raises TypeError for a class of another kind, ValueError for a name that is taken.
        """

        def add(cls: type[Base]) -> type[Base]:
            self._add(name, cls)
            return cls

        return add

    def register_family(self, prefix: str, resolve: Callable[[str], type[Base]]) -> None:
        """Let every name ``prefix:REST`` stand for the class that ``resolve(REST)`` returns, asked for once.

        Such names are not listed by ``names``. ``resolve`` raises ValueError for what it does not know.
        """
        self._families[prefix] = resolve

    def names(self) -> list[str]:
        """Return all names in order, those of other packages included, those of families not."""
        return sorted(self._classes.keys() | self._entry_points.keys())

    def names_in(self, package: str) -> list[str]:
        """Return the names of classes that a package has registered by now, in order; nothing is imported."""
        return sorted(name for name, cls in self._classes.items() if cls.__module__.split(".")[0] == package)

    def get(self, name: str) -> type[Base]:
        """Return the class called ``name``.

        Raises ValueError that lists the names, with a suggestion, when there is none; or that says why another package
        does not bring its own.
        """
        if name in self._classes:
            return self._classes[name]
        if len(str(name)) > LONGEST_NAME:
            raise ValueError(f"unknown {self.kind} {quoted(name)}. Available: {self.listing()}")
        family, _, rest = str(name).partition(":")
        if rest and family in self._families:
            return self._member(name, family, rest)
        if name in self._entry_points:
            return self._load(name)
        hint = suggestion(name, self.names())
        raise ValueError(f"unknown {self.kind} {quoted(name)}.{hint} Available: {self.listing()}")

    def import_all(self) -> None:
        """Import what other packages bring, once; the log names those that cannot be."""
        for name in self._entry_points:
            if name in self._classes or name in self._broken:
                continue
            try:
                self._load(name)
            except ValueError as error:
                logger.warning("%s", error)

    def listing(self) -> str:
        """Return what may be asked for, as a text: the names, and one pattern for each family."""
        return ", ".join([*self.names(), *(f"{prefix}:NAME" for prefix in sorted(self._families))])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        """Whether ``get`` would try ``name``: with it and ``__iter__``, a registry is argparse's ``choices``."""
        family, _, rest = str(name).partition(":")
        return name in self.names() or (bool(rest) and family in self._families)

    @cached_property
    def _entry_points(self):  # type: ignore[no-untyped-def]
        return {entry.name: entry for entry in entry_points(group=self.entry_group)}

    def _load(self, name: str) -> type[Base]:
        if name not in self._broken:
            with contained(partial(self._note_broken, name)):
                self._add(name, self._entry_points[name].load())
                return self._classes[name]
        raise ValueError(self._broken[name])

    def _note_broken(self, name: str, error: BaseException) -> None:
        reason = " ".join(f"{type(error).__name__}: {said(error)}".split())
        self._broken[name] = f"{self.kind} {name!r} of another package cannot be used: {reason[:300]}"

    def _member(self, name: str, family: str, rest: str) -> type[Base]:
        if name not in self._members:
            self._members[name] = self._checked(name, self._families[family](rest))
        return self._members[name]

    def _add(self, name: str, cls: type[Base]) -> None:
        if self._classes.get(name, cls) is not cls:
            raise ValueError(f"{self.kind} {name!r} is registered already, by {self._classes[name].__module__}")
        self._classes[name] = self._checked(name, cls)

    def _checked(self, name: str, cls: type[Base]) -> type[Base]:
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise TypeError(f"{self.kind} {name!r}: expected a subclass of {self.base.__name__}, got {cls!r}")
        return cls
