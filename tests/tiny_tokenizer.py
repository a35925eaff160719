"""A tokenizer with as many tokens as the tiny Llama: printable ASCII characters, and pairs of letters."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from string import ascii_lowercase

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_llama import VOCAB_SIZE

SPECIAL = ("<unk>", "<s>", "</s>")


def build_tiny_tokenizer(folder: Path) -> Path:
    """Save the tokenizer and return its folder. Whatever a tiny Llama answers is text."""
    characters = [
        "Ġ",
        *map(chr, range(ord("!"), ord("~") + 1)),
    ]  # the first is a space, as byte-level tokenizers write it
    pairs = list(product(ascii_lowercase, repeat=2))[: VOCAB_SIZE - len(SPECIAL) - len(characters)]
    tokens = [*SPECIAL, *characters, *map("".join, pairs)]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, pairs, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder
