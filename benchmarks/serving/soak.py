"""A real server under random load: all policies and allocators, aborts, wrong requests, little memory. Nothing leaks.

python -m benchmarks.serving.soak --minutes 20
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from openai import AsyncOpenAI, BadRequestError

from benchmarks.serving.engine import BLOCK_SIZE, MODEL
from benchmarks.timing import write_row
from tools.server import Server
from vllm_kvevict.budgets import ALLOCATORS
from vllm_kvevict.policies import POLICIES

LENGTHS = (100, 7_000)
BUDGETS = (256, 512, 1024, 0.1, 0.25, 0.5)
WRONG = (
    {"kv_eviction": "snapkvv"},
    {"kv_budget": -1},
    {"kv_budget": 1.5},
    {"kv_budget_allocator": "fair"},
    {"kv_budget": 8},
)
PROMPTS_SHARED = 6  # texts that prompts begin with, so that they share prefixes
# oneDNN keeps a primitive of some 300 KiB per number of tokens in a step, up to 1,024 of them, and malloc keeps what
# such blocks leave behind. Plain `torch.nn.functional.linear` in bfloat16 with random numbers of rows grows by 650 MiB
# in this way, and by none with these settings; with them the memory seen is that of the engine and of the plugin.
BOUNDED_CACHES = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}


@dataclass
class Soak:
    """What became of all requests, and what the server held.

    outcomes:     "answered", "aborted", "refused" and, if there are any, errors by their type
    resident:     bytes of each of the server's processes, sampled after the warm-up
    prompt_tokens: sum over the requests that were answered
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    resident: list[dict[str, int]] = field(default_factory=list)
    prompt_tokens: int = 0

    @property
    def errors(self) -> int:
        return sum(self.outcomes.values()) - sum(self.outcomes[name] for name in ("answered", "aborted", "refused"))

    @property
    def growth(self) -> float:
        """Resident memory at the end over that after the warm-up, less one; medians of a fifth of the samples."""
        totals = [sum(fifth.values()) for fifth in self.by_fifths()]
        return totals[-1] / totals[0] - 1

    def by_fifths(self) -> list[dict[str, float]]:
        """Resident bytes of each process, medians over each fifth of the time."""
        size = max(len(self.resident) // 5, 1)
        fifths = [self.resident[start : start + size] for start in range(0, len(self.resident), size)][:5]
        return [{name: median(sample.get(name, 0) for sample in samples) for name in samples[-1]} for samples in fifths]


def random_prompt(rng: random.Random, lengths: tuple[int, int]) -> list[int]:
    """Token ids: the beginning of one of a few texts, and an end of its own."""
    length = rng.randint(*lengths)
    shared = random.Random(rng.randrange(PROMPTS_SHARED))
    text = [shared.randrange(100, 40_000) for _ in range(rng.randint(0, length))]
    return text + [rng.randrange(100, 40_000) for _ in range(length - len(text))]


def random_options(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.1:
        return {"kv_eviction": "none"}
    allocators = [name for name in ALLOCATORS.names() if name != "fixed"]  # it wants a file
    return {
        "kv_eviction": rng.choice(POLICIES.names()),
        "kv_budget": rng.choice(BUDGETS),
        "kv_budget_allocator": rng.choice(allocators),
    }


async def one_request(client: AsyncOpenAI, rng: random.Random, lengths: tuple[int, int], soak: Soak) -> None:
    kind = rng.choices(("answered", "aborted", "refused"), (0.9, 0.05, 0.05))[0]
    prompt = random_prompt(rng, lengths)
    options = rng.choice(WRONG) if kind == "refused" else random_options(rng)
    max_tokens = rng.randint(1, 100)
    try:
        stream = await client.completions.create(
            model="model",
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0.0,
            stream=True,
            extra_body={"ignore_eos": True, "vllm_xargs": options},
        )
        stop_after = rng.randrange(max_tokens) if kind == "aborted" else None
        chunks = 0
        async for _ in stream:
            if chunks == stop_after:
                await stream.close()
                break
            chunks += 1
    except BadRequestError as error:
        soak.outcomes["refused" if kind == "refused" else repr(error)] += 1
        return
    except Exception as error:  # whatever it is, it is counted, and the load goes on
        soak.outcomes[type(error).__name__] += 1
        return
    soak.outcomes["wrong request answered" if kind == "refused" else kind] += 1
    soak.prompt_tokens += len(prompt) * (kind == "answered")


async def load(
    server: Server, seconds: float, clients: int, seed: int, lengths: tuple[int, int], num_answers: int
) -> Soak:
    """Keep ``clients`` requests under way for ``seconds`` and ``num_answers``, then wait for the last of them."""
    soak, end = Soak(), time.monotonic() + seconds
    client = AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=600)

    async def one_client(index: int) -> None:
        rng = random.Random(seed * 1000 + index)
        while time.monotonic() < end or (soak.outcomes["answered"] < num_answers and not soak.errors):
            await one_request(client, rng, lengths, soak)

    async def watch() -> None:
        await asyncio.sleep(seconds / 5)  # until every policy has run once, more or less
        while True:
            soak.resident.append(resident_by_process(server))
            await asyncio.sleep(max(seconds / 200, 0.5))

    watching = asyncio.create_task(watch())
    await asyncio.gather(*map(one_client, range(clients)))
    watching.cancel()
    return soak


def resident_by_process(server: Server) -> dict[str, int]:
    """Process name -> bytes that it alone holds, and its share of what several hold."""
    if server.process is None:
        raise RuntimeError("the server is not running")
    parent = psutil.Process(server.process.pid)
    return {
        f"{process.name()} {process.pid}": process.memory_full_info().pss
        for process in (parent, *parent.children(recursive=True))
    }


def wait_until_idle(server: Server, seconds: float = 60.0) -> dict[str, float]:
    """Return the metrics once no request runs and every block is back; after ``seconds`` as they are then."""
    end = time.monotonic() + seconds
    while True:
        metrics = server.metrics()
        is_idle = not (metrics["vllm:num_requests_running"] or metrics["vllm:kv_cache_usage_perc"])
        if (is_idle and not metrics["kvevict:kept_pages"]) or time.monotonic() > end:
            return metrics
        time.sleep(0.5)


def run(
    model: Path,
    seconds: float,
    clients: int,
    seed: int,
    log: Path,
    lengths: tuple[int, int] = LENGTHS,
    num_answers: int = 0,
    dtype: str = "auto",
) -> tuple[Soak, dict[str, float]]:
    """Start a server, put it under load, and return what happened and its metrics when it is idle again.

    lengths:     of the shortest and the longest prompt; the memory is that of about three of the longest
    num_answers: the load goes on until there are as many, however slow the machine is
    dtype:       of the model
    """
    flags = [
        "--kv-eviction",
        "snapkv",
        "--kv-budget",
        "512",
        "--max-model-len",
        str(lengths[1] + 200),
        "--max-num-seqs",
        "16",
        "--kv-evict-max-num-seqs",  # requests choose any policy
        "16",
    ]
    memory = ["--num-gpu-blocks-override", str(3 * lengths[1] // BLOCK_SIZE + 1), "--enforce-eager", "--dtype", dtype]
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "TRITON_INTERPRET": "0", **BOUNDED_CACHES}
    with Server(model, log, *flags, *memory, "--served-model-name", "model", env=env) as server:
        soak = asyncio.run(load(server, seconds, clients, seed, lengths, num_answers))
        return soak, wait_until_idle(server)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=8, help="requests under way at any time")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    with TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        soak, metrics = run(arguments.model, 60 * arguments.minutes, arguments.clients, arguments.seed, log)
    row = {
        "minutes": arguments.minutes,
        "clients": arguments.clients,
        "seed": arguments.seed,
        **{name: soak.outcomes[name] for name in ("answered", "aborted", "refused")},
        "errors": soak.errors,
        "prompt_tokens": soak.prompt_tokens,
        "evictions": int(metrics["kvevict:evictions_total"]),
        "preemptions": int(metrics["vllm:num_preemptions_total"]),
        "memory_growth": round(soak.growth, 4),
        "blocks_in_use": metrics["vllm:kv_cache_usage_perc"],
        "kept_pages": int(metrics["kvevict:kept_pages"]),
    }
    for name, value in row.items():
        print(f"{name:>15} {value}")
    for fifth in soak.by_fifths():
        print("   resident MiB ", {name: round(size / 2**20) for name, size in fifth.items()})
    if soak.errors:
        print(soak.outcomes)
    write_row("soak", row)
    is_clean = not (soak.errors or row["blocks_in_use"] or row["kept_pages"]) and soak.growth < 0.02
    return 0 if is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
