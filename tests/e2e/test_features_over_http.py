"""What clients of an OpenAI-compatible server use, on one with eviction and two API processes in front of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests.e2e.prompts import FACT, long_text
from tests.tiny_lora import make_adapter
from tools.server import Server

pytestmark = pytest.mark.more("a real model over HTTP: engine/test_request_features.py shows the same on both runners")

BUDGET = 192
TEXT = long_text(60)
WHOLE = {"vllm_xargs": {"kv_eviction": "none"}}
ADAPTERS = ("red", "blue")


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("features")
    modules = [f"{name}={make_adapter(smollm2, folder / name, seed)}" for seed, name in enumerate(ADAPTERS)]
    flags = ["--kv-eviction", "snapkv", "--kv-budget", str(BUDGET), "--max-model-len", "2048", "--max-num-seqs", "16"]
    # one slot stays empty: vLLM's LoRA on CPU gives a base model's rows in a mixed batch what is in the last one
    lora = ["--enable-lora", "--max-loras", "3", "--max-lora-rank", "8", "--lora-modules", *modules]
    # float32, since answers in bfloat16 depend on what else is in the batch
    rest = ["--dtype", "float32", "--api-server-count", "2", "--enforce-eager", "--served-model-name", "model"]
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "TRITON_INTERPRET": "0"}
    with Server(smollm2, folder / "server.log", *flags, *lora, *rest, env=env) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)


def chat(client: OpenAI, text: str = TEXT, model: str = "model", **kwargs: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    settings = {"max_tokens": 24, "temperature": 0, **kwargs}
    return client.chat.completions.create(model=model, messages=messages, **settings)


def evictions(server: Server) -> float:
    return server.metrics()["kvevict:evictions_total"]


@pytest.mark.feature("structured output")
def test_structured_output(server: Server, client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"place": {"enum": ["lighthouse", "harbour"]}, "code": {"type": "integer", "maximum": 99}},
        "required": ["place", "code"],
        "additionalProperties": False,
    }
    before = evictions(server)
    wanted = {"type": "json_schema", "json_schema": {"name": "fact", "schema": schema}}
    answers = [chat(client, response_format=wanted, max_tokens=60, extra_body=extra) for extra in ({}, WHOLE)]
    for answer in answers:
        fact = json.loads(answer.choices[0].message.content)
        assert fact["place"] in ("lighthouse", "harbour") and isinstance(fact["code"], int)
    assert evictions(server) == before + 1


@pytest.mark.feature("streaming and stop strings")
def test_streams_and_stop_strings(server: Server, client: OpenAI) -> None:
    whole_answer = chat(client, max_tokens=48).choices[0].message.content
    chunks = chat(client, max_tokens=48, stream=True, stream_options={"include_usage": True})
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(parts) == whole_answer
    stop = whole_answer[3:5]
    stopped = chat(client, max_tokens=48, stop=[stop]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == whole_answer[: whole_answer.index(stop)]


@pytest.mark.feature("beam search")
def test_beam_search(server: Server, client: OpenAI) -> None:
    """Every step of a beam is a request of one token, and the first token comes from the full cache."""
    answers = []
    for extra in ({}, WHOLE):
        extra_body = {"use_beam_search": True, **extra}
        answer = client.completions.create(
            model="model", prompt=TEXT, max_tokens=5, temperature=0, n=2, extra_body=extra_body
        )
        answers.append([choice.text for choice in answer.choices])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) == 2


@pytest.mark.feature("LoRA")
def test_two_adapters_and_the_base_model_in_one_batch(server: Server, client: OpenAI) -> None:
    names = ("model", *ADAPTERS) * 2
    texts = [f"Letter {index // 3}. {TEXT}" for index in range(6)]
    alone = [chat(client, text, name).choices[0].message.content for text, name in zip(texts, names, strict=True)]
    before = evictions(server)
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(lambda index: chat(client, texts[index], names[index]), range(6)))
    assert [answer.choices[0].message.content for answer in together] == alone
    assert len(set(alone[:3])) == 3
    assert evictions(server) == before + 6


@pytest.mark.feature("several API server processes")
def test_both_api_processes_check_options_and_add_up_metrics(server: Server, client: OpenAI) -> None:
    before = server.metrics()
    connections = [OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0) for _ in range(8)]
    for connection in connections:
        chat(connection, max_tokens=2)
        with pytest.raises(BadRequestError, match="unknown eviction policy 'snapkvv'"):
            chat(connection, extra_body={"vllm_xargs": {"kv_eviction": "snapkvv"}})
    after = server.metrics()
    assert after["kvevict:evictions_total"] == before["kvevict:evictions_total"] + 8
    assert after["kvevict:eviction_seconds_count"] == before["kvevict:eviction_seconds_count"] + 8


@pytest.mark.feature("prefix caching")
def test_a_chat_hits_the_prompt_of_its_first_turn(server: Server, client: OpenAI) -> None:
    messages = [{"role": "user", "content": f"A text of its own. {TEXT}"}]
    first = client.chat.completions.create(model="model", messages=messages, max_tokens=24, temperature=0)
    before = server.metrics()["vllm:prefix_cache_hits_total"]
    messages += [first.choices[0].message.model_dump(include={"role", "content"}), {"role": "user", "content": FACT}]
    second = client.chat.completions.create(model="model", messages=messages, max_tokens=24, temperature=0)
    hits = server.metrics()["vllm:prefix_cache_hits_total"] - before
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    assert hits == first.usage.prompt_tokens // 32 * 32
