"""The types of expressions inside a function: enough to follow ``self.manager.coordinator.block_pool``, and no more."""

from __future__ import annotations

import ast
from functools import cached_property
from typing import TYPE_CHECKING

from tools.upstream.syntax import Binding, FunctionNode, bindings, decorators, kind
from tools.upstream.values import (
    MISSING,
    UNKNOWN,
    Builtin,
    Class,
    Either,
    Function,
    Instance,
    Missing,
    Outside,
    Super,
    Type,
    Unknown,
    either,
)

if TYPE_CHECKING:
    from tools.upstream.program import Program

_BUILTINS = {
    "set",
    "frozenset",
    "dict",
    "list",
    "tuple",
    "str",
    "int",
    "float",
    "bool",
    "bytes",
    "deque",
    "defaultdict",
}
# what annotations name when any container will do -> one of them, whose elements are known but whose methods are not
_ABSTRACT = {"Sequence", "Iterable", "Iterator", "Collection", "Mapping", "MutableMapping", "Generator", "Set"}
_TRANSPARENT = {"Optional", "Final", "ClassVar", "Annotated", "Required", "NotRequired"}


class Scope:
    """Names inside a module or, with ``function``, inside that.

    receiver: the class of ``self``, which may be a subclass of the one that holds the method
    parent:   of a function inside another one
    """

    def __init__(
        self,
        program: Program,
        module: str,
        function: Function | None = None,
        receiver: Class | None = None,
        parent: Scope | None = None,
        declared: Function | None = None,
    ) -> None:
        self.program = program
        self.module = module
        self.function = function
        self.receiver = receiver
        self._parent = parent
        self._declared = declared
        self._types: dict[str, Type] = {}
        # "self.x" or "x" -> what an enclosing isinstance() says it is
        self.narrowed: dict[str, Type] = {}
        self.given: dict[str, Type] = {}

    @cached_property
    def _locals(self) -> dict[str, list[Binding]]:
        return {} if self.function is None else bindings(self.function.node)

    @classmethod
    def of(cls, program: Program, function: Function, receiver: Class | None, parent: Scope | None = None) -> Scope:
        return cls(program, function.module, function, receiver, parent, _replaced(program, function, receiver))

    def returned(self, node: FunctionNode) -> Type:
        """Return what the function of this scope returns, by its annotation."""
        return UNKNOWN if node.returns is None else annotation(self, node.returns)

    def name(self, name: str) -> Type:
        """Return what a name stands for."""
        if name in self.narrowed:
            return self.narrowed[name]
        if name in self.given:
            return self.given[name]
        if self.function is not None and name not in self._types:
            self._types[name] = UNKNOWN  # while it is being found out
            self._types[name] = self._local(self.function, name)
        if self.function is not None and not isinstance(self._types[name], Missing):
            return self._types[name]
        if self._parent is not None:
            return self._parent.name(name)
        found = self.program.lookup(self.module, name)
        return Outside(f"builtins.{name}") if isinstance(found, Missing) else found

    def _local(self, function: Function, name: str) -> Type:
        arguments = function.node.args
        plain = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        variadic = {each.arg for each in (arguments.vararg, arguments.kwarg) if each is not None}
        if function.owner is not None and plain and plain[0].arg == name and self.receiver is not None:
            of_kind = kind(function.node)
            if of_kind != "static":
                return Instance(self.receiver) if of_kind == "instance" else self.receiver
        argument = next((each for each in plain if each.arg == name), None)
        assigned = self._locals.get(name, [])
        if argument is None and not assigned:
            return UNKNOWN if name in variadic else MISSING
        types = [self._bound(way, node) for way, node in assigned if not _is_none(node)]
        if argument is not None:
            types.append(self._parameter(argument))
        return either(types)

    def _parameter(self, argument: ast.arg) -> Type:
        found = UNKNOWN if argument.annotation is None else annotation(self, argument.annotation)
        if isinstance(found, Unknown):
            found = self._role(argument.arg)
        if isinstance(found, Unknown) and self._declared is not None:
            # ours says Any: what the method that it replaces says
            theirs = self._declared.node.args
            for each in (*theirs.posonlyargs, *theirs.args, *theirs.kwonlyargs):
                if each.arg == argument.arg and each.annotation is not None:
                    found = annotation(Scope(self.program, self._declared.module), each.annotation)
        return found

    def _role(self, name: str) -> Type:
        """Return what an object is that no annotation tells, by its name."""
        classes = [self.program.named(path) for path in self.program.roles.get(name, ())]
        return either([Instance(each) for each in classes if isinstance(each, Class)])

    def _bound(self, way: str, node: ast.expr | ast.stmt) -> Type:
        if isinstance(node, ast.stmt):
            if isinstance(node, ast.AnnAssign):
                return annotation(self, node.annotation)
            if isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef):
                return self.program.defined_by(self.module, node, way)
            return UNKNOWN
        found = self.type_of(node)
        for step in filter(None, way.split(".")):
            found = _element(found) if step == "each" else _part(found, int(step))
        return found

    def type_of(self, node: ast.expr) -> Type:
        """Return the type of an expression."""
        match node:
            case ast.Name():
                return self.name(node.id)
            case ast.Attribute():
                written = ast.unparse(node)
                if written in self.narrowed:
                    return self.narrowed[written]
                if node.attr in self.program.roles:
                    return self._role(node.attr)
                found = self.program.member(self.type_of(node.value), node.attr)
                return UNKNOWN if isinstance(found, Missing) else found
            case ast.Call():
                return self._called(node)
            case ast.Subscript():
                of = self.type_of(node.value)
                if isinstance(of, Class | Outside):
                    return of
                index = node.slice.value if isinstance(node.slice, ast.Constant) else None
                if isinstance(node.slice, ast.Slice):
                    return of
                return _part(of, index if isinstance(index, int) else None)
            case ast.BoolOp():
                return either([self.type_of(each) for each in node.values if not _is_none(each)])
            case ast.IfExp():
                return either([self.type_of(each) for each in (node.body, node.orelse) if not _is_none(each)])
            case ast.NamedExpr() | ast.Await() | ast.Starred():
                return self.type_of(node.value)
            case ast.Constant() if node.value is not None:
                return Builtin(type(node.value).__name__)
            case ast.JoinedStr():
                return Builtin("str")
            case ast.List() | ast.Set():
                held = either([self.type_of(each) for each in node.elts])
                return Builtin("list" if isinstance(node, ast.List) else "set", (held,))
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
                name = {ast.ListComp: "list", ast.SetComp: "set"}.get(type(node), "Iterator")
                return Builtin(name, (self.type_of(node.elt),))
            case ast.Tuple():
                return Builtin("tuple", tuple(self.type_of(each) for each in node.elts))
            case ast.Dict() | ast.DictComp():
                return Builtin("dict")
        return UNKNOWN

    def _called(self, node: ast.Call) -> Type:
        written = ast.unparse(node.func)
        if written == "super" and not node.args and self.receiver is not None:
            owner = self._owner()
            return UNKNOWN if owner is None else Super(owner, self.receiver)
        if written in ("cast", "typing.cast"):
            return annotation(self, node.args[0])
        first = self.type_of(node.args[0]) if node.args else UNKNOWN
        if written in ("enumerate", "sorted", "list", "reversed", "iter", "set", "tuple"):
            element = _element(first)
            return Builtin(
                "list", (Builtin("tuple", (Builtin("int"), element)) if written == "enumerate" else element,)
            )
        if written == "zip":
            return Builtin("list", (Builtin("tuple", tuple(_element(self.type_of(each)) for each in node.args)),))
        if written == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            found = self.program.member(first, str(node.args[1].value))
            return UNKNOWN if isinstance(found, Missing) else found
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("values", "items", "get", "pop"):
            of = self.type_of(node.func.value)
            if isinstance(of, Builtin) and len(of.args) == 2:
                held = {"values": Builtin("list", of.args[1:]), "items": Builtin("list", (Builtin("tuple", of.args),))}
                return held.get(node.func.attr, of.args[1])
        return self._result(self.type_of(node.func))

    def _owner(self) -> Class | None:
        if self.function is not None and self.function.owner is not None:
            return self.function.owner
        return None if self._parent is None else self._parent._owner()

    def _result(self, called: Type) -> Type:
        match called:
            case Class():
                return Instance(called)
            case Either():
                return either([self._result(each) for each in called.types])
            case Outside() if called.path.rpartition(".")[2] in _BUILTINS:
                return Builtin(called.path.rpartition(".")[2])
            case Function():
                if {"contextmanager", "asynccontextmanager"} & set(decorators(called.node)):
                    return UNKNOWN
                return Scope.of(self.program, called, called.owner).returned(called.node)
        return UNKNOWN


