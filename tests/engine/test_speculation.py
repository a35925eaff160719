"""Speculative decoding: evicted rows verify several tokens in a step, and a rejected draft leaves no trace."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import tests.conftest  # noqa: F401  prepares the spawned process as it does this one, before vLLM is imported
from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt

PROMPTS = [random_prompt(length, seed=length) for length in (40, 383, 450, 512, 700)]
ALPHABET = [5, 6, 7]  # of the answers: with few tokens to choose from, drafts are often right and often wrong
# with no query to look at, or one, all of these prompts but their last token may come from the prefix cache
LAST_TOKEN_ONLY = [random_prompt(10 * 32 + 1, seed=1), random_prompt(5 * 32 + 1, seed=2)]
FEW_QUERIES = ("streaming_llm", "tova", "knorm", "keydiff", "curdkv")
NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


@pytest.mark.more_on_v2("on V1 the same; test_draft_model.py verifies drafts on V2")
@pytest.mark.feature("speculative decoding by n-grams")
def test_ngram_drafts_change_no_answer(tiny_llama: Path) -> None:
    """In a process of its own: drafting loads numba, and vLLM's CPU worker does not start twice beside numba."""
    _, _, plain = answers(tiny_llama, None)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        drafted, accepted, speculated = process.submit(answers, tiny_llama, NGRAM).result()
    assert speculated == plain
    assert accepted > 100
    assert drafted - accepted > 100


def answers(model: Path, speculation: dict[str, Any] | None) -> tuple[int, int, list[list[list[int]]]]:
    """Return how many tokens were drafted and accepted, and the answers with uniform and with ragged budgets."""
    with engine(model, budget=96, speculative_config=speculation) as running:
        running.poison_unowned_memory()
        counts = counted_drafts(running)
        tokens = []
        for allocator in ("uniform", "lava"):
            options = {"kv_budget_allocator": allocator}
            tokens.append(running.tokens(PROMPTS, max_tokens=100, extra_args=options, allowed_token_ids=ALPHABET))
        assert running.num_evictions == 8
        for policy in FEW_QUERIES:  # vLLM pads a step of one token with drafts
            for prompt in LAST_TOKEN_ONLY * 2:
                tokens.append(running.tokens([prompt], max_tokens=12, extra_args={"kv_eviction": policy}))
        assert running.num_evictions == 8 + 4 * len(FEW_QUERIES)
        running.check_all_free()
    return sum(drafted for drafted, _ in counts), sum(accepted for _, accepted in counts), tokens


def counted_drafts(running: Engine) -> list[tuple[int, int]]:
    """Collect (drafted, accepted) of every verification from now on."""
    counts: list[tuple[int, int]] = []
    make = running.scheduler.make_spec_decoding_stats

    def spy(stats: Any, num_draft_tokens: int, num_accepted_tokens: int, **kwargs: Any) -> Any:
        counts.append((num_draft_tokens, num_accepted_tokens))
        return make(stats, num_draft_tokens, num_accepted_tokens, **kwargs)

    running.scheduler.make_spec_decoding_stats = spy
    return counts
