"""Two engines behind one server, and two API processes in front of them: each engine evicts its own requests."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import BadRequestError, OpenAI

from tests.conftest import USES_V2_RUNNER
from tests.tiny_llama import random_prompt
from tools.server import Server

BUDGET = 96
# tokens take the interpreter longer
COMPARED_TOKENS, LONG_ANSWER = 32 if USES_V2_RUNNER else 1_000, 15_000
PROMPT = random_prompt(700, seed=1)


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ["--kv-eviction", "snapkv", "--kv-budget", str(BUDGET), "--max-model-len", str(LONG_ANSWER + 1_024)]
    flags += ["--hf-overrides", f'{{"max_position_embeddings": {LONG_ANSWER + 1_024}}}', "--skip-tokenizer-init"]
    flags += ["--data-parallel-size", "2", "--api-server-count", "2"]
    rest = ["--dtype", "float32", "--enforce-eager", "--served-model-name", "model"]
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TRITON_INTERPRET": "1" if USES_V2_RUNNER else "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        # vLLM 0.33 wants a memory node for each engine, unless this is set to anything
        "VLLM_CPU_SIM_MULTI_NUMA": "0",
    }
    with Server(tiny_llama, tmp_path_factory.mktemp("parallel") / "server.log", *flags, *rest, env=env) as started:
        log = started.log_path.read_text()
        assert ("Using V2 Model Runner" in log) == USES_V2_RUNNER
        yield started


@pytest.fixture
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)


@pytest.mark.not_on_v1("the newest vLLM with V2 runs it in `make test`")
@pytest.mark.feature("data parallelism", runners=("V1", "V2"))
def test_two_engines_behind_one_server(server: Server, client: OpenAI) -> None:
    def held() -> dict[str, float]:
        samples = [sample for sample in server.samples() if sample.name == "kvevict:kept_pages"]
        # an engine that has evicted nothing yet has no sample
        return {"0": 0.0, "1": 0.0} | {sample.labels["engine"]: sample.value for sample in samples}

    def ask(rank: int) -> list[int]:
        """Read an answer until /metrics has shown what it holds; it is cut short then.

        A scrape may take seconds where the server has few cores, so the answer is far longer than one.
        """
        stream = client.completions.create(
            model="model",
            prompt=PROMPT,
            max_tokens=LONG_ANSWER,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "detokenize": False, "return_token_ids": True},
            extra_headers={"X-data-parallel-rank": str(rank)},
        )
        tokens: list[int] = []
        most: dict[str, float] = {}
        with stream:
            for chunk in stream:
                tokens += getattr(chunk.choices[0], "token_ids", None) or [] if chunk.choices else []
                most = most if any(most.values()) else held()
                if any(most.values()) and len(tokens) >= COMPARED_TOKENS:
                    break
        assert most == {str(rank): BUDGET // 32 * 4, str(1 - rank): 0.0}
        wait_until_nothing_is_held()
        return tokens

    def wait_until_nothing_is_held() -> None:
        deadline = time.monotonic() + 30  # the stream ends before the engine hears of it and the gauges are set
        while any(held().values()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert held() == {"0": 0.0, "1": 0.0}

    before = server.metrics()["kvevict:evictions_total"]
    answers = [ask(rank)[:COMPARED_TOKENS] for rank in (0, 1)]
    assert len(answers[0]) == COMPARED_TOKENS
    assert answers[0] == answers[1]
    assert server.metrics()["kvevict:evictions_total"] == before + 2


@pytest.mark.not_on_v1("the newest vLLM with V2 runs it in `make test`")
@pytest.mark.feature("several API server processes", runners=("V1", "V2"))
def test_both_api_processes_check_options_and_add_up_metrics(server: Server) -> None:
    before = server.metrics()
    connections = [OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0) for _ in range(8)]
    for connection in connections:
        settings = {"model": "model", "prompt": PROMPT, "max_tokens": 2, "temperature": 0}
        connection.completions.create(**settings, extra_body={"detokenize": False})
        with pytest.raises(BadRequestError, match="unknown eviction policy 'snapkvv'"):
            connection.completions.create(**settings, extra_body={"vllm_xargs": {"kv_eviction": "snapkvv"}})
    after = server.metrics()
    assert after["kvevict:evictions_total"] == before["kvevict:evictions_total"] + 8
    assert after["kvevict:eviction_seconds_count"] == before["kvevict:eviction_seconds_count"] + 8