def _replaced(program: Program, function: Function, receiver: Class | None) -> Function | None:
    """Return the method behind ``function`` in the line of bases."""
    if function.owner is None or receiver is None or function.owner not in program.mro(receiver):
        return None
    owner = program.owner(receiver, function.node.name, function.owner)
    method = None if owner is None else program.method(owner, function.node.name)
    return None if owner is None or method is None else Function(owner.module, method, owner)


def annotation(scope: Scope, node: ast.expr) -> Type:
    """Return the type of a variable with this annotation, None left out of unions."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return annotation(scope, ast.parse(node.value.strip(), mode="eval").body)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return either([annotation(scope, each) for each in (node.left, node.right) if not _is_none(each)])
    if isinstance(node, ast.Subscript):
        return _generic(scope, node)
    if not isinstance(node, ast.Name | ast.Attribute):
        return UNKNOWN
    name = ast.unparse(node).rpartition(".")[2]
    if name == "Self" and scope.receiver is not None:
        return Instance(scope.receiver)
    found = scope.type_of(node)
    if isinstance(found, Class):
        return Instance(found)
    if isinstance(found, Outside):
        return Builtin(name) if name in _BUILTINS else UNKNOWN
    return found if isinstance(found, Builtin | Either) else UNKNOWN  # an alias of a type


def _generic(scope: Scope, node: ast.Subscript) -> Type:
    name = ast.unparse(node.value).rpartition(".")[2]
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if name == "Union":
        return either([annotation(scope, each) for each in inner if not _is_none(each)])
    if name in _TRANSPARENT:
        return annotation(scope, inner[0])
    if name in ("type", "Type"):
        found = annotation(scope, inner[0])
        return found.cls if isinstance(found, Instance) else UNKNOWN
    if name in _ABSTRACT or name.lower() in _BUILTINS:
        args = tuple(annotation(scope, each) for each in inner if ast.unparse(each) != "...")
        return Builtin(name.lower() if name.lower() in _BUILTINS and name not in _ABSTRACT else name, args)
    return annotation(scope, node.value)


def _element(of: Type) -> Type:
    if isinstance(of, Builtin) and of.args:
        same = set(of.args)
        return of.args[0] if of.name != "tuple" or len(same) == 1 else either(list(of.args))
    return either([_element(each) for each in of.types]) if isinstance(of, Either) else UNKNOWN


def _part(of: Type, index: int | None) -> Type:
    """Return what ``of[index]`` is."""
    if isinstance(of, Builtin) and of.args:
        if of.name == "tuple" and len(of.args) > 1 and index is not None:
            return of.args[index] if index < len(of.args) else UNKNOWN
        return of.args[-1]
    return UNKNOWN


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
