"""Our package on one version of vLLM: which classes of ours take the place of vLLM's, and which methods."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from tools.upstream.program import Program
from tools.upstream.sources import Sources
from tools.upstream.syntax import FunctionNode
from tools.upstream.values import Class, Either, Function, Instance, Missing, Module, Type
from tools.upstream.walk import Seen, Walk

THEIRS = "vllm"
_RUNNERS = ("vllm.v1.worker.gpu_model_runner.GPUModelRunner", "vllm.v1.worker.gpu.model_runner.GPUModelRunner")
# what no annotation tells, by the names under which it goes in our code and in vLLM's: one of these
ROLES = {
    "runner": _RUNNERS,
    "model_runner": _RUNNERS,
    "layer": ("vllm.model_executor.layers.attention.Attention", "vllm.v1.attention.backend.AttentionLayer"),
}
_TARGET = re.compile(r"vllm(\.\w+)+:[\w.]+")


@dataclass(frozen=True)
class Override:
    """A method of ours, of ``cls`` or inherited by it, and the one of vLLM that it replaces."""

    cls: Class
    ours: Function
    theirs: Function

    @property
    def name(self) -> str:
        return self.ours.node.name


@dataclass(frozen=True)
class Wrapped:
    """A function of ours that wraps one of vLLM's.

    target: "package.module:Class.method"
    wrap:   takes vLLM's function and returns what takes its place
    """

    target: str
    wrap: Function


class Upstream:
    """Our package on one version of vLLM.

    newest: the same on the newest one, whose hooks ours may have beforehand
    """

    def __init__(self, ours: Sources, theirs: Sources, newest: Upstream | None = None) -> None:
        self.program = Program({**theirs, **ours}, ROLES)
        self.modules = list(ours)
        self.their_modules = list(theirs)
        self._newest = newest

    @cached_property
    def classes(self) -> list[Class]:
        """Our classes that derive from one of vLLM's."""
        every = [cls for module in self.modules for cls in self.program.classes(module)]
        return [cls for cls in every if any(map(is_theirs, self.program.mro(cls)))]

    @cached_property
    def made(self) -> list[Class]:
        """Those that have objects, or are handed to vLLM: not mere bases of others."""
        bases = {base for cls in self.classes for base in self.program.mro(cls)[1:]}
        return [cls for cls in self.classes if cls not in bases or cls.name in self._named_in_expressions]

    @cached_property
    def _named_in_expressions(self) -> set[str]:
        """Names that our code uses as values; as bases, in annotations and in isinstance() they are not."""
        return {name for module in self.modules for name in _values_named_in(self.program.tree(module))}

    @cached_property
    def overrides(self) -> list[Override]:
        """Every method of vLLM that one of ours replaces, in each class of ours that has objects."""
        return [override for cls in self.made for override in self._overrides_of(cls)]

    def _overrides_of(self, cls: Class) -> Iterator[Override]:
        line = [each for each in self.program.mro(cls) if isinstance(each, Class)]
        for name in {name for base in line if not is_theirs(base) for name in self.program.own(base)}:
            owner = self.program.owner(cls, name)
            ours = None if owner is None or is_theirs(owner) else self.program.method(owner, name)
            if ours is None or owner is None:
                continue
            for base in line[line.index(owner) + 1 :]:
                theirs = self.program.method(base, name) if is_theirs(base) else None
                if theirs is not None:
                    yield Override(cls, Function(owner.module, ours, owner), Function(base.module, theirs, base))

    @cached_property
    def unheard(self) -> dict[tuple[Class, str], FunctionNode]:
        """Methods of ours that replace none of this vLLM's, and that nothing of ours calls."""
        replacing = {(override.ours.owner, override.name) for override in self.overrides}
        used = {name for module in self.modules for name in _members_used_in(self.program.tree(module), "")}
        ours = {base for cls in self.classes for base in self.program.mro(cls) if not is_theirs(base)}
        return {
            (cls, name): node
            for cls in ours
            if isinstance(cls, Class)
            for name in self.program.own(cls)
            if (node := self.program.method(cls, name)) is not None
            if not name.startswith("__") and name not in used and (cls, name) not in replacing
        }

    def is_for_the_newest(self, cls: Class, name: str) -> bool:
        """Return whether a method of ours replaces one that only a newer vLLM has."""
        return self._newest is not None and (cls, name) not in self._newest.unheard

    @cached_property
    def shared(self) -> dict[tuple[Class, str], Class]:
        """Names that a class of ours and a base of vLLM's both define -> that base."""
        return {
            (ours, name): theirs
            for cls in self.made
            for theirs in self.program.mro(cls)
            for ours in self.program.mro(cls)
            if isinstance(theirs, Class) and isinstance(ours, Class) and is_theirs(theirs) and not is_theirs(ours)
            for name in self.program.own(ours).keys() & self.program.own(theirs).keys()
        }

    @property
    def newly_shared(self) -> dict[tuple[Class, str], Class]:
        """Those that the newest vLLM defines and this one does not; what we have for the newest's sake is left out."""
        newest = {} if self._newest is None else self._newest.shared
        return {key: theirs for key, theirs in newest.items() if key not in self.shared and key not in self.unheard}

    @cached_property
    def wrapped(self) -> list[Wrapped]:
        """Return every function that ours wraps: a call with the name of vLLM's, then the function of ours."""
        found = []
        for module in self.modules:
            for node in ast.walk(self.program.tree(module)):
                match node:
                    case ast.Call(args=[ast.Constant(value=str() as target), ast.Name(id=name), *_]):
                        wrap = self.program.lookup(module, name)
                        if _TARGET.fullmatch(target) and isinstance(wrap, Function):
                            found.append(Wrapped(target, wrap))
        return found

    def seen(self) -> Iterator[Seen]:
        """Yield every node of ours that means something on this vLLM; what is asked of its scope, at once."""
        originals = {}
        for wrapped in self.wrapped:
            original = self.program.named(wrapped.target)
            owner = self.program.named(wrapped.target.rpartition(".")[0])
            if isinstance(original, Function) and isinstance(owner, Class):
                # whose method it is for us, even if a base class defines it
                originals[wrapped.wrap.module, wrapped.wrap.node.name] = replace(original, owner=owner)
        idle = [node for (cls, name), node in self.unheard.items() if self.is_for_the_newest(cls, name)]
        for module in self.modules:
            yield from Walk(self.program, self.made, originals, idle).module(module)

    def has(self, of: Type, name: str) -> bool:
        """Return whether an object has an attribute, or one has it of a class of ours that is one of its kind."""
        if not isinstance(self.program.member(of, name), Missing):
            return True
        kinds = [each for each in (of.types if isinstance(of, Either) else (of,)) if isinstance(each, Instance)]
        if any(self.program.named(path) == each.cls for paths in ROLES.values() for path in paths for each in kinds):
            return self._is_given(name)
        ours = [cls for each in kinds for cls in self.classes if each.cls in self.program.mro(cls)]
        return any(not isinstance(self.program.member(Instance(cls), name), Missing) for cls in ours)

    def _is_given(self, name: str) -> bool:
        """Return whether vLLM sets an attribute on such an object from outside of its class."""
        return self._says(name, rf"\b(?:{'|'.join(ROLES)})\.{name}(?:: [^=\n]+)? = ", self.their_modules)

    def defines(self, name: str) -> bool:
        """Return whether ours or vLLM defines a name, as anything, anywhere."""
        return self._says(name, rf"(?:def |class |\.|^\s*){name}(?=\(| *[:=])", self.modules + self.their_modules)

    def _says(self, name: str, pattern: str, modules: list[str]) -> bool:
        texts = (self.program.source(module).text for module in modules)
        return any(re.search(pattern, text, re.MULTILINE) for text in texts if name in text)

    def place(self, module: str, node: ast.AST) -> str:
        return f"{self.program.source(module).file}:{getattr(node, 'lineno', 1)}"


def is_theirs(of: Type) -> bool:
    """Return whether a module, class or function is vLLM's."""
    match of:
        case Module():
            return of.name.split(".")[0] == THEIRS
        case Class() | Function():
            return of.module.split(".")[0] == THEIRS
    return False


def _values_named_in(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Name():
            yield node.id
        case ast.ClassDef():
            for child in (*node.decorator_list, *node.body):
                yield from _values_named_in(child)
        case ast.Call() if ast.unparse(node.func) in ("isinstance", "issubclass"):
            yield from _values_named_in(node.args[0])
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            for child in (*node.decorator_list, *node.body):
                yield from _values_named_in(child)
        case ast.AnnAssign():
            if node.value is not None:
                yield from _values_named_in(node.value)
        case _:
            for child in ast.iter_child_nodes(node):
                yield from _values_named_in(child)


def _members_used_in(node: ast.AST, method: str) -> Iterator[str]:
    """Yield the names behind dots, but not those of a method inside itself."""
    if isinstance(node, FunctionNode):
        method = node.name
    if isinstance(node, ast.Attribute) and node.attr != method:
        yield node.attr
    for child in ast.iter_child_nodes(node):
        yield from _members_used_in(child, method)
