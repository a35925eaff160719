"""Long prompts with one fact in them, as text and as tokens."""

from __future__ import annotations

from pathlib import Path

FILLER = (
    "The ferry leaves the harbour at dawn and the gulls follow it out to sea. ",
    "Bread is baked in the village twice a week, and the smell fills the square. ",
    "In autumn the hills turn copper and the paths are covered with leaves. ",
    "A letter takes three days to reach the coast when the roads are dry. ",
)
FACT = "The access code of the old lighthouse is 47. "
QUESTION = "\nWhat is the access code of the old lighthouse? Answer with the number only."


def long_text(num_sentences: int, fact_at: float = 0.5) -> str:
    sentences = [FILLER[index % len(FILLER)] for index in range(num_sentences)]
    sentences.insert(int(num_sentences * fact_at), FACT)
    return "".join(sentences) + QUESTION


def chat_tokens(model: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
