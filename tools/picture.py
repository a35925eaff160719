"""The picture of blocks, pages and heads in README.md, one request before and after its eviction.

python -m tools.picture --write docs/images/eviction.svg
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "eviction.svg"

HEADS = ("layer 1, head 1", "layer 1, head 2", "layer 2, head 1", "layer 2, head 2")
COLOURS = ("#4477aa", "#cc6677", "#228833", "#aa7700")  # tell apart with any colour vision
BLOCK_SIZE = 4
NUM_FULL_BLOCKS = 5
NUM_TAIL_TOKENS = 2
PAGES = (1, 3, 1, 3)  # full pages that each head keeps: two blocks of four pages, shared out
FRESH_BLOCKS = (7, 8)

SLOT, GAP = 11, 3
PAGE_WIDTH = BLOCK_SIZE * (SLOT + 1) + GAP
PAGE_HEIGHT = SLOT + 2 * GAP
BLOCK_STEP, ROW_STEP = PAGE_WIDTH + 8, PAGE_HEIGHT + 6
LEFT, TOP = 130, 78
INK, PALE, PAPER = "#222222", "#e4e4e4", "#ffffff"
WIDTH, HEIGHT = 800, 366


@dataclass(frozen=True)
class Page:
    """The part of one block that belongs to one layer and KV head, and whose tokens stand in it.

    owner:  index of the head whose tokens stand in it
    filled: for each slot whether a token of its owner that is kept stands there
    number: tokens that stand in it, kept or not
    """

    owner: int
    filled: tuple[bool, ...]
    number: int = BLOCK_SIZE


def kept(head: int, token: int) -> bool:
    """Whether a head keeps a token of a full block: an example, as many as its pages hold."""
    num_tokens = NUM_FULL_BLOCKS * BLOCK_SIZE
    return (7 * token + 3 * head) % num_tokens < PAGES[head] * BLOCK_SIZE


def blocks_before() -> list[list[Page]]:
    """Return the pages of each block when the prompt has been read: a head's tokens stand in its own page."""
    full = [
        [
            Page(head, tuple(kept(head, block * BLOCK_SIZE + slot) for slot in range(BLOCK_SIZE)))
            for head in range(len(HEADS))
        ]
        for block in range(NUM_FULL_BLOCKS)
    ]
    return [*full, _tail()]


def blocks_after() -> list[list[Page]]:
    """Return the pages of each kept block: any page of a full one holds tokens of any layer and head."""
    owners = [head for head, count in enumerate(PAGES) for _ in range(count)]
    full = [Page(owner, (True,) * BLOCK_SIZE) for owner in owners]
    return [full[first : first + len(HEADS)] for first in range(0, len(full), len(HEADS))] + [_tail()]


def _tail() -> list[Page]:
    filled = tuple(slot < NUM_TAIL_TOKENS for slot in range(BLOCK_SIZE))
    return [Page(head, filled, NUM_TAIL_TOKENS) for head in range(len(HEADS))]


def picture() -> str:
    """Return the picture as SVG."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="12" role="img">',
        "<title>One request before and after its eviction: blocks, pages and heads</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>',
        *_before(),
        *_after(),
        *_attention(),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _before() -> Iterator[str]:
    num_tokens = NUM_FULL_BLOCKS * BLOCK_SIZE + NUM_TAIL_TOKENS
    yield _text(LEFT, 24, f"Before: a prompt of {num_tokens} tokens in 6 blocks of {BLOCK_SIZE}", weight="bold")
    yield _text(LEFT, 42, "Rows are layers and KV heads, cells are pages. The policy keeps the filled tokens.")
    for head, name in enumerate(HEADS):
        yield _text(LEFT - 12, TOP + head * ROW_STEP + PAGE_HEIGHT - 4, name, COLOURS[head], anchor="end")
    for place, pages in enumerate(blocks_before()):
        yield from _block(LEFT + place * BLOCK_STEP, f"block {place + 1}", pages)
    bottom = TOP + len(HEADS) * ROW_STEP + 12
    freed = NUM_FULL_BLOCKS * BLOCK_STEP - 8
    yield f'<path d="M{LEFT} {bottom}v6h{freed}v-6" fill="none" stroke="{INK}"/>'
    yield _text(LEFT + freed / 2, bottom + 22, "back to vLLM's pool, with their hashes", anchor="middle")


def _after() -> Iterator[str]:
    left = LEFT + (NUM_FULL_BLOCKS + 1) * BLOCK_STEP + 110
    yield _text(left, 24, "After: vLLM counts 3 blocks", weight="bold")
    yield _text(left, 42, "Any page holds tokens of any row.")
    for place, pages in enumerate(blocks_after()):
        number = FRESH_BLOCKS[place] if place < len(FRESH_BLOCKS) else NUM_FULL_BLOCKS + 1
        yield from _block(left + place * BLOCK_STEP, f"block {number}", pages)
    bottom = TOP + len(HEADS) * ROW_STEP + 12
    fresh = len(FRESH_BLOCKS) * BLOCK_STEP - 8
    yield f'<path d="M{left} {bottom}v6h{fresh}v-6" fill="none" stroke="{INK}"/>'
    yield _text(left + fresh / 2, bottom + 22, "fresh blocks", anchor="middle")
    yield _text(left + 2 * BLOCK_STEP, bottom + 22, "grows on")


def _attention() -> Iterator[str]:
    top = TOP + len(HEADS) * ROW_STEP + 66
    yield _text(LEFT, top, "Attention: every KV head is a sequence of its own", weight="bold")
    yield _text(LEFT, top + 18, "Its page table is its block table, and vLLM's kernels run unchanged.")
    for head, name in enumerate(HEADS):
        y = top + 30 + head * ROW_STEP
        yield _text(LEFT - 12, y + PAGE_HEIGHT - 4, name, COLOURS[head], anchor="end")
        pages = [page for block in blocks_after() for page in block if page.owner == head]
        for place, page in enumerate(pages):
            yield from _page(LEFT + place * (PAGE_WIDTH + 4), y, page)
        length = sum(page.number for page in pages)
        yield _text(LEFT + len(pages) * (PAGE_WIDTH + 4) + 8, y + PAGE_HEIGHT - 4, f"{length} tokens")


def _block(x: float, name: str, pages: list[Page]) -> Iterator[str]:
    height = len(pages) * ROW_STEP + 2
    yield _text(x + PAGE_WIDTH / 2, TOP - 12, name, anchor="middle")
    yield f'<rect x="{x - 4}" y="{TOP - 4}" width="{PAGE_WIDTH + 8}" height="{height}" fill="none" stroke="{INK}"/>'
    for row, page in enumerate(pages):
        yield from _page(x, TOP + row * ROW_STEP, page)


def _page(x: float, y: float, page: Page) -> Iterator[str]:
    colour = COLOURS[page.owner]
    yield f'<rect x="{x}" y="{y}" width="{PAGE_WIDTH}" height="{PAGE_HEIGHT}" fill="{PALE}" stroke="{colour}"/>'
    for slot in range(page.number):
        fill = colour if page.filled[slot] else PAPER
        left = x + GAP + slot * (SLOT + 1)
        yield f'<rect x="{left}" y="{y + GAP}" width="{SLOT}" height="{SLOT}" fill="{fill}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, colour: str = INK, anchor: str = "start", weight: str = "normal") -> str:
    place = f'x="{x}" y="{y}" fill="{colour}" text-anchor="{anchor}" font-weight="{weight}"'
    return f"<text {place}>{text}</text>"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, default=PICTURE, metavar="FILE", help="default: %(default)s")
    parser.parse_args().write.write_text(picture(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
