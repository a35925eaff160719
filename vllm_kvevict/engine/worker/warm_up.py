"""Kernels are compiled before the first request comes, by vLLM's own warm-up.

vLLM's GPU workers compile what is registered with their model runner, unless they are told to run eagerly. Its CPU
workers compile nothing, and then nothing of this runs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from vllm.model_executor.warmup.jit_warmup import VllmJitKernel

from vllm_kvevict.budgets import ALLOCATORS
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.readers import Readers
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.checks import check_config
from vllm_kvevict.engine.settings import eviction_config
from vllm_kvevict.engine.worker.model import ModelWeights
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.rehearsal import Rehearsal
from vllm_kvevict.foreign.code import apart, contained, with_traceback
from vllm_kvevict.options.names import ALLOCATOR, BUDGET, DURING_DECODE, INTERVAL, POLICY
from vllm_kvevict.policies import POLICIES

logger = logging.getLogger("vllm.kvevict")

# the more a request asks for, the more kernels it needs: the first of these that its policy takes has all of them
_SCHEDULES: tuple[dict[str, Any], ...] = ({DURING_DECODE: True, INTERVAL: 1}, {DURING_DECODE: True}, {})


def register(runner: Any, pool: PagePool, layer_names: list[str], weights: ModelWeights, readers: Readers) -> None:
    """Let the warm-up of vLLM's model runner compile what eviction in some layers may need, all of one pool."""
    config = eviction_config(runner.vllm_config)
    if config is not None:
        with runner.jit_warmup_registry.activate():
            kernels = EvictionKernels.of(runner.vllm_config, config, pool, layer_names, weights, readers)
            kernels.register_warmup()


class EvictionKernels(VllmJitKernel[str]):
    """The kernels behind what requests may ask for. A key describes a method; to compile it is to rehearse it.

    Those of other packages are rehearsed if the server's configuration names them: requests may choose many.
    """

    CompileKey = str

    _methods: dict[str, Method]
    _pool: PagePool
    _layer: Any
    _weights: ModelWeights
    _counts: list[int]

    @classmethod
    def of(
        cls,
        vllm_config: Any,
        config: EvictionConfig,
        pool: PagePool,
        layer_names: list[str],
        weights: ModelWeights,
        readers: Readers,
    ) -> EvictionKernels:
        kernels = cls()
        kernels._methods = dict(_methods(vllm_config, config, pool.block_size))
        kernels._pool = pool
        kernels._layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        kernels._weights = weights
        kernels._counts = sorted(set(readers.counts))
        return kernels

    def get_warmup_keys(self, *_: Any, **__: Any) -> list[str]:
        return list(self._methods)

    @torch.inference_mode()
    def compile(self, compile_key: str) -> None:
        """A policy or an allocator that fails here may do so for a request, too, which then ends: it is logged."""
        with contained(partial(_log, compile_key)), apart:
            for count in self._counts:
                Rehearsal(
                    self._methods[compile_key],
                    self._pool,
                    self._layer.num_heads * count,
                    self._layer.dtype,
                    self._weights.scale(0),
                    self._weights.of,
                ).run()


def _log(method: str, error: BaseException) -> None:
    logger.warning("No kernel was compiled ahead for requests of %s:\n%s", method, with_traceback(error))


def _methods(vllm_config: Any, config: EvictionConfig, block_size: int) -> Iterator[tuple[str, Method]]:
    """Yield what requests may be evicted by, and a name of each: the server's method, and those that they may choose.

    One with a policy of its own goes with that policy's allocator, so that policies and allocators need not meet.
    """
    yield "the server's options", config.method()
    policies, allocators = (registry.names_in("vllm_kvevict") for registry in (POLICIES, ALLOCATORS))
    choices: list[dict[str, Any]] = [{}]
    choices += [{POLICY: name} for name in policies] + [{ALLOCATOR: name} for name in allocators]
    # the server's own budget may hold less than another policy protects
    budgets: list[dict[str, Any]] = [{}, {BUDGET: config.limits.most_budget or 0.5}]
    for choice in choices:
        ways = [choice | schedule | budget for schedule in _SCHEDULES for budget in budgets]
        methods = ((options, _method(vllm_config, config, options, block_size)) for options in ways)
        for options, method in methods:
            if method is not None:
                yield ", ".join(f"{name} {value}" for name, value in options.items()) or "no options", method
                break


def _method(vllm_config: Any, config: EvictionConfig, options: dict[str, Any], block_size: int) -> Method | None:
    """Return the method of a request with these options, None if it is refused."""
    try:
        chosen = config.for_request(options, block_size)
        if chosen is None:
            return None
        check_config(chosen, vllm_config)
        return chosen.method()
    except ValueError:
        return None
