"""MorphKV in a real engine: over 300 steps it keeps what the paper keeps, and holds a constant number of blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import USES_V2_RUNNER
from tests.engine.dense_decode import BLOCK, Budget, Score, check_kept, morphkv, run_and_watch, tova
from tests.engine.harness import engine
from tests.tiny_llama import random_prompt
from vllm_kvevict.engine.offline.check.dense import DenseModel

MORE = pytest.mark.more("other windows, fusions and groups of MorphKV: policies/test_morphkv.py has all of them")
CASES = [
    pytest.param(96, {"window": 8, "fusion": "sum"}, morphkv(8, "sum", "max"), id="8-sum-max", marks=MORE),
    pytest.param(128, {"window": 32, "fusion": "max"}, morphkv(32, "max", "max"), id="32-max-max"),
    pytest.param(
        160,
        {"window": 40, "fusion": "sum", "group": "mean"},
        morphkv(40, "sum", "mean"),
        id="40-sum-mean",
        marks=MORE,
    ),
    pytest.param(96, {"window": 1, "group": "layer", "denominator": "all"}, tova, id="1-tova"),
]


@pytest.mark.feature("eviction while the answer grows")
@pytest.mark.parametrize(("budget", "options", "score"), CASES[1:2] if USES_V2_RUNNER else CASES)
def test_tokens_kept_one_by_one_are_the_papers(
    tiny_llama: Path, budget: int, options: dict[str, Any], score: Score
) -> None:
    dense, num_blocks, prompt = DenseModel(tiny_llama), budget // BLOCK, random_prompt(200, seed=200)
    with engine(tiny_llama, "morphkv", budget, fields={"policy_options": options, "interval": 1}) as running:
        running.poison_unowned_memory()
        answer, held, kept = run_and_watch(running, prompt, True, max_tokens=300)
        assert set(held[4:]) == {num_blocks}
        assert sorted(kept) == list(range(200, 499))
        limits = Budget(num_blocks, num_sink=0, num_recent=options["window"], per_token_from=0)
        num_swaps, logits = check_kept(dense, [*prompt, *answer], kept, score, limits)
        assert num_swaps == 0
        assert logits[199:-1].argmax(-1).tolist() == answer
        running.check_all_free()


@pytest.mark.feature("eviction while the answer grows")
@pytest.mark.parametrize(("budget", "options", "score"), CASES[1:2] if USES_V2_RUNNER else CASES)
def test_tokens_kept_are_the_papers(tiny_llama: Path, budget: int, options: dict[str, Any], score: Score) -> None:
    dense, num_blocks = DenseModel(tiny_llama), budget // BLOCK
    with engine(tiny_llama, "morphkv", budget, fields={"policy_options": options}) as running:
        running.poison_unowned_memory()
        for length in (30, 200):
            prompt = random_prompt(length, seed=length)
            answer, held, kept = run_and_watch(running, prompt, max_tokens=300)
            assert set(held[budget if length < budget else 4 :]) == {num_blocks}
            assert len(kept) >= 300 // BLOCK - num_blocks
            limits = Budget(num_blocks, num_sink=0, num_recent=options["window"])
            num_swaps, logits = check_kept(dense, [*prompt, *answer], kept, score, limits)
            assert num_swaps == 0
            assert logits[length - 1 : -1].argmax(-1).tolist() == answer
        running.check_all_free()
