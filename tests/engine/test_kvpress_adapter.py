"""A press of kvpress, chosen by a request, keeps in the real engine what it says for dense keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.engine.harness import engine
from tests.tiny_llama import random_prompt
from vllm_kvevict.engine.offline.check.dense import DenseModel

pytest.importorskip("kvpress", reason="kvpress, or `datasets` or `fire`, which it imports, is not installed")
LENGTH, BUDGET = 500, 96


@pytest.mark.more_on_v2("on V1 a request's press is compared")
def test_a_request_s_press_keeps_what_it_says(tiny_llama: Path, kept_masks: list[torch.Tensor]) -> None:
    import kvpress

    prompt = random_prompt(LENGTH, seed=3)
    limits = {"policies": ["kvpress:KnormPress", "kvpress:TOVAPress"]}
    with engine(tiny_llama, "snapkv", budget=BUDGET, fields={"request_options": limits}) as running:
        running.poison_unowned_memory()
        running.tokens([prompt], extra_args={"kv_eviction": "kvpress:KnormPress"})
        running.tokens([prompt], extra_args={"kv_eviction": "kvpress:TOVAPress"})
        running.tokens([prompt])
        assert running.num_evictions == 3
        running.check_all_free()
    knorm, tova, snapkv = kept_masks
    dense = DenseModel(tiny_llama)
    dense.logits(prompt)
    for layer, (query, keys) in enumerate(zip(dense.queries, dense.keys, strict=True)):
        keys = keys[:, :LENGTH]
        scores = kvpress.KnormPress().score(None, None, keys[None], None, None, None)[0]
        assert_best(knorm[layer], scores)
        attention = query[LENGTH - 1].unflatten(0, (len(keys), -1)) @ keys.transpose(1, 2) / keys.shape[2] ** 0.5
        scores = attention.softmax(-1).mean((0, 1)).expand(len(keys), -1).clone()
        scores[:, -1] = torch.inf
        assert_best(tova[layer], scores)
    assert not knorm.equal(snapkv) and not tova.equal(snapkv)


def test_the_flag_takes_a_press(tiny_llama: Path) -> None:
    load_general_plugins()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    options = {"policy_options": {"window_size": 16}}
    flags = ["--kv-eviction", "kvpress:SnapKVPress", "--kv-budget", "96", "--kv-eviction-config", json.dumps(options)]
    config = EngineArgs.from_cli_args(parser.parse_args(["--model", str(tiny_llama), *flags])).additional_config
    assert config == {"kv_eviction": {"policy": "kvpress:SnapKVPress", "budget": 96, **options}}
    with pytest.raises(SystemExit):
        parser.parse_args(["--model", str(tiny_llama), "--kv-eviction", "kvpres:SnapKVPress"])
    (action,) = [action for action in parser._actions if "--kv-eviction" in action.option_strings]
    assert "kvpress:NAME" in action.help


def assert_best(kept: torch.Tensor, scores: torch.Tensor) -> None:
    """The engine's own keys differ from the dense ones by rounding: only ties of 1e-4 may swap."""
    assert (kept.sum(1) == (BUDGET // 32 - 1) * 32 + LENGTH % 32).all()
    lowest_kept = scores.masked_fill(~kept, torch.inf).amin(1)
    highest_evicted = scores.masked_fill(kept, -torch.inf).amax(1)
    assert (highest_evicted - lowest_kept <= 1e-4 * lowest_kept.abs()).all()
