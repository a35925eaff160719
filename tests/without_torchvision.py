"""vLLM's classes of LLaVA and Gemma 3 where torchvision is not installed.

Their modules import image processors of transformers that are written with torchvision, for a type and a function that
calls none of it. In its place stands, while they are imported, a module that has nothing in it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

import pytest
from transformers.utils import is_torchvision_available
from vllm.model_executor.models import registry

_PLACES = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2")
_NEEDED_BY = tuple(f"transformers.models.{name}.image_processing_{name}" for name in ("gemma3", "pixtral"))


@contextmanager
def image_models() -> Iterator[None]:
    """Inside, vLLM finds these classes; it looks at them in this process, where their modules were imported."""
    if find_spec("torchvision") is None:
        assert not is_torchvision_available()  # transformers remembers that it is not
        with pytest.MonkeyPatch.context() as patch:
            for name in _PLACES:
                patch.setitem(sys.modules, name, ModuleType(name))
            patch.setattr(sys.modules[_PLACES[-1]], "functional", ModuleType("functional"), raising=False)
            for name in _NEEDED_BY:
                importlib.import_module(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
        yield
