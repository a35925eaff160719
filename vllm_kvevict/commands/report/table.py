"""The numbers of an inspection as rows of text."""

from __future__ import annotations

import math

from vllm_kvevict.eviction.record import Inspection


def table_rows(inspection: Inspection) -> list[tuple[str, str]]:
    """Return (name, value) pairs in reading order."""
    record = inspection.record
    plan, kept, pages = record.plan, record.kept_tokens, record.num_pages
    layers, heads = pages.shape
    most, least = int(kept.max()), int(kept.min())
    return [
        ("model", f"{inspection.model} ({layers} layers x {heads} KV heads)"),
        ("policy", inspection.policy),
        ("budget allocator", inspection.allocator),
        ("budget", _budget(inspection.budget)),
        ("prompt tokens", str(plan.num_tokens)),
        ("kept tokens per head, mean", f"{kept.double().mean().item():.1f}"),
        ("kept tokens per head, smallest", str(least)),
        ("kept tokens per head, largest", str(most)),
        ("kept tokens, largest / smallest", _ratio(most, least)),
        ("pages per head, smallest to largest", f"{int(pages.min())} to {int(pages.max())}"),
        ("score kept, mean over layers", _percent(record.score_shares().nanmean().item())),
        ("blocks before", str(plan.num_blocks)),
        ("blocks after", str(plan.num_kept_blocks)),
        ("tokens per block", str(plan.block_size)),
        ("bytes saved", f"{record.bytes_saved:,} ({record.bytes_saved / 2**20:.1f} MiB)"),
        ("eviction, milliseconds (a first run)", f"{record.seconds * 1000:.1f}"),
        ("answer", inspection.answer),
    ]


def _budget(budget: int | float | str) -> str:
    if isinstance(budget, str):
        return budget
    return f"{budget} {'tokens' if isinstance(budget, int) else 'of the prompt'}"


def _ratio(most: int, least: int) -> str:
    return f"{most / least:.2f}" if least else "a head keeps nothing"


def _percent(share: float) -> str:
    return "not defined for these scores" if math.isnan(share) else f"{share:.1%}"
