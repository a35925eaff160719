"""The real server, the real client: many requests at once, wrong options, metrics, and every block back at the end."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from openai import BadRequestError, OpenAI
from openai.resources.chat.completions import Completions

from tests.e2e.conftest import BUDGET, ENGINE, ENV, evictions_by_policy
from tests.e2e.prompts import long_text
from tests.monitoring import panel_queries, selectors, server_selectors
from tests.pages import blocks_of
from tools.server import Server, ServerError

ROOT = Path(__file__).resolve().parents[2]
NONE = {"vllm_xargs": {"kv_eviction": "none"}}


def blocks_in_use(server: Server) -> float:
    return server.metrics()["vllm:kv_cache_usage_perc"]


def wait_until_idle(server: Server) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        metrics = server.metrics()
        if metrics["vllm:num_requests_running"] == 0 and metrics["vllm:kv_cache_usage_perc"] == 0:
            return
        time.sleep(0.2)
    raise AssertionError(f"blocks are still in use: {blocks_in_use(server)}")


def chat(client: OpenAI, text: str, max_tokens: int = 12, **kwargs: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(
        model="model", messages=messages, max_tokens=max_tokens, temperature=0, **kwargs
    )


@pytest.mark.parametrize("page", ["README.md", "docs/configuration.md"])
def test_requests_of_the_pages_are_served(server: Server, client: OpenAI, monkeypatch, page: str) -> None:  # type: ignore[no-untyped-def]
    """As they are written, but for the server's address, its model's name and the length of the answer."""
    answers, create = [], Completions.create

    def short(*args: Any, **kwargs: Any) -> Any:
        answers.append(create(*args, max_tokens=4, **kwargs))

    monkeypatch.setattr(Completions, "create", short)
    (code,) = [block for block in blocks_of(ROOT / page, "python") if "completions" in block]
    code = code.replace("http://localhost:8000", server.base_url).replace('"MODEL"', '"model"')
    exec(code, {"client": client, "model": "model", "messages": [{"role": "user", "content": long_text(2)}]})
    assert len(answers) == code.count("completions.create") > 0
    assert all(answer.choices[0].finish_reason == "length" for answer in answers)


def test_one_line_at_the_start_says_what_is_on(server: Server) -> None:
    lines = [line for line in server.log_path.read_text().splitlines() if "KV eviction is on" in line]
    assert len(lines) == 1
    assert "SnapKV(window=32, pool_kernel=7, pool='max'" in lines[0] and f"budget={BUDGET}" in lines[0]


def test_a_line_at_the_start_says_what_the_memory_allows(server: Server) -> None:
    (line,) = (line for line in server.log_path.read_text().splitlines() if "once they are evicted" in line)
    num_blocks = 1024**3 // (2 * 30 * 3 * 64 * 4 * 32)
    expected = f"8,192 tokens: {num_blocks / 8:.2f}x once they are evicted, {num_blocks / 256:.2f}x before"
    assert expected in line


def test_usage_falls_once_the_prompt_is_evicted(server: Server, client: OpenAI) -> None:
    """About 2,800 tokens: at least 90 % of the blocks are back while the answer grows."""
    wait_until_idle(server)
    before = server.metrics()
    usage, held, tokens = [], [], 0
    with chat(client, long_text(172), max_tokens=400, stream=True, extra_body={"ignore_eos": True}) as stream:
        for chunk in stream:
            tokens += bool(chunk.choices and chunk.choices[0].delta.content)
            if tokens in (20, 40, 60):
                usage.append(blocks_in_use(server))
                held.append(server.metrics())
            if tokens == 60:
                break
    wait_until_idle(server)
    after = server.metrics()
    total_blocks = 1024**3 // (2 * 30 * 3 * 64 * 4 * 32)
    prompt_blocks = (after["vllm:prompt_tokens_total"] - before["vllm:prompt_tokens_total"]) / 32
    freed = after["kvevict:freed_blocks_total"] - before["kvevict:freed_blocks_total"]
    assert prompt_blocks > 85
    assert freed >= 0.9 * prompt_blocks
    # what is left: 8 kept blocks and those of the answer so far
    assert max(usage) * total_blocks <= 8 + 400 / 32 + 1
    assert {metrics["kvevict:kept_pages"] for metrics in held} == {8 * 30 * 3}
    assert all(7 * 32 < metrics["kvevict:kept_tokens"] <= 8 * 32 for metrics in held)
    assert after["kvevict:kept_pages"] == after["kvevict:kept_tokens"] == 0


def test_metrics_count_evictions(server: Server, client: OpenAI) -> None:
    before, evictions = server.metrics(), evictions_by_policy(server)
    prompt_tokens = chat(client, long_text(60)).usage.prompt_tokens
    wait_until_idle(server)
    after = server.metrics()
    kept = (BUDGET // 32 - 1) * 32 + (prompt_tokens % 32 or 32)

    def grew(name: str) -> float:
        return after[name] - before[name]

    assert grew("kvevict:evictions_total") == 1
    assert grew("kvevict:evicted_tokens_total") == prompt_tokens - kept
    assert grew("kvevict:freed_blocks_total") == -(-prompt_tokens // 32) - BUDGET // 32
    assert grew("kvevict:kept_fraction_sum") == pytest.approx(kept / prompt_tokens)
    assert 0 < grew("kvevict:eviction_seconds_sum") < 10
    (line,) = (
        line for line in server.log_path.read_text().splitlines() if f'"prompt_tokens": {prompt_tokens},' in line
    )
    logged = json.loads(line[line.index("{") :])
    assert logged["kept_tokens"] == kept and logged["freed_blocks"] == grew("kvevict:freed_blocks_total")
    assert (logged["policy"], logged["allocator"], logged["kept_blocks"]) == ("snapkv", "uniform", BUDGET // 32)
    assert logged["milliseconds"] == pytest.approx(1e3 * grew("kvevict:eviction_seconds_sum"), abs=0.01)
    assert evictions_by_policy(server) - evictions == {("snapkv", "uniform"): 1}


def test_eviction_can_be_switched_off_or_widened_by_a_request(server: Server, client: OpenAI) -> None:
    before = server.metrics()["kvevict:evictions_total"]
    chat(client, long_text(40), extra_body=NONE)
    client.completions.create(model="model", prompt=long_text(40), max_tokens=4, extra_body=NONE)
    chat(client, long_text(40), extra_body={"vllm_xargs": {"kv_budget": 8000}})
    assert server.metrics()["kvevict:evictions_total"] == before
    client.completions.create(
        model="model", prompt=long_text(40), max_tokens=4, extra_body={"vllm_xargs": {"kv_budget": 0.2}}
    )
    assert server.metrics()["kvevict:evictions_total"] == before + 1


@pytest.mark.feature("eviction while the answer grows")
def test_a_long_answer_holds_a_constant_number_of_blocks(server: Server, client: OpenAI) -> None:
    """450 tokens in a budget of 256, which the question alone does not fill."""
    wait_until_idle(server)
    before = server.metrics()["kvevict:decode_evictions_total"]
    options = {"kv_eviction": "morphkv", "kv_budget": BUDGET}
    stream = client.completions.create(
        model="model",
        prompt="Write a very long story about a lighthouse.",
        max_tokens=450,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "vllm_xargs": options},
    )
    usage = []
    for count, _ in enumerate(stream):
        if count % 50 == 0:
            usage.append(blocks_in_use(server))
    block = min(usage)  # after the first token the request holds one
    assert len(usage) == 9
    assert [round(each / block) for each in usage[6:]] == [BUDGET // 32] * 3
    # the prompt and the answer but its last token, in blocks of 32, less what the budget holds
    evicted = server.metrics()["kvevict:decode_evictions_total"] - before
    assert evicted == pytest.approx(450 // 32 - BUDGET // 32, abs=1)
    wait_until_idle(server)


@pytest.mark.feature("eviction between the chunks of a prompt")
def test_chunks_of_a_long_prompt_are_counted_as_they_are_evicted(server: Server, client: OpenAI) -> None:
    wait_until_idle(server)
    before = server.metrics()
    options = {"kv_evict_during_prefill": 1}
    prompt_tokens = chat(client, long_text(300), extra_body={"vllm_xargs": options}).usage.prompt_tokens
    assert prompt_tokens > 4096  # at least three chunks of 2,048
    wait_until_idle(server)
    after = server.metrics()
    grew = {name: after[name] - before[name] for name in after if name.startswith("kvevict:")}
    kept = (BUDGET // 32 - 1) * 32 + prompt_tokens % 32
    assert grew["kvevict:evictions_total"] == 1
    assert grew["kvevict:evicted_tokens_total"] == prompt_tokens - kept
    assert grew["kvevict:freed_blocks_total"] == -(-prompt_tokens // 32) - -(-kept // 32)
    assert after["kvevict:kept_tokens"] == after["kvevict:kept_pages"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_eviction": "snapkvv"}, "unknown eviction policy 'snapkvv'. Did you mean 'snapkv'?"),
        ({"kv_eviction": 1}, "kv_eviction: expected 'none' or the name of a policy, got 1"),
        ({"kv_budget": -5}, "kv_budget: expected a whole number of tokens of at least 1"),
        ({"kv_budget": 1.5}, "or 'auto', got 1.5"),
        ({"kv_budget": "much"}, "kv_budget: expected a whole number of tokens"),
        ({"kv_budget_allocator": "adakw"}, "unknown budget allocator 'adakw'. Did you mean 'adakv'?"),
        ({"kv_budget": 8}, "kv_budget: expected at least 33 tokens, got 8: blocks hold 32, and"),
        ({"kv_evict_during_decode": "yes"}, "kv_evict_during_decode: expected true or false, got 'yes'"),
        (
            {"kv_evict_interval": 1},
            "kv_evict_interval: counts tokens of the answer, and policy 'snapkv' does not",
        ),
        ({"kv_budgt": 64}, "vllm_xargs: unknown option 'kv_budgt'. Did you mean 'kv_budget'?"),
        ({"kv_eviction": "kvpress:KnormPress"}, "kv_eviction: a request may name a press only if the server was"),
        ({"kv_eviction": "a" * 10**6}, "kv_eviction: expected 'none' or the name of a policy, got a text of 1000000"),
    ],
)
def test_wrong_options_are_a_400_that_names_the_field(
    server: Server, client: OpenAI, options: dict[str, Any], message: str
) -> None:
    before = server.metrics()["kvevict:refused_requests_total"]
    with pytest.raises(BadRequestError) as error:
        chat(client, long_text(20), extra_body={"vllm_xargs": options})
    assert message in str(error.value)
    with pytest.raises(BadRequestError):
        client.completions.create(model="model", prompt="hello", max_tokens=2, extra_body={"vllm_xargs": options})
    with pytest.raises(BadRequestError) as error:  # not a stream that begins and then breaks off
        chat(client, long_text(20), stream=True, extra_body={"vllm_xargs": options})
    assert message in str(error.value)
    assert server.metrics()["kvevict:refused_requests_total"] == before + 3
    (option,) = options if "kv_budgt" not in options else ("unknown",)
    refused = {
        sample.labels["option"]
        for sample in server.samples()
        if sample.name == "kvevict:refused_requests_total" and sample.value
    }
    assert option in refused
    assert server.is_healthy()
    assert chat(client, "Hello", max_tokens=2).choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_every_endpoint_refuses_a_wrong_option_before_it_answers(server: Server, stream: bool) -> None:
    """Not by a status of 200 and a stream that breaks off."""
    messages, body = [{"role": "user", "content": "Hello"}], {"model": "model", "stream": stream, "max_tokens": 2}
    bodies = [
        ("completions", {**body, "prompt": "Hello"}),
        ("completions", {**body, "stream": False, "prompt": "Hello", "use_beam_search": True, "n": 2}),
        ("chat/completions", {**body, "messages": messages}),
        ("messages", {**body, "messages": messages}),
        ("responses", {"model": "model", "stream": stream, "max_output_tokens": 2, "input": "Hello"}),
    ]
    before = server.metrics()["kvevict:refused_requests_total"]
    for options, expected in (({"kv_eviction": "snapvk"}, 400), ({"kv_budget": 64}, 200)):
        answers = [post(server, path, {**each, "vllm_xargs": options}) for path, each in bodies]
        assert [status for status, _ in answers] == [expected] * len(bodies), answers
        # what vLLM does not know of /v1/messages it drops before anybody can look at it
        misplaced = [post(server, path, {**each, **options}) for path, each in bodies if path != "messages"]
        place = f"{next(iter(options))}: expected in vllm_xargs"
        assert [status == 400 and place in text for status, text in misplaced] == [True] * 4, misplaced
        said = "kv_eviction: unknown eviction policy 'snapvk'. Did you mean 'snapkv'?"
        assert all((said in text) == (expected == 400) for _, text in answers), answers
    assert server.metrics()["kvevict:refused_requests_total"] == before + len(bodies) + 2 * 4


def post(server: Server, path: str, body: dict[str, Any]) -> tuple[int, str]:
    """Return the status and the text of an answer."""
    url, headers = f"{server.base_url}/v1/{path}", {"Content-Type": "application/json"}
    try:
        with urlopen(Request(url, json.dumps(body).encode(), headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def test_the_dashboard_and_the_alerts_read_metrics_that_there_are(server: Server) -> None:
    samples = server.samples()
    for selector in server_selectors():
        labels = {matcher.name: matcher.value for matcher in selector.matchers.matchers}
        found = [
            sample for sample in samples if sample.name == selector.name and labels.items() <= sample.labels.items()
        ]
        assert found, selector
    counted = {name for name in server.metrics() if name.startswith("kvevict:") and not name.endswith("_created")}
    shown = {family(str(selector.name)) for query in panel_queries() for selector in selectors(query)}
    assert set(map(family, counted)) <= shown


def family(sample: str) -> str:
    """The metric of which a sample is a part."""
    return re.sub("_(bucket|sum|count)$", "", sample)


@pytest.mark.feature("aborted requests")
def test_sixteen_requests_at_once_streamed_aborted_whole_and_evicted(server: Server, client: OpenAI) -> None:
    wait_until_idle(server)

    def one(index: int) -> str:
        extra = {**(NONE if index % 5 == 0 else {}), "ignore_eos": True}
        text = long_text(10 + 3 * index, fact_at=index / 16)
        if index % 4 == 3:  # aborted half-way
            stream = chat(client, text, max_tokens=300, stream=True, extra_body=extra)
            for seen, _ in enumerate(stream):
                if seen == 3 + index:
                    stream.close()
                    break
            return "aborted"
        if index % 2:
            chunks = chat(client, text, max_tokens=30, stream=True, extra_body=extra)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        return chat(client, text, max_tokens=30, extra_body=extra).choices[0].message.content

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(one, range(16)))
    assert len(answers) == 16 and all(answers)
    wait_until_idle(server)
    assert server.is_healthy()


@pytest.mark.more("a server of its own; tests/engine/test_what_fits.py draws such requests in the engine")
def test_a_budget_beyond_the_cache_blocks_nobody(smollm2: Path, tmp_path: Path) -> None:
    """25 blocks of 32 tokens: one client's wider budget is served alone, one that cannot be is a 400 that says why."""
    flags = ["--kv-eviction", "snapkv", "--kv-budget", "256", "--kv-evict-during-prefill", "--max-model-len", "4096"]
    flags += ["--max-num-batched-tokens", "256", "--num-gpu-blocks-override", "26"]
    with Server(smollm2, tmp_path / "log", *flags, *ENGINE, env=ENV) as server:
        client = OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=60)

        def ask(num_tokens: int, **options: int | str) -> str | None:
            prompt = list(range(1000, 1000 + num_tokens))
            answer = client.completions.create(
                model="model", prompt=prompt, max_tokens=4, temperature=0, extra_body={"vllm_xargs": options}
            )
            return answer.choices[0].finish_reason

        assert ask(3000) == "length"
        with ThreadPoolExecutor(3) as pool:
            wide = [pool.submit(ask, 1000, kv_budget=budget) for budget in (384, 704)]
            behind = pool.submit(ask, 50)
        assert behind.result() == "length"
        assert wide[0].result() == "length"
        expected = "kv_budget: a prompt of 1000 tokens needs 30 blocks with these options, and the KV cache has 25"
        with pytest.raises(BadRequestError, match=expected):
            wide[1].result()
        with pytest.raises(BadRequestError, match=r"kv_eviction: a prompt of 1000 .* 25, .*; leave kv_eviction out"):
            ask(1000, kv_eviction="none")
        wait_until_idle(server)


def test_a_server_with_wrong_flags_ends_with_one_clear_line(smollm2: Path, tmp_path: Path) -> None:
    server = Server(smollm2, tmp_path / "log", "--kv-eviction", "snapkv", "--kv-budget", "16", "--enforce-eager")
    with pytest.raises(ServerError, match="kv_budget: expected at least 33 tokens"), server:
        pass
