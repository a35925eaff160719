"""On machines with AMX: evicted requests keep the same tokens, bit for bit, in pages that AMX multiplies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt

pytestmark = pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this machine has no AMX")

LENGTH, ANSWER, BUDGET = 300, 40, 128
DURING_DECODE = {"kv_evict_during_decode": 1}
OPTIONS = {
    "snapkv": {"kv_eviction": "snapkv"},
    "lava": {"kv_eviction": "lava", "kv_budget_allocator": "lava"},
    "h2o": {"kv_eviction": "h2o"},
    "laq": {"kv_eviction": "laq"},
    "block by block": {"kv_eviction": "snapkv", **DURING_DECODE},
    "token by token": {"kv_eviction": "h2o", **DURING_DECODE, "kv_evict_interval": 1},
}


def cache_of_first_layer(running: Engine, options: dict[str, Any]) -> list[torch.Tensor]:
    """Return K and V of the first layer, head by head, as they are before an answer's last token.

    They depend on the tokens alone, not on how attention rounds; so do queries there. The answer is forced.
    """
    forced = {"max_tokens": ANSWER, "allowed_token_ids": [7]}
    running.add(random_prompt(LENGTH, seed=1), extra_args=options, **forced)
    held: list[torch.Tensor] = []
    num_tokens = 0
    while running.llm.llm_engine.has_unfinished_requests():
        for output in running.step():
            num_tokens = len(output.outputs[0].token_ids)
        if num_tokens == ANSWER - 1:
            (request,) = running.scheduler.running
            bridge, block_size = running.bridge, running.bridge.pool.block_size
            rows = running.pages_of(bridge, request.request_id)[0]
            slots = torch.tensor([page for row in rows for page in row])[:, None] * block_size
            # the last page of a row is filled in part, and what lies behind its tokens is anyone's
            kv = bridge.pool.gather((slots + torch.arange(block_size)).flatten())
            counts = torch.tensor([len(row) for row in rows]) * block_size
            keeps = counts - -request.num_computed_tokens % block_size
            for part in kv:
                heads = zip(part.split(counts.tolist()), keeps.tolist(), strict=True)
                held += [head[: keep - 1].view(torch.int16).clone() for head, keep in heads]
    return held


def rows_of(part: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(row) for row in part.tolist()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_same_tokens_are_held_as_without_amx(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    found = []
    for has_amx in (True, False):
        if not has_amx:
            monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        with engine(tiny_llama, "snapkv", BUDGET, dtype="bfloat16") as running:
            running.poison_unowned_memory()
            assert running.bridge.pool.is_tiled == has_amx
            found.append(cache_of_first_layer(running, options))
            assert running.num_evictions == 1
            running.check_all_free()
    held, expected = found
    assert len(held) == 4
    for one, other in zip(held, expected, strict=True):
        if options["kv_eviction"] == "laq":  # whose pseudo tokens are the model's, and may be others
            assert len(rows_of(one) & rows_of(other)) >= 0.8 * len(rows_of(one))
        else:
            assert one.equal(other)


def test_a_cache_in_fp8_is_packed_as_on_other_machines(tiny_llama: Path) -> None:
    with engine(tiny_llama, "snapkv", BUDGET, dtype="bfloat16", kv_cache_dtype="fp8") as running:
        assert not running.bridge.pool.is_tiled
