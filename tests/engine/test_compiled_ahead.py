"""What vLLM's warm-up compiles for us. Its CPU workers have none: what is registered for it is asked here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt
from vllm_kvevict.budgets import ALLOCATORS
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.worker import warm_up
from vllm_kvevict.eviction.observer import Choice, EvictionObserver, observed_by
from vllm_kvevict.policies import POLICIES

PROMPT = random_prompt(333, seed=0)


class Chosen(EvictionObserver):
    def __init__(self) -> None:
        self.choices: list[Choice] = []

    def chosen(self, choice: Choice) -> None:
        self.choices.append(choice)


@pytest.fixture(scope="module")
def running(tiny_llama: Path) -> Iterator[Engine]:
    observer = Chosen()
    with observed_by(observer), engine(tiny_llama, budget=96) as started:
        assert not observer.choices  # a CPU worker has started, and rehearsed nothing
        yield started


def warm_up_of(running: Engine) -> Chosen:
    """vLLM's own kernels, which are registered as well, cannot be compiled on a CPU."""
    registered = running.worker.model_runner.jit_warmup_registry._registrations
    (kernels,) = [kernel for kernel in registered if isinstance(kernel, warm_up.EvictionKernels)]
    observer = Chosen()
    with observed_by(observer):
        kernels.warmup()
    return observer


def test_all_that_requests_may_choose_is_rehearsed(running: Engine, caplog: pytest.LogCaptureFixture) -> None:
    (before,) = running.tokens([PROMPT])
    pages = running.bridge.pool.pages.clone()
    with caplog.at_level(logging.WARNING):
        observer = warm_up_of(running)
    assert not [record for record in caplog.records if record.name == warm_up.logger.name]
    assert running.bridge.pool.pages.equal(pages)
    policies = {type(choice.method.policy).name for choice in observer.choices}
    allocators = {type(choice.method.allocator).name for choice in observer.choices}
    assert policies == set(POLICIES.names_in("vllm_kvevict"))
    assert allocators == set(ALLOCATORS.names_in("vllm_kvevict")) - {"fixed"}  # which needs a file
    assert any(choice.method.schedule.per_token for choice in observer.choices)
    assert running.tokens([PROMPT]) == [before]
    running.check_all_free()


def methods_of(running: Engine, **fields: Any) -> dict[str, Any]:
    config = EvictionConfig.parse({"policy": "snapkv", "budget": 96, **fields})
    return dict(warm_up._methods(running.worker.vllm_config, config, 32))


def test_what_requests_may_not_choose_is_not(running: Engine) -> None:
    methods = methods_of(running, request_options="none")
    assert {type(method.policy).name for method in methods.values()} == {"snapkv"}
    limits = {"policies": ["tova", "none"], "options": ["kv_eviction"]}
    methods = methods_of(running, request_options=limits)
    assert {type(method.policy).name for method in methods.values()} == {"snapkv", "tova"}
    assert not any(method.schedule.is_bounded for method in methods.values())


def test_a_method_that_fails_is_logged(
    running: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Any, inputs: Any) -> torch.Tensor:
        raise RuntimeError("out of keys")

    monkeypatch.setattr(POLICIES.get("knorm"), "score_batch", fail)
    with caplog.at_level(logging.WARNING):
        observer = warm_up_of(running)
    (record,) = [record for record in caplog.records if record.name == warm_up.logger.name]
    assert "kv_eviction knorm" in record.message
    assert "out of keys" in record.message
    assert "vatp" in {type(choice.method.policy).name for choice in observer.choices}
