"""Whoever looks on while a prompt is evicted sees what is chosen and moved, costs nothing and harms nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.eviction.test_prompt import LAYERS, SCALE, Prompt, Ragged
from vllm_kvevict.cache.compaction import Compaction
from vllm_kvevict.cache.plan import plan_eviction
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.observer import Choice, EvictionObserver, observed_by
from vllm_kvevict.eviction.prompt import Eviction
from vllm_kvevict.eviction.record import recorded_evictions
from vllm_kvevict.policies.snapkv import SnapKV

METHOD = Method(SnapKV(window=8), Ragged(1), 2, 8)
COPIES = {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


def scored(prompt: Prompt) -> Eviction:
    eviction = Eviction(METHOD, plan_eviction(prompt.num_tokens, 64, 16, 10), prompt.cache.pool, prompt.block_ids)
    for layer in range(LAYERS):
        eviction.score_layer(layer, prompt.queries[layer, -8:], SCALE)
    return eviction


@dataclass
class Notes(EvictionObserver):
    """Notes what it is shown, and does something each time."""

    act: Callable[[], None] = lambda: None
    choices: list[Choice] = field(default_factory=list)
    compactions: list[tuple[Choice, Compaction, float]] = field(default_factory=list)

    def chosen(self, choice: Choice) -> None:
        self.choices.append(choice)
        self.act()

    def compacted(self, choice: Choice, compaction: Compaction, seconds: float) -> None:
        self.compactions.append((choice, compaction, seconds))
        self.act()


def fail() -> None:
    raise ZeroDivisionError("a bug in an observer")


def test_an_observer_sees_the_choice_before_anything_moves_and_then_what_moved():
    prompt, notes = Prompt(200), Notes()
    eviction = scored(prompt)
    before = prompt.cache.pool.pages.clone()
    with observed_by(notes):
        eviction.choose()
        assert prompt.cache.pool.pages.view(torch.int32).equal(before.view(torch.int32))
        (choice,) = notes.choices
        assert not notes.compactions
        compaction = eviction.compact()
    assert notes.compactions == [(choice, compaction, eviction.seconds)]
    assert choice.method is METHOD and choice.plan is eviction.plan and choice.pool is prompt.cache.pool
    assert choice.scores.equal(eviction.alone._scores.scores.of_layers(0, LAYERS)[0])
    for layer, of_layer in enumerate(choice.kept):
        for head, kept in enumerate(of_layer):
            assert prompt.kept_tokens(compaction, layer, head) == kept.nonzero()[:, 0].tolist()


class Copies(TorchDispatchMode):
    """Counts the copies that are made of tensors of one shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        copied = [arg for arg in args if isinstance(arg, torch.Tensor)]
        self.count += function in COPIES and any(arg.shape == self.shape for arg in copied)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_observed", [False, True])
def test_an_eviction_copies_nothing_for_those_who_look_on_and_keeps_nothing_when_nobody_does(is_observed):
    eviction = scored(Prompt(200))
    with Copies((LAYERS, 2, 200)) as copies:
        if is_observed:
            with observed_by(EvictionObserver()):
                eviction.finish()
        else:
            eviction.finish()
    assert copies.count == 0
    assert (eviction._shown is not None) == is_observed


@pytest.mark.parametrize("raises", [False, True])
def test_an_observer_is_gone_after_its_context(raises):
    notes = Notes()
    if raises:
        with pytest.raises(ZeroDivisionError), observed_by(notes):
            fail()
    else:
        with observed_by(notes):
            pass
    scored(Prompt(200)).finish()
    assert not notes.choices and not notes.compactions


def test_the_time_of_an_observer_is_not_the_evictions(monkeypatch):
    now = 0.0

    def pass_time() -> None:
        nonlocal now
        now += 1000.0

    monkeypatch.setattr("vllm_kvevict.eviction.prompt.perf_counter", lambda: now)
    notes = Notes(pass_time)
    with observed_by(notes):
        eviction = scored(Prompt(200))
        eviction.finish()
    assert now == 2000.0
    assert eviction.seconds == 0.0 and notes.compactions[0][2] == 0.0


def test_an_observer_that_fails_changes_no_eviction_and_is_heard_of():
    alone, observed = Prompt(200), Prompt(200)
    expected = scored(alone).finish()
    failing, other = Notes(fail), Notes()
    with pytest.raises(ZeroDivisionError, match="a bug in an observer"), observed_by(failing), observed_by(other):
        compaction = scored(observed).finish()
        scored(Prompt(200)).finish()
    assert compaction.page_table.equal(expected.page_table) and compaction.num_pages.equal(expected.num_pages)
    assert observed.cache.pool.pages.view(torch.int32).equal(alone.cache.pool.pages.view(torch.int32))
    assert len(failing.choices) == 1 and not failing.compactions, "it is shown no more"
    assert len(other.choices) == len(other.compactions) == 2


def test_an_observer_that_fails_once_tokens_move_changes_no_eviction():
    observed = Prompt(200)
    notes = Notes()
    with pytest.raises(ZeroDivisionError), observed_by(notes):
        eviction = scored(observed)
        eviction.choose()
        notes.act = fail
        compaction = eviction.compact()
    assert [observed.kept_tokens(compaction, 0, head) for head in (0, 1)]


def test_an_interrupt_while_somebody_looks_on_passes():
    def interrupt() -> None:
        raise KeyboardInterrupt

    eviction = scored(Prompt(200))
    with observed_by(Notes(interrupt)), pytest.raises(KeyboardInterrupt):
        eviction.choose()


def test_evictions_are_recorded_in_the_order_in_which_they_end():
    early, first, second = scored(Prompt(120)), scored(Prompt(200)), scored(Prompt(160))
    early.choose()
    with recorded_evictions() as records:
        first.choose()
        second.choose()
        early.compact()
        second.compact()
        compaction = first.compact()
    assert [record.plan.num_tokens for record in records] == [160, 200], "of the early one nobody has seen the scores"
    record = records[1]
    assert record.kept_tokens.equal(Prompt(200).kv_lens(compaction)) and record.num_pages.equal(compaction.num_pages)
    assert record.scores.equal(first.alone._scores.scores.of_layers(0, LAYERS)[0]) and record.seconds == first.seconds
    assert (record.num_first, record.num_last, record.page_bytes) == (2, 8, 16 * 2 * 16 * 4)
