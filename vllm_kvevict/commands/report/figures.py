"""The three charts of an inspection as PNG files in memory."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vllm_kvevict.eviction.record import RecordedEviction

_WIDTH = 10.0  # inches
_DPI = 110
_MOST_COLUMNS = 800  # as many as the width of a chart shows
_MOST_NUMBERED_CELLS = 400


def draw_figures(record: RecordedEviction) -> dict[str, bytes]:
    """Return the PNG file of every chart by its name: pages, kept, score."""
    charts: dict[str, Callable[[RecordedEviction], Figure]] = {"pages": _pages, "kept": _kept, "score": _score}
    return {name: _png(draw(record)) for name, draw in charts.items()}


def _pages(record: RecordedEviction) -> Figure:
    pages = record.num_pages.T.cpu().numpy()  # [num_kv_heads, num_layers]
    heads, layers = pages.shape
    figure, axes = _chart(height=1.9 + 0.34 * heads, x="layer", y="KV head")
    image = axes.imshow(pages, aspect="auto", cmap="viridis", vmin=0)
    figure.colorbar(image, ax=axes, label="pages", ticks=MaxNLocator(integer=True))
    if pages.size <= _MOST_NUMBERED_CELLS:
        middle = pages.max() / 2
        for head, layer in np.ndindex(heads, layers):
            colour = "black" if pages[head, layer] > middle else "white"
            axes.text(layer, head, str(pages[head, layer]), ha="center", va="center", fontsize=7, color=colour)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _kept(record: RecordedEviction) -> Figure:
    layers, heads, num_tokens = record.kept.shape
    shares = bin_shares(record.kept.flatten(0, 1), _MOST_COLUMNS).cpu().numpy()
    figure, axes = _chart(height=min(1.6 + 0.09 * max(layers * heads, 16), 16.0), x="position in the prompt", y="layer")
    image = axes.imshow(
        shares,
        aspect="auto",
        cmap="viridis",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(0, num_tokens, layers, 0),
    )
    figure.colorbar(image, ax=axes, label="share of these positions kept", format=PercentFormatter(1.0))
    for border in range(1, layers):
        axes.axhline(border, color="white", linewidth=0.4)
    step = -(-layers // 32)
    axes.set_yticks([layer + 0.5 for layer in range(0, layers, step)], [str(n) for n in range(0, layers, step)])
    return figure


def _score(record: RecordedEviction) -> Figure:
    layers = np.arange(len(record.kept))
    figure, axes = _chart(height=3.2, x="layer", y="share kept")
    axes.bar(layers, record.score_shares().cpu().numpy(), color="#3b6ea8", label="of the policy's score")
    axes.plot(layers, record.token_shares().cpu().numpy(), "o", color="#e07b39", label="of the tokens")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    return figure


def bin_shares(kept: torch.Tensor, most_columns: int) -> torch.Tensor:
    """Return [num_rows, num_columns] float32, the share kept of each run of neighbouring positions.

    One column a position if there are no more than ``most_columns`` of them; runs differ by one position at most.

    kept: [num_rows, num_tokens] bool
    """
    num_tokens = kept.shape[1]
    columns = min(num_tokens, most_columns)
    column = torch.arange(num_tokens, device=kept.device) * columns // num_tokens
    sums = torch.zeros(len(kept), columns, device=kept.device).index_add_(1, column, kept.float())
    return sums / torch.bincount(column, minlength=columns)


def _chart(height: float, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
