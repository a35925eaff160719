"""Compiled models: eviction runs between the compiled pieces, where attention does."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm.config import CompilationMode

from tests.engine.harness import engine
from tests.tiny_llama import random_prompt

PROMPTS = [random_prompt(length, seed=length) for length in (40, 333, 512, 700)]

# vLLM 0.33 warms kernels up on CPU, too; the interpreter does not carry the one for top-k and top-p
NO_WARM_UP = {"enable_jit_warmup": False}


@pytest.mark.not_on_v1("the newest vLLM with V2 runs it in `make test`")
@pytest.mark.feature("torch.compile")
def test_a_compiled_model_answers_as_an_eager_one(tiny_llama: Path) -> None:
    answers = []
    for enforce_eager in (False, True):
        settings = {"max_num_batched_tokens": 256, "enforce_eager": enforce_eager, "kernel_config": NO_WARM_UP}
        with engine(tiny_llama, budget=96, **settings) as running:
            mode = running.llm.llm_engine.vllm_config.compilation_config.mode
            assert (mode == CompilationMode.NONE) == enforce_eager
            answers.append(running.tokens(PROMPTS, max_tokens=40))
            answers[-1] += running.tokens(PROMPTS, max_tokens=40, extra_args={"kv_eviction": "laq"})
            assert running.num_evictions == 6
            running.check_all_free()
    assert answers[0] == answers[1]
