"""The serving benchmark without a server: exact prompts, the same flags and arrivals for all arms, ratios to stock."""

from __future__ import annotations

import asyncio
import json
import math
import random
from pathlib import Path

import numpy
import pytest

from benchmarks.serving.bench_workloads import (
    ARMS,
    STOCK,
    Polled,
    agreement,
    check,
    client_command,
    measures,
    server_flags,
    summary,
    table,
)
from benchmarks.serving.workloads import BLOCK_SIZE, WORKLOADS, Request, Workload, text_tokens

SCALE = 0.1
TWO = Workload("two", [Request("a", 40, 3, " 12"), Request("b", 50, 3, " 34")], rate=2.0)
RESULT = {
    "input_lens": [40, 50],
    "output_lens": [3, 3],
    "errors": ["", ""],
    "ttfts": [0.1, 0.3],
    "itls": [[0.01, 0.02], [0.03, 0.04]],
    "generated_texts": [" 12.", " 35."],
    "output_throughput": 7.0,
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_prompts_have_the_stated_tokens(name: str, smollm2: Path) -> None:
    workload = WORKLOADS[name](smollm2, SCALE, 0)
    for request in workload.requests:
        assert len(text_tokens(smollm2, request.prompt)) == request.prompt_tokens
        assert request.answer.strip() in request.prompt
    assert workload == WORKLOADS[name](smollm2, SCALE, 0)
    other_round = WORKLOADS[name](smollm2, SCALE, 1)
    assert not {request.prompt for request in workload.requests} & {request.prompt for request in other_round.requests}


def test_sizes_at_full_scale(smollm2: Path) -> None:
    workload = WORKLOADS["memory"](smollm2, 1.0, 0)
    assert workload.num_blocks == 501
    assert len(workload.requests) == 32
    assert all(2_000 <= request.prompt_tokens <= 6_000 for request in workload.requests)
    assert all(128 <= request.output_tokens <= 512 for request in workload.requests)


def test_the_questions_on_a_document_share_it(smollm2: Path) -> None:
    prompts = [text_tokens(smollm2, request.prompt) for request in WORKLOADS["document"](smollm2, 0.2, 0).requests]
    lengths = [len(prompt) for prompt in prompts]
    shared = [sum(ours == theirs for ours, theirs in zip(prompts[0], prompt, strict=False)) for prompt in prompts]
    assert len(prompts) == 5
    assert len({tuple(prompt) for prompt in prompts}) == 5
    assert min(shared) >= max(lengths) - 80  # all but the question


def test_the_data_set_of_the_client(tmp_path: Path) -> None:
    TWO.write(tmp_path / "requests.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert rows == [{"prompt": "a", "output_tokens": 3}, {"prompt": "b", "output_tokens": 3}]


def test_the_arms_differ_in_eviction_alone(tmp_path: Path) -> None:
    stock, off, budget = (server_flags(arm, TWO, "snapkv", 1024, "float32") for arm in ARMS)
    assert stock == off
    assert sorted(set(budget) - set(stock)) == ["--kv-budget", "--kv-eviction", "1024", "snapkv"]
    assert stock[stock.index("--num-gpu-blocks-override") + 1] == str(2 + 2 + 1)
    assert stock[stock.index("--block-size") + 1] == str(BLOCK_SIZE)
    command = client_command(tmp_path, "http://localhost", TWO, tmp_path, seed=3)
    assert command[command.index("--request-rate") + 1] == "2.0"
    assert command[command.index("--seed") + 1] == "3"


def test_the_client_s_arrivals_are_those_of_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.benchmarks import serve

    def arrivals(seed: int) -> list[float]:
        sleeps: list[float] = []

        async def record(seconds: float) -> None:
            sleeps.append(seconds)

        async def draw() -> None:
            async for _ in serve.get_request([object()] * 8, request_rate=2.0):
                pass

        random.seed(seed)
        numpy.random.seed(seed)
        with monkeypatch.context() as patch:
            patch.setattr(serve.time, "time", lambda: 0.0)
            patch.setattr(serve.asyncio, "sleep", record)
            asyncio.run(draw())
        return sleeps

    assert arrivals(1) == arrivals(1) != arrivals(2)
    assert arrivals(1)[-1] == pytest.approx(8 / 2.0)


def test_measures() -> None:
    measured = measures(TWO, RESULT, Polled(running=[1, 2, 2], usage=[0.25, 0.5, 0.75]))
    assert measured == pytest.approx(
        {
            "ttft_ms": 200,
            "itl_ms": 25,
            "itl_p95_ms": 38.5,
            "tokens_per_second": 7,
            "most_running": 2,
            "blocks_max": 3,  # of the 4 that are not the null block
            "blocks_mean": 2,
            "exact": 0.5,
        }
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("errors", ["", "refused"], "refused"),
        ("input_lens", [40, 51], "prompt_tokens"),
        ("output_lens", [3, 2], "output_tokens"),
    ],
)
def test_a_wrong_run_is_an_error(field: str, value: list[object], message: str) -> None:
    check(TWO, RESULT)
    with pytest.raises(RuntimeError, match=message):
        check(TWO, {**RESULT, field: value})


def test_agreement_with_stock(smollm2: Path) -> None:
    assert agreement([" 1 2", " 3"], [" 1 2", " 3"], smollm2) == 1
    same, other = text_tokens(smollm2, " The code is 12"), text_tokens(smollm2, " The code is 13")
    assert agreement([" The code is 12"], [" The code is 13"], smollm2) == 1 - 1 / len(same)
    assert len(same) == len(other)


def test_ratios_are_those_within_a_round() -> None:
    def measured(ttft: float, blocks: float = 2.0) -> dict[str, float]:
        return {**measures(TWO, RESULT, Polled([1], [blocks / 4])), "ttft_ms": ttft}

    stock = [measured(100), measured(200), measured(1_000)]
    ours = [measured(50), measured(300), measured(900)]
    row = summary(ours, stock)
    assert row["ttft_ms"] == 300
    assert row["ttft_ms_ratio"] == 0.9  # the median of 0.5, 1.5 and 0.9, and not 300 / 200
    assert row["itl_ms_ratio"] == 1
    assert math.isnan(summary(ours, [measured(1, blocks=0.0)] * 3)["blocks_max_ratio"])
    text = table({STOCK: summary(stock, stock), "budget": row})
    assert "200 (1.00x)" in text.splitlines()[1]
    assert "300 (0.90x)" in text.splitlines()[1]
