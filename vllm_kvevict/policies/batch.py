"""What a policy sees of several requests at once, and whether it can score them so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F

from vllm_kvevict.kernels.window_batch import Reduction, WindowBatch
from vllm_kvevict.kernels.window_scores import window_scores

_WAYS_TO_SCORE = ("score", "score_layers", "score_batch")


@dataclass(frozen=True)
class ScoreBatch:
    """Some layers of several requests, whose heads may hold different numbers of tokens each. Read only.

    query:       [num_reqs, num_layers, num_queries, num_heads, head_size] the last queries, RoPE applied. Query i
                 belongs to the token with cache index kv_len - num_queries + i of every head
    keys:        [num_pages, block_size, head_size] pages to read from, as in ``ScoreInputs``
    read_values: returns values [num_pages, block_size, head_size] likewise; it may copy them, if a policy looks at them
    page_table:  [num_reqs, num_layers, num_kv_heads, max_pages] int64, logical page -> page id; behind the last one of
                 a head any page
    kv_lens:     [num_reqs, num_layers, num_kv_heads] int64, tokens of each head; it may be fewer than queries
    max_kv_len:  the largest of them, or more
    scale:       softmax scale, times what stored keys are to be multiplied by
    value_scale: what stored values are to be multiplied by
    state:       [num_reqs, num_layers, num_kv_heads, max_kv_len] float32, what the policy has summed up of each token
                 before these queries, 0 for tokens that are theirs; None if it does not observe all queries
    alike:       whether the heads of a layer hold the same tokens
    """

    query: torch.Tensor
    keys: torch.Tensor
    read_values: Callable[[], torch.Tensor]
    page_table: torch.Tensor
    kv_lens: torch.Tensor
    max_kv_len: int
    scale: float
    value_scale: float = 1.0
    state: Any = None
    alike: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of scores: num_reqs, num_layers, num_kv_heads, max_kv_len."""
        num_reqs, num_layers, num_kv_heads = self.kv_lens.shape
        return num_reqs, num_layers, num_kv_heads, self.max_kv_len

    @cached_property
    def values(self) -> torch.Tensor:
        """[num_pages, block_size, head_size], what ``read_values`` returns."""
        return self.read_values()

    @property
    def _no_values(self) -> torch.Tensor:
        """What stands for the values where nothing reads them."""
        return self.keys.new_empty(self.keys.shape[2]).expand(self.keys.shape)

    def window_scores(self, reduction: Reduction) -> torch.Tensor:
        """Return [num_reqs, num_layers, num_kv_heads, max_kv_len] float32, scores by the attention of the queries.

        What is not scored is 0: the queries' own tokens, unless the reduction says that they count, and what no head
        holds.
        """
        num_queries, num_kv_heads = self.query.shape[2], self.kv_lens.shape[2]
        query = self.query.unflatten(3, (num_kv_heads, -1)).transpose(2, 3)  # every head a request of one KV head
        # a head with fewer tokens than queries has none to be judged: what is read behind them changes no score
        num_missing = -(-num_queries // self.keys.shape[1]) - self.page_table.shape[3]
        page_table = F.pad(self.page_table, (0, num_missing)) if num_missing > 0 else self.page_table
        batch = WindowBatch(
            query.flatten(0, 2),
            self.keys,
            self.values if reduction.weight != "none" else self._no_values,
            page_table.flatten(0, 2)[:, None],
            self.kv_lens.flatten().clamp(min=num_queries),
            max(self.max_kv_len, num_queries),
            self.scale,
            self.value_scale,
        )
        return window_scores(batch, reduction)[..., : self.max_kv_len].view(self.shape)

    def fill_last(self, scores: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """In place: give the queries' own tokens another score; not in heads that hold nothing else.

        scores: [num_reqs, num_layers, num_kv_heads, max_kv_len], 0 in such heads; or of one head, if all are alike
        value:  [num_reqs, num_layers, 1, 1]
        """
        num_queries = self.query.shape[2]
        kv_lens = self.kv_lens[:, :, : scores.shape[2], None]
        last = kv_lens + torch.arange(-num_queries, 0, device=scores.device)
        value = value.masked_fill(kv_lens <= num_queries, 0.0).expand(last.shape)
        return scores.scatter_(3, last.clamp(min=0), value)


@cache
def scores_batches(policy: type) -> bool:
    """Whether a policy scores several requests at once: its ``score_batch`` is not older than its other ways.

    A subclass that changes ``score`` only is asked request by request.
    """
    for cls in policy.__mro__:
        ways = [way for way in _WAYS_TO_SCORE if way in vars(cls)]
        if ways:
            return "score_batch" in ways
    return False
