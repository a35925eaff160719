"""Serve SmolLM2-135M with SnapKV eviction, ask it about a long text, and show what vLLM's block pool got back.

Exit status 0 only if tokens were evicted and blocks freed in the first request and none in the second, which switches
eviction off, if both answers are not empty and if the server is still healthy at the end.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI, OpenAIError
from tokenizers import Tokenizer

from tools.build_model import ROOT, SMOLLM2, build_model
from tools.server import Server, ServerError

BUDGET = 256
PROMPT_TOKENS = 4000
ANSWER_TOKENS = 48
# The gauge of used blocks is read when this many parts of the answer have come: three decode steps after the prefill.
PARTS_BEFORE_GAUGE = 4
VALUE_BYTES = 4  # the model is served in float32: faster on CPUs without bfloat16 instructions
FACT_DEPTH = 0.4
# Two digits: with 6 % of the tokens left, SnapKV on a model this small keeps the start of a longer number only.
FACT = "The room number of the archive is 47."
QUESTION = "What is the room number of the archive?"
PEOPLE = ("The gardener", "A young teacher", "The old sailor", "My neighbour", "The baker", "A quiet librarian")
ACTS = ("painted", "repaired", "described", "carried", "measured", "admired", "forgot", "borrowed")
THINGS = ("the wooden bridge", "a small boat", "the garden wall", "an empty basket", "the church bell", "a blue door")
TIMES = ("in the morning", "after the rain", "before winter", "on a windy day", "near the river", "without a word")


@dataclass(frozen=True)
class Run:
    """One request and what it did to the block pool, by the server's own counters."""

    name: str
    answer: str
    prompt_tokens: int
    evicted_tokens: int
    evictions: int
    freed_blocks: int
    blocks_before: int
    blocks_after: int
    saved_bytes: int

    def rows(self) -> dict[str, str]:
        return {
            "eviction": self.name,
            "prompt tokens": f"{self.prompt_tokens:,}",
            "tokens kept": f"{self.prompt_tokens - self.evicted_tokens:,}",
            "blocks before": f"{self.blocks_before}",
            "blocks after": f"{self.blocks_after}",
            "KV bytes saved": f"{self.saved_bytes:,}",
            "answer": self.answer,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, default=SMOLLM2.default_folder, help="model folder (default: %(default)s)"
    )
    parser.add_argument("--budget", type=int, default=BUDGET, help="tokens kept per KV head and layer")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the server ends with us
    try:
        complaints = demo(build_model(SMOLLM2, arguments.model), arguments.budget)
    except (ServerError, OpenAIError, OSError) as error:
        complaints = [str(error)]
    for complaint in complaints:
        print(f"demo failed: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


def demo(model: Path, budget: int) -> list[str]:
    """Run both requests and print the table. Returns what is wrong with the result, nothing if all is well."""
    flags = ("--kv-eviction", "snapkv", "--kv-budget", str(budget))
    limits = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "8192", "--served-model-name", model.name)
    log_path = ROOT / ".cache" / "demo-server.log"
    print(f"$ vllm serve {model.name} {' '.join(flags)}")
    with Server(model, log_path, *flags, *limits, report=_report_waiting) as server:
        print("the server is healthy")
        try:
            evicted = ask(server, model, "snapkv", {})
            whole = ask(server, model, "none", {"kv_eviction": "none"})
        except (OpenAIError, OSError) as error:
            raise ServerError(f"{error!r}; end of {log_path}:\n{server.log_tail()}") from error
        complaints = list(_complaints(evicted, whole, server.is_healthy()))
        if complaints:
            print(server.log_tail(), file=sys.stderr)
    print(f"\n{table(evicted, whole)}")
    return complaints


