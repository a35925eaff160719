"""One file that shows an inspection: no scripts, no network, the charts inside it."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from vllm_kvevict.commands.report.figures import draw_figures
from vllm_kvevict.commands.report.table import table_rows
from vllm_kvevict.eviction.record import Inspection

_CHARTS = {
    "pages": (
        "Pages per layer and KV head",
        "A page holds the tokens of one block for one layer and KV head. All pages together fill the request's blocks; "
        "how they are shared is the allocator's choice.",
    ),
    "kept": (
        "Kept positions along the prompt",
        "One row per layer and KV head, the heads of a layer below each other.",
    ),
    "score": (
        "Share of score kept per layer",
        "Bars: the sum of the policy's scores of the kept tokens, divided by that of all tokens. Dots: the share of "
        "tokens kept; a bar far above its dot means that few tokens hold most of the score. For snapkv and lava the "
        "score is the attention of the last queries of the prompt, pooled over neighbours (lava: times a norm of the "
        "values), so the bar reads as the share of attention mass kept. Tokens that do not compete, the protected "
        "ones and those whose queries the policy looks at, are left out of both.",
    ),
}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
img { max-width: 100%; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid #ddd; padding: 0.25rem 1rem 0.25rem 0; text-align: left; vertical-align: top; }
th { font-weight: normal; color: #555; white-space: nowrap; }
td { white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def write_page(inspection: Inspection, out: Path, png: bool = False) -> list[Path]:
    """Write the page, with ``png`` the charts next to it as ``<stem>-<chart>.png``, and return what was written."""
    figures = draw_figures(inspection.record)
    out.write_text(page(inspection, figures), encoding="utf-8")
    written = [out]
    if png:
        for name, data in figures.items():
            written.append(out.with_name(f"{out.stem}-{name}.png"))
            written[-1].write_bytes(data)
    return written


def page(inspection: Inspection, figures: dict[str, bytes]) -> str:
    """Return the HTML text. figures: PNG files by the name of their chart"""
    title = f"What {inspection.policy} with {inspection.allocator} budgets keeps"
    rows = "\n".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in table_rows(inspection)
    )
    charts = "\n".join(_chart(name, data) for name, data in figures.items())
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"{charts}\n<h2>Numbers</h2>\n<table>\n{rows}\n</table>\n</body>\n</html>\n"
    )


def _chart(name: str, data: bytes) -> str:
    title, text = _CHARTS[name]
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return f'<h2>{title}</h2>\n<p>{text}</p>\n<img id="{name}" alt="{title}" src="{source}">'
