"""Tokens of a request that stay beside those at both ends of its prompt: what images, audio and video are read as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch

from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.eviction.method import Method

# positions of a request that are protected: the first of each stretch, and the one behind its last
Spans: TypeAlias = tuple[tuple[int, int], ...]

_HIGHEST = torch.finfo(torch.float32).max


def num_in(spans: Spans) -> int:
    """Return how many tokens ``spans`` have, which do not overlap."""
    return sum(end - start for start, end in spans)


def num_protected(method: Method, spans: Spans, num_tokens: int) -> int:
    """Return how many of the ``num_tokens`` of a request are protected, by both ends of its prompt or by ``spans``."""
    first, last = min(method.num_sink, num_tokens), max(num_tokens - method.num_recent, 0)
    if first >= last:
        return num_tokens
    between = ((max(start, first), min(end, last)) for start, end in spans)
    return num_tokens - last + first + sum(max(end - start, 0) for start, end in between)


def marks_of(each: Sequence[Spans], num_tokens: Sequence[int], width: int, device: torch.device) -> torch.Tensor | None:
    """Return [num_reqs, width] bool, which positions are protected by the spans of each request; None if none is.

    num_tokens: of each request; what lies behind them is not marked
    """
    if not any(each):
        return None
    marks = np.zeros((len(each), width), dtype=bool)
    for of_request, spans, count in zip(marks, each, num_tokens, strict=True):
        for start, end in spans:
            of_request[start : min(end, count)] = True
    return to_device(marks, device)


def raised(scores: torch.Tensor, marks: torch.Tensor | None) -> torch.Tensor:
    """Return ``scores`` [num_reqs, *, num_tokens] with those at +inf that are marked, and no others.

    marks: [num_reqs, *, num_tokens] bool, with as many dimensions; None: scores stay as they are
    """
    return scores if marks is None else scores.clamp(max=_HIGHEST).masked_fill_(marks, float("inf"))
