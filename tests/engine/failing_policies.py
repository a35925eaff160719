"""Policies of another package that raise on some of several workers: what they do there is the test's to choose.

Named WHERE_WHEN, such as "first_step"; ``NAMES`` has all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from vllm_kvevict.policies import POLICIES, EvictionPolicy, Need, ScoreInputs, StepInputs

WHERE = ("every", "first", "last")
WHEN = ("made", "observing", "end", "again", "step")
NAMES = [f"{where}_{when}" for where, when in product(WHERE, WHEN)]


@dataclass(frozen=True)
class _Failing(EvictionPolicy):
    where: ClassVar[str]
    when: ClassVar[str]

    def _reach(self, when: str) -> None:
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return  # the process of the scheduler
        last = torch.distributed.get_world_size() - 1
        is_here = {"every": True, "first": torch.distributed.get_rank() == 0}
        if when == self.when and is_here.get(self.where, torch.distributed.get_rank() == last):
            raise ZeroDivisionError("a bug in somebody's policy")

    @property
    def num_pseudo_tokens(self) -> int:
        self._reach("made")
        return 0

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.ALL_QUERIES} if self.when == "observing" else ())

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 0

    def observe(self, state: Any, inputs: ScoreInputs) -> Any:
        self._reach("observing")
        return state

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        was_evicted = len(inputs.keys) == inputs.page_table.numel()  # a copy of what it holds, not the whole pool
        self._reach("again" if was_evicted else "end")
        return torch.zeros(inputs.num_kv_heads, inputs.kv_len)

    def score_step(self, inputs: StepInputs) -> torch.Tensor:
        self._reach("step")
        return inputs.positions.float()


def __getattr__(name: str) -> type[EvictionPolicy]:
    if name not in NAMES:
        raise AttributeError(name)
    where, when = name.split("_")
    return dataclass(frozen=True)(type(name, (_Failing,), {"where": where, "when": when, "__module__": __name__}))


@contextmanager
def installed(folder: Path) -> Iterator[None]:
    """Inside, they are a package that every process finds which is started."""
    info = folder / "failing_policies-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: failing-policies\nVersion: 1.0\n")
    entries = "\n".join(f"{name} = {__name__}:{name}" for name in NAMES)
    (info / "entry_points.txt").write_text(f"[{POLICIES.entry_group}]\n{entries}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", str(folder), prepend=":")
        vars(POLICIES).pop("_entry_points", None)
        try:
            yield
        finally:
            vars(POLICIES).pop("_entry_points", None)
            for name in NAMES:
                POLICIES._classes.pop(name, None)