def ask(server: Server, model: Path, name: str, xargs: dict[str, str]) -> Run:
    """Send the long prompt, stream the answer to the terminal, and compare the server's metrics before and after."""
    client = OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
    before = server.metrics()
    print(f"\neviction {name}> ", end="", flush=True)
    stream = client.chat.completions.create(
        model=model.name,
        messages=[{"role": "user", "content": prompt(model)}],
        temperature=0,
        max_tokens=ANSWER_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"vllm_xargs": xargs} if xargs else None,
    )
    parts: list[str] = []
    usage = 0.0
    prompt_tokens = 0
    for event in stream:
        if event.usage:
            prompt_tokens = event.usage.prompt_tokens
        if event.choices and event.choices[0].delta.content:
            parts.append(event.choices[0].delta.content)
            print(parts[-1], end="", flush=True)
            if len(parts) <= PARTS_BEFORE_GAUGE:
                usage = server.metrics()["vllm:kv_cache_usage_perc"]
    print(flush=True)
    after = server.metrics()
    block_size, num_blocks = _block_pool(server)
    freed_blocks = _growth(before, after, "kvevict:freed_blocks_total")
    return Run(
        name=name,
        answer="".join(parts).strip(),
        prompt_tokens=prompt_tokens,
        evicted_tokens=_growth(before, after, "kvevict:evicted_tokens_total"),
        evictions=_growth(before, after, "kvevict:evictions_total"),
        freed_blocks=freed_blocks,
        blocks_before=-(-prompt_tokens // block_size),
        blocks_after=round(usage * (num_blocks - 1)),  # vLLM counts the null block in no usage
        saved_bytes=freed_blocks * bytes_per_block(model, block_size),
    )


def prompt(model: Path) -> str:
    """About PROMPT_TOKENS tokens of small talk with FACT in it, and QUESTION at the end; the same every time."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    choice = random.Random(0).choice
    sentences: list[str] = []
    used = len(tokenizer.encode(FACT + QUESTION).ids)
    while used < PROMPT_TOKENS:
        sentences.append(f"{choice(PEOPLE)} {choice(ACTS)} {choice(THINGS)} {choice(TIMES)}.")
        used += len(tokenizer.encode(sentences[-1]).ids)
    sentences.insert(int(len(sentences) * FACT_DEPTH), FACT)
    return f"{' '.join(sentences)}\n\n{QUESTION}"


def bytes_per_block(model: Path, block_size: int) -> int:
    """K and V of ``block_size`` tokens, in every layer and KV head."""
    config = json.loads((model / "config.json").read_text())
    num_heads: int = config["num_attention_heads"]
    num_kv_heads: int = config.get("num_key_value_heads", num_heads)
    head_size: int = config.get("head_dim") or config["hidden_size"] // num_heads
    num_layers: int = config["num_hidden_layers"]
    return 2 * num_layers * num_kv_heads * head_size * VALUE_BYTES * block_size


def table(*runs: Run) -> str:
    columns = [run.rows() for run in runs]
    widths = [max(map(len, column.values())) for column in columns]
    lines = []
    for name in columns[0]:
        cells = [column[name].ljust(width) for column, width in zip(columns, widths, strict=True)]
        lines.append(f"{name:<15} {'   '.join(cells)}".rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def _complaints(evicted: Run, whole: Run, healthy: bool) -> Iterator[str]:
    if not evicted.evictions or not evicted.evicted_tokens or not evicted.freed_blocks:
        yield "nothing was evicted, or no block was freed: the kvevict: counters on /metrics did not grow"
    if evicted.blocks_after >= evicted.blocks_before:
        yield f"vLLM's pool got nothing back: {evicted.blocks_after} blocks in use, {evicted.blocks_before} by prompt"
    if whole.evictions:
        yield "the request that switched eviction off was evicted all the same"
    for run in (evicted, whole):
        if not run.answer:
            yield f"the answer with eviction {run.name} is empty"
    if not healthy:
        yield "the server is no longer healthy"


def _growth(before: dict[str, float], after: dict[str, float], name: str) -> int:
    return round(after.get(name, 0.0) - before.get(name, 0.0))


def _block_pool(server: Server) -> tuple[int, int]:
    """Tokens per block and blocks in the pool, as vLLM reports them."""
    labels = next(sample.labels for sample in server.samples() if sample.name == "vllm:cache_config_info")
    return int(labels["block_size"]), int(labels["num_gpu_blocks"])


def _report_waiting(seconds: float) -> None:
    print(f"waiting for the server: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
