"""Serving measured by vLLM's own client: stock vLLM, the plugin with eviction off, and with a budget, in turn.

Every round serves each workload once by each arm, with prompts of its own and a server of its own, one at a time.
Prefix caching and all of vLLM's defaults are on in all arms. A ratio is that to stock vLLM in the same round; medians
over the rounds. ``exact`` is the share of right answers, ``same_as_stock`` that of the tokens of the answers' text
that are those of stock vLLM's greedy answer at the same place.

python -m benchmarks.serving.bench_workloads
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import numpy
from openai import OpenAI

from benchmarks.serving.workloads import BLOCK_SIZE, WORKLOADS, Workload, text_tokens
from benchmarks.timing import write_row
from tools.build_model import SMOLLM2
from tools.server import Server, cpu_environment
from vllm_kvevict.commands.arguments import positive

STOCK = "stock vLLM"
ARMS = (STOCK, "eviction off", "budget")
POLL_SECONDS = 0.2
WARM_UP_TOKENS = 8  # of an answer that nobody measures
RATIOS = ("ttft_ms", "itl_ms", "itl_p95_ms", "tokens_per_second", "most_running", "blocks_max", "blocks_mean")


@dataclass
class Served:
    """What one arm did with one workload: measures by their names in the table, and the answers' texts."""

    measures: dict[str, float]
    texts: list[str]


@dataclass
class Polled:
    """Gauges of a server while requests were under way: requests running, and the share of the KV blocks in use."""

    running: list[float] = field(default_factory=list)
    usage: list[float] = field(default_factory=list)

    def poll(self, server: Server) -> None:
        metrics = server.metrics()
        if metrics["vllm:num_requests_running"]:  # else the client has not begun yet, or has ended
            self.running.append(metrics["vllm:num_requests_running"])
            self.usage.append(metrics["vllm:kv_cache_usage_perc"])


def server_flags(arm: str, workload: Workload, policy: str, budget: int, dtype: str) -> list[str]:
    """Return the arguments of ``vllm serve``: the same for all arms, but those that turn eviction on."""
    flags = {
        "--dtype": dtype,
        "--block-size": BLOCK_SIZE,
        "--max-model-len": workload.max_model_len,
        "--num-gpu-blocks-override": workload.num_blocks,
    }
    if arm == "budget":
        flags |= {"--kv-eviction": policy, "--kv-budget": budget}
    return [str(part) for flag in flags.items() for part in flag] + ["--enforce-eager"]


def client_command(model: Path, base_url: str, workload: Workload, folder: Path, seed: int) -> list[str]:
    """Return the command of vLLM's benchmark client, which draws the times of arrival from ``seed``."""
    options = {
        "--backend": "openai",
        "--base-url": base_url,
        "--endpoint": "/v1/completions",
        "--model": model,
        "--dataset-name": "custom",
        "--dataset-path": folder / "requests.jsonl",
        "--custom-output-len": -1,  # those of the file
        "--num-prompts": len(workload.requests),
        "--request-rate": workload.rate,
        "--seed": seed,
        "--temperature": 0,
        "--ready-check-timeout-sec": 0,  # its check would leave the first prompt in the prefix cache
        "--result-dir": folder,
        "--result-filename": "result.json",
    }
    switches = ["--skip-chat-template", "--disable-shuffle", "--ignore-eos", "--save-result", "--save-detailed"]
    vllm = str(Path(sys.executable).with_name("vllm"))
    return [vllm, "bench", "serve", *(str(part) for option in options.items() for part in option), *switches]


def serve(arm: str, workload: Workload, round_: int, arguments: argparse.Namespace) -> Served:
    """Put up the arm's server, send it the workload, and return what was measured."""
    # an empty VLLM_PLUGINS keeps vLLM from loading any plugin
    env = {"VLLM_PLUGINS": "" if arm == STOCK else "kvevict"}
    flags = server_flags(arm, workload, arguments.policy, arguments.budget, arguments.dtype)
    with TemporaryDirectory() as name:
        folder = Path(name)
        workload.write(folder / "requests.jsonl")
        with Server(arguments.model, folder / "server.log", *flags, env=env) as server:
            warm_up(server, workload)
            before, polled = server.metrics(), Polled()
            command = client_command(arguments.model, server.base_url, workload, folder, seed=round_)
            run_client(command, folder / "client.log", server, polled)
            after = server.metrics()
        result = json.loads((folder / "result.json").read_text())
    check(workload, result)
    counters = {
        "preemptions": change(before, after, "vllm:num_preemptions_total"),
        "evictions": change(before, after, "kvevict:evictions_total"),
    }
    return Served(measures(workload, result, polled) | counters, result["generated_texts"])


def warm_up(server: Server, workload: Workload) -> None:
    """Answer one prompt as long as the longest that shares no block with those of the workload."""
    length = max(request.prompt_tokens for request in workload.requests) - WARM_UP_TOKENS
    prompt = [1_000 + place % 10_000 for place in range(length)]
    client = OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=600)
    client.completions.create(
        model=server.model, prompt=prompt, max_tokens=WARM_UP_TOKENS, temperature=0.0, extra_body={"ignore_eos": True}
    )


