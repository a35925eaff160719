"""A griffe extension for the site: a docstring's paragraph of names and what they are becomes a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

# a name at the start of a line, and lines behind it that are indented
_ENTRY = re.compile(r"([a-z_*]\w*(?:, [a-z_*]\w*)*): +((?:.+\n?)(?: +.+\n?)*)")


class Lists(griffe.Extension):
    """Ours say ``name: [shape] dtype what it is``, aligned, which Markdown would run together."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of whatever was read."""
        if obj.docstring:
            obj.docstring.value = with_lists(obj.docstring.value)


def with_lists(docstring: str) -> str:
    """Return a docstring with its paragraphs of names as Markdown's lists."""
    return "\n\n".join(map(_as_list, docstring.split("\n\n")))


def _as_list(paragraph: str) -> str:
    entries = _ENTRY.findall(paragraph)
    if not entries or _ENTRY.sub("", paragraph):
        return paragraph
    return "\n".join(f"- `{name}`: {' '.join(text.split())}" for name, text in entries)
