"""What the serving benchmark asks: prompts of exact lengths with something to find in them, the same for every arm.

The prompts are text, which is what vLLM's benchmark client sends; the text has exactly the tokens that are stated.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from vllm_kvevict.engine.offline.tasks import NOISE, Example, make_example

BLOCK_SIZE = 32
TASKS = ("needle_noise", "passkey")  # those that SmolLM2-135M answers at these lengths when it has the full KV
PADDING = "".join(NOISE)
MOST_QUESTIONS = 32  # on a document, each on a thing of its own, of which the task has 38
LEAST = {"requests": 2, "prompt": 160, "output": 16}  # whatever the scale


@dataclass(frozen=True)
class Request:
    """A prompt of ``prompt_tokens``, how many tokens to answer with, and the text that a right answer begins with."""

    prompt: str
    prompt_tokens: int
    output_tokens: int
    answer: str


@dataclass(frozen=True)
class Workload:
    """Requests in the order in which they are sent.

    rate:   requests per second, as a Poisson process; infinite: all at once
    memory: KV memory in tokens, or None for as much as all requests take
    """

    name: str
    requests: list[Request]
    rate: float = float("inf")
    memory: int | None = None

    @property
    def num_blocks(self) -> int:
        """Return the KV blocks of the server, the null block among them."""
        lengths = [request.prompt_tokens + request.output_tokens for request in self.requests]
        tokens = [self.memory] if self.memory else lengths
        return sum(-(-length // BLOCK_SIZE) for length in tokens) + 1

    @property
    def max_model_len(self) -> int:
        return max(request.prompt_tokens + request.output_tokens for request in self.requests)

    def write(self, path: Path) -> None:
        """Write the requests as the "custom" data set of ``vllm bench serve``."""
        rows = [{"prompt": request.prompt, "output_tokens": request.output_tokens} for request in self.requests]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def decode(model: Path, scale: float, round_: int) -> Workload:
    """Long prompts and long answers, all at once, in ample memory: the time of a step."""
    return Workload("decode", _questions(model, scale, round_, 16, (7_500, 7_500), (256, 256)))


def memory(model: Path, scale: float, round_: int) -> Workload:
    """More requests than the KV memory holds: how many run at once, and what that gives."""
    requests = _questions(model, scale, round_, 32, (2_000, 6_000), (128, 512))
    tokens = max(round(16_000 * scale), 2 * max(request.prompt_tokens + request.output_tokens for request in requests))
    return Workload("memory", requests, rate=0.5 / scale, memory=tokens)


def short(model: Path, scale: float, round_: int) -> Workload:
    """Prompts that fit any budget, in ample memory: what the plugin costs where it does nothing."""
    return Workload("short", _questions(model, scale, round_, 32, (300, 300), (128, 128)))


def document(model: Path, scale: float, round_: int) -> Workload:
    """One document and many questions on it: the shared prefix."""
    num_questions, output = min(_scaled("requests", 24, scale), MOST_QUESTIONS), _scaled("output", 64, scale)
    length = max(_scaled("prompt", 6_000, scale), LEAST["prompt"] * num_questions)
    head, sections = _sections(model, num_questions, length // num_questions, round_)
    text = head + [token for section in sections for token in section.context]
    requests = [
        _request(model, Example(text, section.question, section.answer), length + len(section.question), output)
        for section in sections
    ]
    return Workload("document", requests, rate=1 / scale, memory=max(round(32_000 * scale), 4 * length))


WORKLOADS: dict[str, Callable[[Path, float, int], Workload]] = {
    "decode": decode,
    "memory": memory,
    "short": short,
    "document": document,
}


def text_tokens(model: Path, text: str) -> list[int]:
    tokens: list[int] = _tokenizer(model)(text, add_special_tokens=False)["input_ids"]
    return tokens


def _questions(
    model: Path, scale: float, round_: int, num: int, prompt: tuple[int, int], output: tuple[int, int]
) -> list[Request]:
    """Return requests of lengths between two bounds, which no other round has."""
    rng = random.Random(f"{num} {prompt} {round_}")
    num = _scaled("requests", num, scale)
    requests = []
    for index in range(num):
        length = _scaled("prompt", rng.randint(*prompt), scale)
        example = make_example(model, TASKS[index % len(TASKS)], length, round_ * num + index)
        requests.append(_request(model, example, length, _scaled("output", rng.randint(*output), scale)))
    return requests


def _sections(model: Path, num: int, length: int, round_: int) -> tuple[list[int], list[Example]]:
    """Return what a prompt begins with, and sections of at most ``length`` tokens, each with its own question."""
    sections: dict[tuple[int, ...], Example] = {}
    for index in count(1_000 * round_):
        section = make_example(model, TASKS[0], length, index)
        sections.setdefault(tuple(section.question), section)
        if len(sections) == num:
            break
    found = list(sections.values())
    # the chat template is all that noise and a list of keys have in common
    pairs = zip(found[0].context, make_example(model, "key_value", length, 0).context, strict=False)
    head = [ours for ours, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    room = length - len(head)
    return head, [Example(_padded(model, s.context[len(head) :], room), s.question, s.answer) for s in found]


def _request(model: Path, example: Example, num_tokens: int, output_tokens: int) -> Request:
    """Return the example with as much padding before its question as makes ``num_tokens``."""
    tokens = _padded(model, example.context, num_tokens - len(example.question)) + example.question
    prompt: str = _tokenizer(model).decode(tokens)
    if len(tokens) != num_tokens or _tokenizer(model)(prompt)["input_ids"] != tokens:
        raise ValueError(f"the prompt is not one of {num_tokens} tokens once it is text")
    return Request(prompt, num_tokens, output_tokens, _tokenizer(model).decode(example.answer))


def _padded(model: Path, tokens: list[int], num_tokens: int) -> list[int]:
    padding = text_tokens(model, PADDING) * num_tokens
    return tokens + padding[: max(num_tokens - len(tokens), 0)]


def _scaled(what: str, size: int, scale: float) -> int:
    return max(round(size * scale), LEAST[what])


@cache
def _tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)
