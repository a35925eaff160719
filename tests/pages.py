"""What the pages quote: commands and blocks of code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

EXAMPLE = ROOT / "examples" / "third_party_policy"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES += [*sorted((ROOT / "examples").rglob("*.md")), *DOCS]
DEPLOY = [*sorted((ROOT / "deploy").glob("Dockerfile.*")), ROOT / "deploy" / "compose.yaml"]
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
GENERATED = re.compile(r"<!-- [a-z ]+: (.*?) -->")  # above a table: the command that makes it
SPAN = re.compile(r"`([^`]+)`")
PROGRAMS = ("diff", "docker", "kvevict", "make", "pip", "python3?", "vllm")
COMMAND = re.compile(rf"(?:\w+=\S* )*(?:\.venv/bin/)?((?:{'|'.join(PROGRAMS)}) .+|\.ci/run)")


def blocks_of(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return [block for found, block in FENCE.findall(page.read_text()) if found == language]


def code_of(text: str) -> Iterator[str]:
    """Lines of code blocks, continued ones joined, and code inside sentences."""
    text = COMMENT.sub("", GENERATED.sub(r"`\1`", text))
    for _, block in FENCE.findall(text):
        yield from block.replace("\\\n", " ").splitlines()
    for span in SPAN.findall(FENCE.sub("", text)):
        yield " ".join(span.split())


def commands_of(text: str) -> Iterator[tuple[str, ...]]:
    """The commands that a page quotes, as words and in one spelling of their programs, without the environment."""
    for line in code_of(text):
        if match := COMMAND.fullmatch(line.strip()):
            words = shlex.split(match[1], comments=True)
            words[0] = words[0].replace("python3", "python")
            if words[1:3] == ["-m", "vllm_kvevict"]:
                words[:3] = ["kvevict"]
            if len(words) > 1 or match[1] == ".ci/run":  # a program alone is a name in a sentence
                yield tuple(words)


def quoted_commands() -> list[tuple[str, ...]]:
    """Every command of the pages, and of the comments in the files of deploy/, once."""
    comments = [re.findall("^# ?(.*)", path.read_text(), re.MULTILINE) for path in DEPLOY]
    # a line that stands further in is a command
    texts = ["\n".join(re.sub("^  +(.*)", r"`\1`", line) for line in lines) for lines in comments]
    texts += [path.read_text() for path in PAGES]
    return list(dict.fromkeys(command for text in texts for command in commands_of(text)))
