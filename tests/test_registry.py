"""Names to classes: duplicates, strangers, typing errors, and classes of other packages."""

import logging
import sys
import time
from pathlib import Path

import pytest

from vllm_kvevict.budgets import ALLOCATORS, BudgetAllocator
from vllm_kvevict.budgets.uniform import Uniform
from vllm_kvevict.policies import POLICIES, EvictionPolicy
from vllm_kvevict.registry import Registry


class Shape:
    pass


class Circle(Shape):
    pass


class Square(Shape):
    pass


@pytest.fixture
def shapes():
    return Registry("shape", Shape, "test.shapes")


FOREIGN_MODULE = """
from vllm_kvevict.budgets.uniform import Uniform
class Halving(Uniform): pass
"""


@pytest.fixture
def allocators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that installs a package with these entry points and returns a registry that sees it."""

    def install(**targets: str) -> Registry[BudgetAllocator]:
        (tmp_path / "kvevict_foreign.py").write_text(FOREIGN_MODULE)
        info = tmp_path / "kvevict_foreign-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvevict-foreign\nVersion: 1.0\n")
        lines = [f"{name} = {target}" for name, target in targets.items()]
        (info / "entry_points.txt").write_text("\n".join(["[test.allocators]", *lines]))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "kvevict_foreign", raising=False)
        return Registry("budget allocator", BudgetAllocator, "test.allocators")

    yield install
    sys.modules.pop("kvevict_foreign", None)


def test_registers_and_returns_the_class(shapes):
    assert shapes.register("circle")(Circle) is Circle
    assert shapes.get("circle") is Circle


def test_names_are_in_order(shapes):
    shapes.register("square")(Square)
    shapes.register("circle")(Circle)
    assert shapes.names() == ["circle", "square"]


def test_a_taken_name_is_refused(shapes):
    shapes.register("circle")(Circle)
    with pytest.raises(ValueError, match=r"shape 'circle' is registered already, by .*test_registry"):
        shapes.register("circle")(Square)
    assert shapes.get("circle") is Circle


def test_a_class_may_register_twice_as_when_its_module_is_reloaded_by_an_entry_point(shapes):
    shapes.register("circle")(Circle)
    shapes.register("circle")(Circle)
    assert shapes.names() == ["circle"]


@pytest.mark.parametrize("stranger", [int, Circle(), "Circle", None])
def test_another_kind_of_class_is_refused(shapes, stranger):
    with pytest.raises(TypeError, match="shape 'odd': expected a subclass of Shape, got"):
        shapes.register("odd")(stranger)
    assert shapes.names() == []


@pytest.mark.parametrize("typed", ["circel", "Circle", "circles"])
def test_a_typing_error_gets_a_suggestion(shapes, typed):
    shapes.register("circle")(Circle)
    shapes.register("square")(Square)
    expected = f"unknown shape '{typed}'. Did you mean 'circle'? Available: circle, square"
    with pytest.raises(ValueError) as error:
        shapes.get(typed)
    assert str(error.value) == expected


def test_a_name_like_no_other_gets_the_list_only(shapes):
    shapes.register("circle")(Circle)
    with pytest.raises(ValueError) as error:
        shapes.get("xyz")
    assert str(error.value) == "unknown shape 'xyz'. Available: circle"


def test_a_prefix_names_a_family_of_classes_that_are_made_when_asked_for(shapes):
    asked = []

    def resolve(rest):
        asked.append(rest)
        if rest == "heptagon":
            raise ValueError("seven corners are too many")
        return {"tri:angle": Circle, "text": "no class"}[rest]

    shapes.register("square")(Square)
    shapes.register_family("poly", resolve)
    assert shapes.get("poly:tri:angle") is shapes.get("poly:tri:angle") is Circle
    assert asked == ["tri:angle"]
    assert shapes.names() == list(shapes) == ["square"]
    assert "poly:anything" in shapes and "square" in shapes
    assert not [name for name in ("poly", "poly:", "other:x", "circle", None) if name in shapes]
    with pytest.raises(ValueError, match="seven corners are too many"):
        shapes.get("poly:heptagon")
    with pytest.raises(TypeError, match="shape 'poly:text': expected a subclass of Shape, got 'no class'"):
        shapes.get("poly:text")
    with pytest.raises(ValueError, match=r"unknown shape 'poly:'\. Available: square, poly:NAME"):
        shapes.get("poly:")


def test_classes_of_other_packages_join(allocators):
    registry = allocators(halving="kvevict_foreign:Halving")
    registry.register("uniform")(Uniform)
    assert registry.names() == ["halving", "uniform"]
    assert registry.get("halving").__name__ == "Halving"
    assert registry.get("halving") is registry.get("halving")
    assert registry.get("uniform") is Uniform


def test_other_packages_are_suggested(allocators):
    registry = allocators(halving="kvevict_foreign:Halving")
    with pytest.raises(ValueError, match=r"Did you mean 'halving'\? Available: halving"):
        registry.get("halvign")


def test_other_packages_are_imported_when_asked_for_only(allocators):
    registry = allocators(halving="kvevict_foreign:Halving", broken="kvevict_no_such_module:Thing")
    assert registry.names() == ["broken", "halving"]
    assert "kvevict_foreign" not in sys.modules
    registry.get("halving")
    reason = "ModuleNotFoundError: .*kvevict_no_such_module"
    with pytest.raises(ValueError, match=f"'broken' of another package cannot be used: {reason}"):
        registry.get("broken")


def test_all_other_packages_are_imported_once_and_those_that_fail_are_named(allocators, monkeypatch):
    shown = []  # in vLLM's log: a logger of ours alone would show nothing in a server
    monkeypatch.setattr(logging.getLogger("vllm.kvevict"), "warning", lambda form, *args: shown.append(form % args))
    registry = allocators(halving="kvevict_foreign:Halving", broken="kvevict_no_such_module:Thing")
    for _ in range(2):
        registry.import_all()
    assert sys.modules["kvevict_foreign"].Halving is registry.get("halving")
    with pytest.raises(ValueError) as error:
        registry.get("broken")
    assert shown == [str(error.value)]


def test_a_name_of_any_length_costs_and_says_no_more(shapes):
    shapes.register("circle")(Circle)
    for name in ("c" * 10**7, "circle" * 10**6, "poly:" * 10**6):
        began = time.perf_counter()
        with pytest.raises(ValueError, match=r"unknown shape '.*\.\.\..*'\. Available: circle") as error:
            shapes.get(name)
        assert len(str(error.value)) < 300
        assert time.perf_counter() - began < 0.2  # seconds; it took 1.7


def test_other_packages_must_bring_the_right_kind(allocators):
    with pytest.raises(ValueError, match="TypeError: budget allocator 'path': expected a subclass of BudgetAllocator"):
        allocators(path="pathlib:Path").get("path")


def test_other_packages_do_not_replace_ours(allocators):
    registry = allocators(uniform="kvevict_foreign:Halving")
    registry.register("uniform")(Uniform)
    assert registry.get("uniform") is Uniform
    assert registry.names() == ["uniform"]


def test_groups_are_apart(allocators):
    allocators(halving="kvevict_foreign:Halving")
    assert Registry("budget allocator", BudgetAllocator, "test.others").names() == []


def test_the_package_s_own_registries():
    assert "snapkv" in POLICIES.names()
    assert "uniform" in ALLOCATORS.names()
    assert all(issubclass(POLICIES.get(name), EvictionPolicy) for name in POLICIES.names())
    assert all(issubclass(ALLOCATORS.get(name), BudgetAllocator) for name in ALLOCATORS.names())
