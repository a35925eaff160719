"""One family through the real engine, in a process of its own: ``python -m tools.matrix.trial NAME FILE``.

It writes one JSON object of answers to FILE, again after every question: what a process that dies has found is there.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.models import registry

from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt
from tools.matrix.families import SETTINGS, VOCAB_SIZE, Family, family_named
from tools.matrix.oracle import Oracle
from tools.matrix.rows import OK, POLICIES
from vllm_kvevict.eviction.record import recorded_evictions

LENGTHS, LENGTH, BUDGET, NUM_STEPS = (60, 300), 400, 128, 32
TOLERANCE, LEAST_EFFECT = 1e-3, 5e-2  # of logits
_CHUNK = 256
_MISSING = "which this model does not show: "


class Trial:
    """Asks the questions of one row in order. Those behind one that everything rests on stay empty if it fails."""

    def __init__(self, family: Family, tell: Callable[[dict[str, str]], None]) -> None:
        self.family = family
        self.row: dict[str, str] = {}
        self._tell = tell

    def ask(self, name: str, question: Callable[[], None]) -> bool:
        """Note "ok", or in one line why not; return whether it is "ok"."""
        try:
            question()
        except Exception as error:  # of vLLM, of transformers, or of ours
            traceback.print_exc()
            self.say(name, _in_a_line(error))
            return False
        self.say(name, OK)
        return True

    def say(self, name: str, text: str) -> None:
        self.row[name] = text
        self._tell(self.row)

    def run(self, folder: Path) -> None:
        self._oracle = Oracle(folder)
        if not self.ask("built", lambda: self.family.build(folder)):
            return
        stock: list[list[int]] = []

        def answers() -> None:
            with engine(folder, policy=None, **self._settings) as running:
                self.say("vllm_class", type(running.worker.model_runner.model).__name__)
                stock.extend(running.tokens(_prompts(), max_tokens=NUM_STEPS))

        if not self.ask("stock", answers):
            return
        self.ask("starts", lambda: self._evict(folder, stock))

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            "max_num_batched_tokens": _CHUNK,
            "enable_prefix_caching": False,
            "logprobs_mode": "raw_logits",
            "max_logprobs": -1,
            "hf_overrides": {**self.family.overrides},
            **SETTINGS,
        }

    def _evict(self, folder: Path, stock: list[list[int]]) -> None:
        with engine(folder, "snapkv", BUDGET, {"allocator": "adakv"}, **self._settings) as running:
            self.say("starts", OK)
            self.ask("as_stock", lambda: _check_as_stock(running, stock))
            self.ask("oracle", lambda: self._check_oracle(running))
            for policy in POLICIES:
                self.ask(policy, lambda policy=policy: _check_evicts(running, policy))  # type: ignore[misc]
            self.ask("blocks", running.check_all_free)

    def _check_oracle(self, running: Engine) -> None:
        prompt = random_prompt(LENGTH, seed=1)
        with recorded_evictions() as records:
            (output,) = running.generate([prompt], max_tokens=NUM_STEPS, logprobs=-1)
        (completion,), (record,) = output.outputs, records
        tokens = [*prompt, *completion.token_ids[:-1]]
        logits = torch.tensor([[step[token].logprob for token in range(VOCAB_SIZE)] for step in completion.logprobs])
        whole = self._oracle.logits(tokens)[LENGTH - 1 :]
        if not (worst := float((logits[0] - whole[0]).abs().max())) <= TOLERANCE:
            raise AssertionError(f"before anything is evicted, logits differ from transformers' by {worst:.2g}")
        effect = float((logits[1:] - whole[1:]).abs().max())
        self.say("effect", f"{effect:.2g}")
        expected = self._oracle.logits(tokens, record.kept)[LENGTH - 1 :]
        worst = float((logits - expected).abs().max())
        self.say("difference", f"{worst:.1e}")
        if not worst <= TOLERANCE:
            raise AssertionError(f"evicted, logits differ from transformers' over the kept tokens by {worst:.2g}")
        if not effect >= LEAST_EFFECT:
            raise AssertionError(f"eviction changes logits by no more than {effect:.2g}")


def _prompts() -> list[list[int]]:
    return [random_prompt(length, seed=length) for length in LENGTHS]


def _check_as_stock(running: Engine, stock: list[list[int]]) -> None:
    found = running.tokens(_prompts(), max_tokens=NUM_STEPS, extra_args={"kv_budget": max(LENGTHS) + NUM_STEPS})
    if found != stock:
        raise AssertionError("nothing evicted, answers differ from stock vLLM's")


def _check_evicts(running: Engine, policy: str) -> None:
    num_evictions = running.num_evictions
    (output,) = running.generate([random_prompt(LENGTH, seed=2)], max_tokens=4, extra_args={"kv_eviction": policy})
    if running.num_evictions != num_evictions + 1 or len(output.outputs[0].token_ids) != 4:
        raise AssertionError(f"it has not evicted, or not answered: {output.outputs[0]}")


def _in_a_line(error: Exception) -> str:
    while (cause := error.__cause__) is not None and isinstance(cause, Exception):
        error = cause
    text = " ".join(str(error).split()) or str(traceback.extract_tb(error.__traceback__)[-1].line)
    return text.partition(_MISSING)[2] or f"{type(error).__name__}: {text}"[:400]


@contextmanager
def _written(file: Path) -> Iterator[Callable[[dict[str, str]], None]]:
    start = time.perf_counter()
    versions = ", ".join(f"{package} {version(package)}" for package in ("vllm", "transformers", "torch"))

    def tell(row: dict[str, str]) -> None:
        seconds = f"{time.perf_counter() - start:.0f}"
        file.write_text(json.dumps(row | {"seconds": seconds, "versions": versions}))

    yield tell


def main(name: str, file: Path) -> None:
    """Try the family of that name."""
    registry._run_in_subprocess = lambda question: question()  # it would import vLLM once more for each model
    family = family_named(name)
    with tempfile.TemporaryDirectory() as folder, _written(file) as tell:
        Trial(family, tell).run(Path(folder))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