def run_client(command: list[str], log: Path, server: Server, polled: Polled) -> None:
    """Run vLLM's benchmark client and poll the server meanwhile."""
    env = {**cpu_environment(), **os.environ, "VLLM_PLUGINS": ""}
    with log.open("wb") as output, subprocess.Popen(command, env=env, stdout=output, stderr=output) as client:
        try:
            while client.poll() is None:
                polled.poll(server)
                time.sleep(POLL_SECONDS)
        except BaseException:
            client.kill()
            raise
    if client.returncode:
        raise RuntimeError(f"the client failed; end of its log:\n{log.read_text(errors='replace')[-2_000:]}")


def check(workload: Workload, result: Mapping[str, Any]) -> None:
    """Raise RuntimeError unless every request had the tokens that the workload says, and was answered in full."""
    if any(result["errors"]):
        raise RuntimeError(f"requests failed: {next(filter(None, result['errors']))}")
    for name, stated in (("input_lens", "prompt_tokens"), ("output_lens", "output_tokens")):
        expected = [getattr(request, stated) for request in workload.requests]
        if result[name] != expected:
            raise RuntimeError(f"{stated} are {result[name]}, the workload has {expected}")


def measures(workload: Workload, result: Mapping[str, Any], polled: Polled) -> dict[str, float]:
    """Return the measures of one run, from the client's result and what was polled."""
    gaps = [seconds for request in result["itls"] for seconds in request]
    blocks = [share * (workload.num_blocks - 1) for share in polled.usage]  # the null block is in nobody's use
    pairs = zip(result["generated_texts"], workload.requests, strict=True)
    return {
        "ttft_ms": median(result["ttfts"]) * 1e3,
        "itl_ms": median(gaps) * 1e3,
        "itl_p95_ms": float(numpy.percentile(gaps, 95)) * 1e3,
        "tokens_per_second": result["output_throughput"],
        "most_running": max(polled.running, default=0),
        "blocks_max": max(blocks, default=0),
        "blocks_mean": mean(blocks or [0]),
        "exact": sum(text.startswith(request.answer) for text, request in pairs) / len(workload.requests),
    }


def change(before: Mapping[str, float], after: Mapping[str, float], name: str) -> float:
    return after.get(name, 0) - before.get(name, 0)


def agreement(texts: Sequence[str], stock: Sequence[str], model: Path) -> float:
    """Return the share of the tokens of ``texts`` that stock vLLM's have at the same place."""
    same = total = 0
    for text, reference in zip(texts, stock, strict=True):
        ours, theirs = text_tokens(model, text), text_tokens(model, reference)
        same += sum(our == their for our, their in zip(ours, theirs, strict=False))
        total += max(len(ours), len(theirs))
    return same / total


def summary(rounds: Sequence[Mapping[str, float]], stock: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the medians over the rounds, and those of the ratios to stock vLLM in the same round."""
    medians = {name: median(one[name] for one in rounds) for name in rounds[0]}
    for name in RATIOS:
        # the machine's speed wanders from round to round
        ratios = [one[name] / of[name] if of[name] else float("nan") for one, of in zip(rounds, stock, strict=True)]
        medians[f"{name}_ratio"] = median(ratios)
    return {name: round(value, 4) for name, value in medians.items()}


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Return the arms' summaries as text: a line for each measure, a column for each arm, ratios in brackets."""
    lines = [" " * 18 + "".join(f"{arm:>22}" for arm in rows)]
    for name in next(iter(rows.values())):
        if not name.endswith("_ratio"):
            ratios = [f" ({row[f'{name}_ratio']:.2f}x)" if name in RATIOS else "" for row in rows.values()]
            cells = [f"{row[name]:.4g}{ratio}" for row, ratio in zip(rows.values(), ratios, strict=True)]
            lines.append(f"{name:18}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def run_round(name: str, round_: int, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Serve a workload by each arm, and return their measures."""
    workload = WORKLOADS[name](arguments.model, arguments.scale, round_)
    first = round_ % len(ARMS)
    served = {}
    for arm in ARMS[first:] + ARMS[:first]:
        start = time.monotonic()
        served[arm] = serve(arm, workload, round_, arguments)
        print(f"round {round_} of {name}, {arm}: {time.monotonic() - start:.0f} s", flush=True)
    stock = served[STOCK].texts
    return {
        arm: served[arm].measures | {"same_as_stock": agreement(served[arm].texts, stock, arguments.model)}
        for arm in ARMS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SMOLLM2.default_folder)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the numbers of prompts and the lengths")
    parser.add_argument("--policy", default="snapkv")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    rounds: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in arguments.workloads}
    for round_ in range(arguments.rounds):
        for name, of_workload in rounds.items():
            of_workload.append(run_round(name, round_, arguments))
    settings = {key: value for key, value in vars(arguments).items() if key not in ("model", "workloads")}
    for name, of_workload in rounds.items():
        stock = [measured[STOCK] for measured in of_workload]
        rows = {arm: summary([measured[arm] for measured in of_workload], stock) for arm in ARMS}
        print(f"\n{name}: {WORKLOADS[name].__doc__}\n{table(rows)}")
        for arm, row in rows.items():
            write_row("workloads", {"workload": name, "arm": arm, **settings, **row})


if __name__ == "__main__":
    main()
