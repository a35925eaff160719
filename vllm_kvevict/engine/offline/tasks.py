"""Prompts of an exact length with something to find in them, for SmolLM2-135M-Instruct.

Every answer begins with a blank (or a comma), a token of its own: the first token after a prompt always comes from its
full KV, so it must not be one that tells policies apart. The answer is begun for the model ("The code of the lamp is"),
which makes a small model answer at all.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

NOUNS = (
    "lamp anchor violin kettle ladder mirror saddle candle basket hammer pillow barrel compass lantern curtain blanket",
    "bucket carpet drawer feather goblet harness helmet jacket kitchen locket marble needle organ paddle quilt ribbon",
    "saucer tablet umbrella vase wagon whistle zipper button",
)
NOISE = (
    " The lamp is on.",
    " The door is shut.",
    " The road is long.",
    " Nothing happens here.",
    " It is quiet again.",
)
WHO = "the baker,a young sailor,my neighbour,the old teacher,a tired clerk,the gardener,her cousin,a travelling painter"
DID = "walked past,remembered,painted,talked about,looked for,wrote a letter about,dreamed of,drew a map of"
WHAT = "the stone bridge,a small harbour,the empty theatre,a field of barley,the railway station,the northern road"
WHEN = (
    "before sunrise,in the middle of winter,on market day,after the long rain,during the festival,late in the evening"
)


@dataclass(frozen=True)
class Example:
    """One prompt and what a model that read it would say.

    context:  token ids of the text up to the question
    question: token ids from the question to the beginning of the answer
    answer:   token ids, the first of which is not graded
    """

    context: list[int]
    question: list[int]
    answer: list[int]

    @property
    def prompt(self) -> list[int]:
        return self.context + self.question


@dataclass(frozen=True)
class Text:
    """A task before it has a length.

    facts:    pieces of text that must be in the context, spread over it evenly from ``depth`` (0 to 1) on
    filler:   makes the rest of the context, one piece at a time
    question: and the beginning of the answer
    """

    facts: list[str]
    depth: float
    filler: Callable[[], str]
    question: str
    begin: str
    answer: str


def needle_noise(rng: random.Random, depth: float) -> Text:
    """One code among five sentences that repeat."""
    return _single(rng, depth, lambda: rng.choice(NOISE))


def needle_prose(rng: random.Random, depth: float) -> Text:
    """One code in text that does not repeat."""
    return _single(rng, depth, lambda: _prose(rng))


def multikey(rng: random.Random, depth: float) -> Text:
    """Six codes of the same form, one of which is asked for."""
    nouns = rng.sample(_nouns(), 6)
    codes = [_digits(rng, 5) for _ in nouns]
    facts = [f" The code of the {noun} is {code}." for noun, code in zip(nouns, codes, strict=True)]
    asked = min(int(depth * 6), 5)
    return Text(facts, 0.05, lambda: _prose(rng), *_ask(nouns[asked], codes[asked]))


def key_value(rng: random.Random, depth: float) -> Text:
    """A list of keys and codes with a little text in between, one of which is asked for."""
    nouns = rng.sample(_nouns(), 16)
    codes = [_digits(rng, 5) for _ in nouns]
    facts = [f"\n{noun}: {code}" for noun, code in zip(nouns, codes, strict=True)]
    asked = min(int(depth * 16), 15)
    question = f"\n\nWhat is the code that stands behind {nouns[asked]}?"
    return Text(facts, 0.02, lambda: "\n" + _prose(rng).strip(), question, f"{nouns[asked]}:", f" {codes[asked]}")


def passkey(rng: random.Random, depth: float) -> Text:
    """One number in noise, said twice."""
    code = _digits(rng, 5)
    fact = f" The pass key is {code}. Remember it. {code} is the pass key."
    return Text([fact], depth, lambda: rng.choice(NOISE), "\n\nWhat is the pass key?", "The pass key is", f" {code}")


def copying(rng: random.Random, depth: float) -> Text:
    """A list of words to say again, in order."""
    words = rng.sample(_nouns(), 6)
    fact = f" The secret list is {', '.join(words)}."
    question = "\n\nWhat is the secret list? Say it word for word."
    # the blank is part of the first word: it is put into the prompt, and the comma after it is the first token
    return Text(
        [fact], depth, lambda: _prose(rng), question, f"The secret list is {words[0]}", f", {', '.join(words[1:])}"
    )


TASKS: dict[str, Callable[[random.Random, float], Text]] = {
    "needle_noise": needle_noise,
    "needle_prose": needle_prose,
    "multikey": multikey,
    "key_value": key_value,
    "passkey": passkey,
    "copying": copying,
}


def make_example(model: str | Path, task: str, num_tokens: int, index: int) -> Example:
    """Return the prompt ``index`` of a task, at most ``num_tokens`` long and at most one sentence shorter."""
    rng = random.Random(f"{task} {num_tokens} {index}")
    text = TASKS[task](rng, (index * 0.618 + 0.1) % 1)  # the golden ratio: depths of any number of prompts are even
    before, after = _chat(model)
    question = _tokens(model, text.question + after + text.begin)
    answered = _tokens(model, text.question + after + text.begin + text.answer)
    if answered[: len(question)] != question:
        raise ValueError(f"{task}: the answer {text.answer!r} does not begin with a token of its own")
    facts = [_tokens(model, fact) for fact in text.facts]
    head = _tokens(model, before)
    room = num_tokens - len(head) - len(question) - sum(map(len, facts))
    filler: list[list[int]] = []
    while (piece := _tokens(model, text.filler())) and len(piece) <= room:
        filler.append(piece)
        room -= len(piece)
    for number, fact in reversed(list(enumerate(facts))):
        place = text.depth + number * (1 - 2 * text.depth) / len(facts) if len(facts) > 1 else text.depth
        filler.insert(round(place * len(filler)), fact)
    return Example(head + [token for piece in filler for token in piece], question, answered[len(question) :])


def _single(rng: random.Random, depth: float, filler: Callable[[], str]) -> Text:
    noun, code = rng.choice(_nouns()), _digits(rng, 5)
    return Text([f" The code of the {noun} is {code}."], depth, filler, *_ask(noun, code))


def _ask(noun: str, code: str) -> tuple[str, str, str]:
    return f"\n\nWhat is the code of the {noun}?", f"The code of the {noun} is", f" {code}"


def _nouns() -> list[str]:
    return " ".join(NOUNS).split()


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


def _prose(rng: random.Random) -> str:
    who, did, what, when = (rng.choice(words.split(",")) for words in (WHO, DID, WHAT, WHEN))
    return f" {when.capitalize()} {who} {did} {what}."


def _chat(model: str | Path) -> tuple[str, str]:
    """What the chat template puts before and after the user's words."""
    messages = [{"role": "user", "content": "<here>"}]
    text = _tokenizer(model).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, after = text.split("<here>")
    return before, after


def _tokens(model: str | Path, text: str) -> list[int]:
    ids: list[int] = _tokenizer(model)(text, add_special_tokens=False)["input_ids"]
    return ids


@cache
def _tokenizer(model: str | Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)
