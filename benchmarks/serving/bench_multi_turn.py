"""What the private kept blocks of evicted prompts cost a chat: tokens computed again, and the time to the first token.

Chats of several turns, each prompt the whole chat so far. All arms run in one engine, chat by chat and turn by turn;
each has texts of its own, so that none hits what another has cached. "none" is stock vLLM's path with its prefix cache.

python -m benchmarks.serving.bench_multi_turn
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from vllm import LLM, SamplingParams

from benchmarks.serving.engine import MODEL, engine, random_prompt
from benchmarks.timing import write_row
from vllm_kvevict.commands.arguments import positive

ARMS: dict[str, dict[str, Any]] = {
    "none": {"kv_eviction": "none"},
    "512": {"kv_budget": 512},
    "0.25": {"kv_budget": 0.25},
    "0.5": {"kv_budget": 0.5},
}


@dataclass
class Turns:
    """Of every turn but the first of a chat: seconds to the first token, tokens of the prompt, and those computed."""

    seconds: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    computed_tokens: list[int] = field(default_factory=list)


@dataclass
class Chat:
    """One chat of one arm, and the text so far."""

    arm: str
    tokens: list[int]


def answer(llm: LLM, chat: Chat, max_tokens: int, request_id: str) -> tuple[float, int, list[int]]:
    """Return the seconds to the first token, the tokens that the prefix cache had, and the answer."""
    params = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, extra_args=ARMS[chat.arm]
    )
    start, first, last = time.perf_counter(), None, None
    llm.llm_engine.add_request(request_id, {"prompt_token_ids": chat.tokens}, params)
    while llm.llm_engine.has_unfinished_requests():
        outputs = llm.llm_engine.step()
        if outputs:
            first, last = first or time.perf_counter(), outputs[0]
    if first is None or last is None:
        raise RuntimeError(f"{request_id} was not answered")
    return first - start, last.num_cached_tokens or 0, list(last.outputs[0].token_ids)


def run(llm: LLM, arguments: argparse.Namespace) -> dict[str, Turns]:
    """Hold all chats; the arms take turns."""
    results = {arm: Turns() for arm in ARMS}
    for index in range(arguments.chats):
        chats = [
            Chat(arm, random_prompt(arguments.system, seed=1000 * index + number)) for number, arm in enumerate(ARMS)
        ]
        for turn in range(arguments.turns):
            for chat in chats:
                chat.tokens = chat.tokens + random_prompt(arguments.user, seed=100_000 * turn + index)
                request_id = f"{index}-{turn}-{chat.arm}"
                seconds, cached, tokens = answer(llm, chat, arguments.output, request_id)
                if turn:
                    turns = results[chat.arm]
                    turns.seconds.append(seconds)
                    turns.prompt_tokens.append(len(chat.tokens))
                    turns.computed_tokens.append(len(chat.tokens) - cached)
                chat.tokens = chat.tokens + tokens
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--chats", type=positive, default=3)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--system", type=int, default=2_000, help="tokens that a chat begins with")
    parser.add_argument("--user", type=int, default=300, help="tokens that a user adds in a turn")
    parser.add_argument("--output", type=int, default=64, help="tokens of an answer")
    arguments = parser.parse_args()
    if arguments.turns < 2:
        parser.error(f"--turns: expected at least 2, since the first is not measured, got {arguments.turns}")
    with engine(arguments.model, 512, kv_cache_memory_bytes=2 << 30) as llm:
        results = run(llm, arguments)
    stock = median(results["none"].seconds)
    print(f"{'budget':>7} {'first token':>12} {'ratio':>6} {'computed tokens':>16} {'of a prompt of':>15}")
    for arm, turns in results.items():
        row = {
            "budget": arm,
            "seconds_to_first_token": round(median(turns.seconds), 4),
            "ratio": round(median(turns.seconds) / stock, 3),
            "computed_tokens": median(turns.computed_tokens),
            "prompt_tokens": median(turns.prompt_tokens),
        }
        print("{:>7} {:10.3f} s {:6.2f} {:16.0f} {:15.0f}".format(*row.values()))
        settings = {key: value for key, value in vars(arguments).items() if key != "model"}
        write_row("multi_turn", {**settings, **row})


if __name__ == "__main__":
    main()
