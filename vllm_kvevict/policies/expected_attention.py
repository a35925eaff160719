"""Expected Attention: keep what future queries will attend to, if they are distributed like those of the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
import torch

from vllm_kvevict.cache.plan import cdiv
from vllm_kvevict.cache.ragged import in_own_memory
from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.kernels.rotary import Rotary
from vllm_kvevict.policies import scratch
from vllm_kvevict.policies.attention import log_sum, log_sums_of_stretches
from vllm_kvevict.policies.base import POLICIES, Need
from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.batch_policy import BatchPolicy
from vllm_kvevict.policies.options import at_least
from vllm_kvevict.policies.prompt_chunks import PromptChunks
from vllm_kvevict.policies.stretches import products

_STRIP = 256  # queries of one prompt whose products are summed at once: a shorter strip ends in zeros
_BYTES_PER_NUMBER = 24  # of a query, while its rotation is undone


@dataclass(frozen=True)
class _QuerySums:
    """Sums over the queries of one prompt that count so far, before their rotation, float64.

    total:  [num_heads, 1, head_size]
    moment: [num_heads, head_size, head_size], of the outer products; [num_heads, 0, 0] where no covariance is used
    """

    count: int
    total: torch.Tensor
    moment: torch.Tensor


class _Strip(NamedTuple):
    """Up to 256 queries of one prompt.

    round:       how many strips of the prompt are before it
    place:       of the prompt, among those to which more queries are added
    first:       of the queries of all chunks
    position:    of the first query
    num_queries: at least 1
    """

    round: int
    place: int
    first: int
    position: int
    num_queries: int


@POLICIES.register("expected_attention")
@dataclass(frozen=True)
class ExpectedAttention(BatchPolicy):
    """Score a token by softmax(k.m s + k^T C k s^2 / 2) times the norm of its value.

    Paper: Devoto et al. 2025, arXiv:2510.00636; the code is kvpress's ExpectedAttentionPress. m and C are the mean and
    the covariance of the prompt's queries before RoPE, turned by RoPE averaged over the positions that follow the
    prompt; s is the softmax scale. Query heads of one KV head are averaged. No token of the prompt decides more than
    another, so the end of the prompt has no say.

    Departures: queries are un-rotated, not computed again from hidden states. Future positions past the end of the
    model's rotary table are left out, since no query can stand there; a prompt that fills the table is judged by its
    last position. s is the model's own scale, which is 1 / sqrt(head_size) in kvpress. Sinks get the highest score of
    the layer, not one more than that. Logits are not capped, whatever the model does, and its own sinks, which take as
    much from every token, are left out. The allocator is "uniform", as in the class of kvpress.

    num_future_positions: positions after the prompt over which RoPE is averaged, >= 1
    num_sink:             tokens at the start that are protected and take no part in the statistics, >= 0
    use_covariance:       whether the term with C counts
    use_vnorm:            whether the attention, plus ``epsilon``, is multiplied by the l2 norm of the value
    epsilon:              >= 0; the more, the more the norm of a value decides

    Raises ValueError for a value outside those ranges.
    """

    num_future_positions: Annotated[int, at_least(1)] = 512
    num_sink: Annotated[int, at_least(0)] = 4
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: Annotated[float, at_least(0)] = 0.0
    name: ClassVar[str] = "expected_attention"
    paper: ClassVar[str] = "Expected Attention, arXiv:2510.00636"
    old_names: ClassVar[Mapping[str, str]] = {"n_future_positions": "num_future_positions", "n_sink": "num_sink"}

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.ALL_QUERIES, Need.ROTARY})

    @property
    def layers_at_once(self) -> int:
        return 1  # layers may differ in their rotary table, and what is made of their sums is large

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 4 * num_kv_heads  # the scores; all else is a tile

    def observed_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        size = head_size if self.use_covariance else 0
        return 8 * num_heads * (head_size + size**2)

    def observe_chunks(self, states: Sequence[_QuerySums | None], chunks: PromptChunks) -> list[_QuerySums]:
        """Add the queries of the chunks to the sums, whose size does not depend on the prompts."""
        rotary = _known(chunks.rotary)
        nums = [
            max(min(num_queries, kv_len - self.num_sink), 0)
            for num_queries, kv_len in zip(chunks.num_queries, chunks.kv_lens, strict=True)
        ]
        order = sorted(range(len(nums)), key=nums.__getitem__, reverse=True)
        nothing = self._no_sums(chunks.query)
        before = [nothing if state is None else state for state in states]
        total = torch.stack([before[prompt].total for prompt in order])
        moment = torch.stack([before[prompt].moment for prompt in order])
        for strips, rows in _raw_queries(chunks.query, rotary, _strips(chunks, order, nums)):
            sums, done = rows.sum(dim=2, keepdim=True), 0
            for _, of_round in groupby(strips, attrgetter("round")):
                places = [strip.place for strip in of_round]
                prompts, part = slice(places[0], places[-1] + 1), slice(done, done + len(places))
                total[prompts].add_(sums[part])
                if self.use_covariance:
                    of_heads = rows[part].flatten(0, 1)
                    moment[prompts].flatten(0, 1).baddbmm_(of_heads.mT, of_heads)
                done += len(places)
        own = in_own_memory([*total, *moment])
        summed = {
            prompt: _QuerySums(before[prompt].count + nums[prompt], own[place], own[len(order) + place])
            for place, prompt in enumerate(order)
        }
        return [summed[prompt] for prompt in range(len(nums))]

    def _no_sums(self, query: torch.Tensor) -> _QuerySums:
        num_heads, head_size = query.shape[1:]
        size = head_size if self.use_covariance else 0
        zeros = partial(query.new_zeros, dtype=torch.float64)
        return _QuerySums(0, zeros((num_heads, 1, head_size)), zeros((num_heads, size, size)))

    def score_batch(self, batch: ScoreBatch) -> torch.Tensor:
        sink, scores = self.num_sink, batch.new_scores()
        if batch.max_kv_len <= sink:
            return scores.zero_().view(batch.shape)
        turn = _average_rotations(batch, self.num_future_positions)
        num_bytes, of_logits = _bytes_of_head(batch), 4 * _group(batch) * batch.max_kv_len
        are_held = scratch.fits(num_bytes + of_logits)
        for heads in batch.head_tiles(num_bytes + are_held * of_logits, size=1):
            for (start, end), attention in self._attention(batch, turn, heads, are_held):
                part = attention.mean(dim=(2, 3))
                if self.use_vnorm:
                    part = (part + self.epsilon) * batch.gather_values(heads, start, end).norm(dim=-1)
                scores[heads, start:end] = part.masked_fill_(batch.is_behind(heads, start, end), 0.0)
        scores = scores.view(batch.shape)
        scores[..., :sink] = scores[..., sink:].amax(dim=(2, 3), keepdim=True)
        return scores

    def _attention(
        self, batch: ScoreBatch, turn: Rotary, heads: slice, are_held: bool
    ) -> Iterator[tuple[tuple[int, int], torch.Tensor]]:
        """Yield tiles of the tokens after the sinks, and their softmax [num_heads, num_tokens, group, 1] float32.

        The logits of all of them are held between the two visits, or else computed twice.
        """
        scale = batch.scale / batch.key_scale
        mean, covariance = self._future_queries(batch, turn, heads)
        mean, covariance = mean.transpose(1, 2) * scale, covariance.transpose(1, 2).flatten(2) * (scale**2 / 2)
        of_tile = partial(self._logits, batch, heads, mean, covariance)
        sink, held = self.num_sink, []
        tiles = [(start + sink, end + sink) for start, end in batch.token_tiles(end=batch.max_kv_len - sink)]
        log_sums = mean.new_full((len(mean), 1, mean.shape[2], 1), float("-inf"))
        for tile in tiles:
            logits = of_tile(*tile)
            log_sums = log_sum(torch.cat([log_sums, log_sums_of_stretches(logits)], dim=1))
            if are_held:
                held.append(logits)
        log_sums = log_sums.clamp(min=torch.finfo(torch.float32).min)  # of prompts that are no longer than the sinks
        for index, tile in enumerate(tiles):
            logits = held[index] if are_held else of_tile(*tile)
            yield tile, (logits - log_sums).exp_()

    def _logits(
        self, batch: ScoreBatch, heads: slice, mean: torch.Tensor, covariance: torch.Tensor, start: int, end: int
    ) -> torch.Tensor:
        """Return [num_heads, end - start, group, 1] float32, of the tokens ``start`` to ``end``; -inf behind a head's.

        mean:       [num_heads, 1, group, head_size], scaled
        covariance: [num_heads, head_size, group * head_size], scaled
        """
        keys, rows = batch.gather_keys(heads, start, end), mean
        if self.use_covariance:
            rows = products(keys, covariance).unflatten(2, mean.shape[2:]).add_(mean)
        logits = (rows * keys[:, :, None]).sum(dim=-1, keepdim=True)
        return logits.masked_fill_(batch.is_behind(heads, start, end)[..., None, None], float("-inf"))

    def _future_queries(self, batch: ScoreBatch, turn: Rotary, heads: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean [num_heads, group, 1, head_size] and covariance [..., head_size, head_size], float32.

        NaN for a prompt that is no longer than the sinks.

        turn:  a row for each request
        heads: of [num_reqs * num_layers * num_kv_heads]
        """
        num_layers, num_kv_heads = batch.shape[1:3]
        numbers = range(heads.start, heads.stop)
        counts = [batch.observed[head // num_kv_heads].count for head in numbers]
        requests = [head // (num_layers * num_kv_heads) for head in numbers]
        count, request = to_device(np.array([counts, requests], dtype=np.int64), batch.keys.device)[..., None, None]
        first = heads.start // num_kv_heads
        sums = batch.observed[first : cdiv(heads.stop, num_kv_heads)]
        places = slice(heads.start - first * num_kv_heads, heads.stop - first * num_kv_heads)

        def averages(parts: list[torch.Tensor]) -> torch.Tensor:
            by_head = torch.stack(parts).unflatten(1, (num_kv_heads, -1)).flatten(0, 1)
            average: torch.Tensor = by_head[places] / count[..., None]
            return average

        mean, covariance = averages([of.total for of in sums]), averages([of.moment for of in sums])
        if self.use_covariance:
            covariance -= mean.mT * mean
            covariance = turn.rotate(turn.rotate(covariance, request).mT, request)
        return turn.rotate(mean, request).float(), covariance.float()


def _group(batch: ScoreBatch) -> int:
    return batch.query.shape[3] // batch.kv_lens.shape[2]


def _bytes_of_head(batch: ScoreBatch) -> int:
    """Return the most bytes that are held at once for each head, but for the logits of its tokens."""
    group, head_size = _group(batch), batch.keys.shape[2]
    of_covariance = group * head_size**2
    # keys, their products, and what becomes of these; before that a matrix for each stretch of 64 tokens
    of_token = (8 + 4 * group) * head_size + max(4 * group * head_size, of_covariance // 16)
    return max(40 * of_covariance, 8 * of_covariance + of_token * min(batch.max_kv_len, 1024))


def _strips(chunks: PromptChunks, order: Sequence[int], nums: Sequence[int]) -> list[_Strip]:
    """Return the first strip of each prompt, then the second one of those that have two, and so on.

    order: the prompts, those first of which more queries count
    nums:  of each prompt, how many of the last queries of its chunk count
    """
    return [
        _Strip(number, place, chunks.first_queries[prompt + 1] - left, chunks.kv_lens[prompt] - left, min(left, _STRIP))
        for number in range(cdiv(nums[order[0]], _STRIP))
        for place, prompt in enumerate(order)
        if (left := nums[prompt] - number * _STRIP) > 0
    ]


def _raw_queries(
    query: torch.Tensor, rotary: Rotary, strips: Sequence[_Strip]
) -> Iterator[tuple[Sequence[_Strip], torch.Tensor]]:
    """Yield as many of the strips as fit into the scratch, and their queries before the rotation.

    Queries are [num_strips, num_heads, 256, head_size] float64, 0 behind those of a strip.

    query: [num_tokens, num_heads, head_size] of all chunks
    """
    if not strips:
        return
    numbers = [(strip.first, strip.position, strip.num_queries) for strip in strips]
    table = to_device(np.array(numbers, dtype=np.int64), query.device)[..., None]
    index = torch.arange(_STRIP, device=query.device)
    num_bytes = _BYTES_PER_NUMBER * _STRIP * query[0].numel()
    for begin, end in scratch.tiles([num_bytes] * len(strips)):
        first, position, num_queries = table[begin:end].unbind(1)
        held = index.minimum(num_queries - 1)  # behind the last query of a strip it stands again
        rows = query[first + held].transpose(1, 2).float()
        rows = rotary.unrotate(rows, (position + held)[:, None]).double()
        yield strips[begin:end], rows.masked_fill_((index >= num_queries)[:, None, :, None], 0.0)


def _average_rotations(batch: ScoreBatch, num_positions: int) -> Rotary:
    """Return the mean of the rotations at ``num_positions`` positions behind each prompt, a table of a row for each."""
    rotary = _known(batch.rotary)
    last = len(rotary.cos_sin) - 1
    firsts = [min(prompt.num_tokens, last) for prompt in batch.prompts]
    nums = [min(num_positions, last + 1 - first) for first in firsts]
    first, num = to_device(np.array([firsts, nums], dtype=np.int64), rotary.cos_sin.device)[..., None]
    place = torch.arange(num_positions, device=first.device)
    rows = rotary.cos_sin[first + place.minimum(num - 1)].float()
    total = rows.masked_fill((place >= num)[..., None], 0.0).sum(dim=1)
    return Rotary(total / num, rotary.is_neox_style)


def _known(rotary: Rotary | None) -> Rotary:
    if rotary is None:
        raise ValueError("expected_attention: expected the rotary embedding among the weights, got none")
    return rotary
