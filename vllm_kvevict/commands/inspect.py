"""The command ``inspect``: its flags, and what it runs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_kvevict.commands.arguments import file_to_write, positive
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.frontend.flags import add_group, flag_values


def add_arguments(inspect: argparse.ArgumentParser) -> None:
    """Add what the command takes to its parser; ``args.run`` yields what it has to say."""
    inspect.description = (
        "Run one prompt through the engine in this process and write a page that shows what its eviction keeps. Flags "
        "that are not listed here, such as --max-model-len, go to vLLM's engine; with --enforce-eager it starts faster."
    )
    inspect.add_argument("--model", metavar="M", required=True, help="Model name or folder.")
    prompt = inspect.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt-file", metavar="FILE", type=_text, help="The prompt as UTF-8 text, used as it is.")
    prompt.add_argument(
        "--prompt-tokens",
        metavar="FILE",
        type=_token_ids,
        help="The prompt as a JSON list of token ids; the model needs no tokenizer then.",
    )
    inspect.add_argument("--max-tokens", metavar="N", type=positive, default=16, help="Tokens to answer with.")
    inspect.add_argument("--out", metavar="FILE", type=file_to_write, required=True, help="The page to write, HTML.")
    inspect.add_argument("--png", action="store_true", help="Write the charts next to the page, too.")
    add_group(inspect)
    inspect.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace, engine_flags: list[str]) -> Iterator[str]:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "the inspector needs matplotlib, which is not installed; run pip install 'vllm-kvevict[inspect]'"
        )
    config = EvictionConfig.parse(flag_values(args))
    # read by vLLM when it is imported: recording needs the worker in this process
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm_kvevict.commands.report.page import write_page
    from vllm_kvevict.engine.offline.inspecting import inspect_prompt

    prompt = args.prompt_tokens if args.prompt_file is None else args.prompt_file
    inspection = inspect_prompt(args.model, prompt, config, args.max_tokens, engine_flags)
    for path in write_page(inspection, args.out, args.png):
        yield f"wrote {path}"


def _text(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"expected a UTF-8 text file; {error}") from None
    if not text:
        raise argparse.ArgumentTypeError(f"expected a prompt, got the empty file {path!r}")
    return text


def _token_ids(path: str) -> list[int]:
    try:
        ids: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"expected a JSON file of token ids; {error}") from None
    if not isinstance(ids, list) or not ids or not all(type(token) is int and token >= 0 for token in ids):
        raise argparse.ArgumentTypeError(f"expected a list of token ids, whole numbers of at least 0, in {path!r}")
    return ids
