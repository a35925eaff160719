"""What README.md and the pages of docs/ quote: commands and blocks of code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

EXAMPLE = ROOT / "examples" / "third_party_policy"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", EXAMPLE / "README.md", *DOCS]
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`]+)`")


def blocks_of(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return [block for found, block in FENCE.findall(page.read_text()) if found == language]


def code_of(text: str) -> Iterator[str]:
    """Lines of code blocks, continued ones joined, and code inside sentences."""
    text = COMMENT.sub("", text)
    for _, block in FENCE.findall(text):
        yield from block.replace("\\\n", " ").splitlines()
    for span in SPAN.findall(FENCE.sub("", text)):
        yield " ".join(span.split())


def commands_of(text: str, *programs: str) -> Iterator[list[str]]:
    """The commands that a page quotes of some programs, as words after the program's name, which stands first."""
    for line in code_of(text):
        for match in re.finditer(rf"(?:{'|'.join(programs)})(?=\s|$)", line):
            try:
                words = shlex.split(line[match.start() :], comments=True)
            except ValueError:  # an apostrophe in a sentence behind it
                words = line[match.start() :].split()
            end = next((place for place, word in enumerate(words) if word in ("&&", "|", ";")), len(words))
            yield words[:end]
