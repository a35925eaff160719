"""A hook of mkdocs: pages of the site that lie outside of docs/, and links that lead to them or out of the site."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# file of the checkout -> page of the site
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/third_party_policy/README.md": "example_policy.md",
    "benchmarks/results/README.md": "measurements/index.md",
}
# figures of one of them, which lie beside it
FIGURES = {str(path.relative_to(ROOT)): f"measurements/{path.name}" for path in ROOT.glob("benchmarks/results/*.png")}
_LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside of docs/, and their figures."""
    for source, page in {**PAGES, **FIGURES}.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn the links of a page, which are those of a checkout, into those of the site."""
    name = page.file.src_uri
    sources = {page: source for source, page in PAGES.items()}
    source = sources.get(name, posixpath.join("docs", name))

    def turned(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if "://" in target:
            return link[0]
        found = site_path(posixpath.normpath(posixpath.join(posixpath.dirname(source), target)))
        if found is None:
            return text  # a file of the checkout that is no page
        return f"[{text}]({os.path.relpath(found, posixpath.dirname(name) or '.')}{anchor})"

    return _LINK.sub(turned, markdown)


def site_path(path: str) -> str | None:
    """Return where a file of the checkout is in the site, None if it is not."""
    if found := {**PAGES, **FIGURES}.get(path):
        return found
    return path.removeprefix("docs/") if path.startswith("docs/") else None
