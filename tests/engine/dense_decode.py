"""Eviction while an answer grows, in plain transformers: the same tokens again, with a mask that loses columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.engine.harness import Engine, Prompt
from vllm_kvevict.engine.offline.check.dense import DenseModel

BLOCK = 32


@dataclass(frozen=True)
class LayerNow:
    """One layer when an eviction is due. All float64 and bool.

    logits:   [num_kv_heads, group, num_tokens, num_tokens] scaled products of every query with every key
    visible:  [num_kv_heads, num_tokens, num_tokens] which keys each query saw when it was computed
    resident: [num_kv_heads, num_tokens] which tokens are still there
    """

    logits: torch.Tensor
    visible: torch.Tensor
    resident: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.logits.shape[-1]

    def attention_then(self) -> torch.Tensor:
        """[num_kv_heads, group, num_tokens, num_tokens] as it was when each query was computed."""
        return self.logits.masked_fill(~self.visible[:, None], float("-inf")).softmax(-1)

    def attention_now(self, window: int) -> torch.Tensor:
        """[num_kv_heads, group, window, num_tokens] of the last queries to what is left and not after them."""
        causal = torch.ones(self.num_tokens, self.num_tokens, dtype=torch.bool).tril()[-window:]
        hidden = ~(self.resident[:, None, None] & causal)
        return self.logits[:, :, -window:].masked_fill(hidden, float("-inf")).softmax(-1)


Score = Callable[[LayerNow], torch.Tensor]


@dataclass(frozen=True)
class Budget:
    """What each head may hold, and what it never loses.

    per_token_from: tokens from which on it loses one for each that comes; None: never
    """

    num_blocks: int
    num_sink: int
    num_recent: int
    per_token_from: int | None = None

    def target(self, num_tokens: int) -> int:
        """Tokens that a head holds when the last block is empty or filled in part; or less the one that goes next."""
        if self.per_token_from is not None and num_tokens >= self.per_token_from:
            return (self.num_blocks - 1) * BLOCK - 1
        return (self.num_blocks - 1) * BLOCK + num_tokens % BLOCK


def check_kept(
    model: DenseModel, tokens: list[int], kept: dict[int, list[list[list[int]]]], score: Score, budget: Budget
) -> tuple[int, torch.Tensor]:
    """Evict as ``kept`` says, and assert each time that every head keeps its highest scores.

    kept:  tokens there were -> [num_layers][num_kv_heads] positions kept
    score: one layer -> [num_kv_heads, num_tokens], of which those of resident tokens count

    Returns how many tokens were kept for another one of the same score, up to rounding, and the model's logits
    [num_tokens, vocab_size].
    """
    model.logits(tokens[:1])
    num_layers, num_kv_heads = len(model.keys), len(model.keys[0])
    visible = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril().repeat(num_layers, num_kv_heads, 1, 1)
    stays = {now: _as_mask(layers, now) for now, layers in sorted(kept.items())}
    for now, mask in stays.items():
        visible[:, :, now:, :now] &= mask[:, :, None]
    # one pass for all evictions: what a token is computed from does not depend on what goes later
    logits = model.logits_of_visible(tokens, visible)
    num_swaps = 0
    for now, mask in stays.items():
        for layer in range(num_layers):
            state = _layer_now(model, layer, visible[layer, :, :now, :now])
            scores = _protected(score(state), state.resident, budget)
            num_swaps += _check_highest(scores, mask[layer], budget.target(now))
    return num_swaps, logits


def _as_mask(layers: list[list[list[int]]], num_tokens: int) -> torch.Tensor:
    mask = torch.zeros(len(layers), len(layers[0]), num_tokens, dtype=torch.bool)
    for layer, heads in enumerate(layers):
        for head, positions in enumerate(heads):
            mask[layer, head, torch.tensor(positions)] = True
    return mask


def _protected(scores: torch.Tensor, resident: torch.Tensor, budget: Budget) -> torch.Tensor:
    """Return ``scores``, protected tokens at +inf, those that are gone at -inf."""
    order = resident.cumsum(-1)
    is_protected = resident & ((order <= budget.num_sink) | (order > order[:, -1:] - budget.num_recent))
    return scores.masked_fill(~resident, float("-inf")).masked_fill(is_protected, float("inf"))


def _check_highest(scores: torch.Tensor, stays: torch.Tensor, target: int) -> int:
    assert (stays.sum(-1) == target).all()
    best, cut = torch.zeros_like(stays), scores.topk(target, dim=1)
    best.scatter_(1, cut.indices, True)
    swapped = best != stays
    threshold = cut.values[:, -1:].expand_as(scores)
    torch.testing.assert_close(scores[swapped], threshold[swapped], rtol=1e-4, atol=0)
    return int(swapped.sum()) // 2


def _layer_now(model: DenseModel, layer: int, visible: torch.Tensor) -> LayerNow:
    num_tokens = visible.shape[-1]
    queries, keys = model.queries[layer][:num_tokens].double(), model.keys[layer][:, :num_tokens].double()
    by_head = queries.transpose(0, 1).unflatten(0, (len(keys), -1))  # [num_kv_heads, group, num_tokens, head_size]
    logits = by_head @ keys.transpose(1, 2)[:, None] * queries.shape[2] ** -0.5
    return LayerNow(logits, visible, visible[:, -1])


def tova(now: LayerNow) -> torch.Tensor:
    """The attention of the last query, mean over all heads."""
    return now.attention_now(1)[:, :, 0].mean(dim=(0, 1)).expand(len(now.resident), -1)


def h2o(now: LayerNow) -> torch.Tensor:
    """The attention that each token has got so far, mean over the group."""
    return now.attention_then().sum(dim=2).mean(dim=1)


def streaming_llm(now: LayerNow) -> torch.Tensor:
    """The position."""
    return torch.arange(now.num_tokens, dtype=torch.float64).expand(len(now.resident), -1)


def morphkv(window: int, fusion: str, group: str) -> Score:
    """The public code for query caches, the newest query included: older tokens only are attended to."""

    def score(now: LayerNow) -> torch.Tensor:
        order = now.resident.cumsum(-1)
        is_older = now.resident & (order <= order[:, -1:] - window)
        logits = now.logits[:, :, -window:].masked_fill(~is_older[:, None, None], float("-inf"))
        attention = logits.softmax(-1)
        of_group = attention.amax(dim=1) if group == "max" else attention.mean(dim=1)
        return of_group.sum(dim=1) if fusion == "sum" else of_group.amax(dim=1)

    return score


def kept_positions(running: Engine, request_id: str) -> list[list[list[int]]]:
    """Positions [num_layers][num_kv_heads][tokens held], from where the worker says that they are."""
    bridge, num_tokens = running.bridge, running.scheduler.requests[request_id].num_computed_tokens
    positions = bridge.residents.positions.view(-1, BLOCK)
    if bridge.page_table.replaces(request_id):
        return _but_the_next(running, request_id)
    unused = -num_tokens % BLOCK  # slots of each last page
    return [
        [sorted(positions[pages].flatten()[: len(pages) * BLOCK - unused].tolist()) for pages in layer]
        for layer in running.pages_of(bridge, request_id)
    ]


def _but_the_next(running: Engine, request_id: str) -> list[list[list[int]]]:
    """Positions as above, of a request whose next token takes the slot of one that is as good as gone."""
    bridge = running.bridge
    holes = bridge._replacing._tokens._holes[bridge.page_table.slots[request_id]]
    kept = []
    for layer, rows in enumerate(running.pages_of(bridge, request_id)):
        kept.append([])
        for head, pages in enumerate(rows):
            slots = (torch.tensor(pages)[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
            assert int((slots == holes[layer, head]).sum()) == 1
            kept[-1].append(sorted(bridge.residents.positions[slots[slots != holes[layer, head]]].tolist()))
    return kept


def run_and_watch(
    running: Engine, prompt: Prompt, per_token: bool = False, **params: Any
) -> tuple[list[int], list[int], dict[int, Any]]:
    """Return the answer, the blocks held after each step, and what each eviction has kept, by tokens at the time."""
    running.add(prompt, **params)
    held, kept, answer = [], {}, []
    while running.llm.llm_engine.has_unfinished_requests():
        outputs = running.step()
        if not running.scheduler.requests:
            answer = list(outputs[-1].outputs[0].token_ids)
            break
        (request_id,) = running.scheduler.requests
        held.append(len(running.blocks_held(request_id)))
        num_tokens = running.scheduler.requests[request_id].num_computed_tokens
        is_due = not kept or num_tokens <= len(prompt) or num_tokens % BLOCK == 0 or per_token
        if request_id in running.bridge.page_table and is_due:
            kept[num_tokens] = kept_positions(running, request_id)
    return answer, held, kept
