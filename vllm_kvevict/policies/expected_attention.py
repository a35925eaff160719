"""Expected Attention: keep what future queries will attend to, if they are distributed like those of the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from vllm_kvevict.kernels.rotary import Rotary
from vllm_kvevict.policies.base import POLICIES, EvictionPolicy, Need
from vllm_kvevict.policies.inputs import ScoreInputs
from vllm_kvevict.policies.options import at_least
from vllm_kvevict.policies.scratch import fits


@dataclass(frozen=True)
class _QuerySums:
    """Sums over the queries that count so far, before their rotation, float64.

    total:  [num_heads, 1, head_size]
    moment: [num_heads, head_size, head_size], of the outer products; zeros where the covariance is not used
    """

    count: int
    total: torch.Tensor
    moment: torch.Tensor


@POLICIES.register("expected_attention")
@dataclass(frozen=True)
class ExpectedAttention(EvictionPolicy):
    """Score a token by softmax(k.m s + k^T C k s^2 / 2) times the norm of its value.

    Paper: Devoto et al. 2025, arXiv:2510.00636; the code is kvpress's ExpectedAttentionPress. m and C are the mean and
    the covariance of the prompt's queries before RoPE, turned by RoPE averaged over the positions that follow the
    prompt; s is the softmax scale. Query heads of one KV head are averaged. No token of the prompt decides more than
    another, so the end of the prompt has no say.

    Departures: queries are un-rotated, not computed again from hidden states. Future positions past the end of the
    model's rotary table are left out, since no query can stand there; a prompt that fills the table is judged by its
    last position. s is the model's own scale, which is 1 / sqrt(head_size) in kvpress. Sinks get the highest score of
    the layer, not one more than that. The allocator is "uniform", as in the class of kvpress.

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

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 4 * num_kv_heads  # the scores; logits of a long prompt are computed again

    def observe(self, state: _QuerySums | None, inputs: ScoreInputs) -> _QuerySums:
        """Add a chunk's queries to the sums, whose size does not depend on the prompt."""
        rotary = _rotary(inputs)
        num_tokens, num_heads, head_size = inputs.query.shape
        start = inputs.kv_len - num_tokens
        sums = state or _QuerySums(
            0,
            inputs.query.new_zeros(num_heads, 1, head_size, dtype=torch.float64),
            inputs.query.new_zeros(num_heads, head_size, head_size, dtype=torch.float64),
        )
        for first, last in inputs.tiles(max(start, self.num_sink)):
            positions = torch.arange(first, last, device=inputs.query.device)
            rows = inputs.query[first - start : last - start].transpose(0, 1).float()
            rows = rotary.unrotate(rows, positions).double()
            moment = sums.moment + rows.mT @ rows if self.use_covariance else sums.moment
            sums = _QuerySums(sums.count + last - first, sums.total + rows.sum(dim=1, keepdim=True), moment)
        return sums

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        num_kv_heads, kv_len = inputs.num_kv_heads, inputs.kv_len
        if kv_len <= self.num_sink:
            return inputs.query.new_zeros(num_kv_heads, kv_len, dtype=torch.float32)
        scores = inputs.new_scores()
        for (start, end), attention in self._attention(inputs):
            part = scores[:, start:end]
            torch.mean(attention, dim=1, out=part)
            if self.use_vnorm:
                part += self.epsilon
                part *= inputs.gather_values(start, end).norm(dim=-1)
        scores[:, : self.num_sink] = scores[:, self.num_sink :].amax()
        return scores

    def _attention(self, inputs: ScoreInputs) -> Iterator[tuple[tuple[int, int], torch.Tensor]]:
        """Yield tiles of the tokens after the sinks, and their softmax [num_kv_heads, group, num_tokens] float32.

        The logits of all of them are held between the two visits if there are few, else computed twice.
        """
        future, tiles = self._future_queries(inputs), list(inputs.tiles(self.num_sink))
        largest = future[0].new_full(future[0].shape[:2], float("-inf"))  # [num_kv_heads, group]
        total = torch.zeros_like(largest)
        are_held = fits(4 * total.numel() * inputs.kv_len)
        held = []
        for tile in tiles:
            logits = self._logits(inputs, *future, *tile)
            before, largest = largest, torch.maximum(largest, logits.amax(dim=-1))
            total = total * (before - largest).exp() + (logits - largest[..., None]).exp().sum(dim=-1)
            if are_held:
                held.append(logits)
        for index, tile in enumerate(tiles):
            logits = held[index] if are_held else self._logits(inputs, *future, *tile)
            yield tile, (logits - largest[..., None]).exp_() / total[..., None]

    def _logits(
        self, inputs: ScoreInputs, mean: torch.Tensor, covariance: torch.Tensor, start: int, end: int
    ) -> torch.Tensor:
        """Return [num_kv_heads, group, end - start] float32, of the tokens ``start`` to ``end``."""
        keys = inputs.gather_keys(start, end)[:, None]  # [num_kv_heads, 1, tile, head_size]
        logits = (keys @ mean.mT).squeeze(-1) * inputs.scale
        if self.use_covariance:
            logits += ((keys @ covariance) * keys).sum(dim=-1) * (inputs.scale**2 / 2)
        return logits

    def _future_queries(self, inputs: ScoreInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean [num_kv_heads, group, 1, head_size] and covariance [..., head_size, head_size], float32."""
        sums: _QuerySums = inputs.state
        mean = sums.total / sums.count
        covariance = sums.moment / sums.count - mean.mT @ mean
        turn = _average_rotation(_rotary(inputs), inputs.kv_len, self.num_future_positions)
        row = torch.zeros(mean.shape[-1], dtype=torch.int64, device=mean.device)
        covariance = turn.rotate(turn.rotate(covariance, row).mT, row)
        by_kv_head = (inputs.num_kv_heads, -1)
        return turn.rotate(mean, row[:1]).float().unflatten(0, by_kv_head), covariance.float().unflatten(0, by_kv_head)


def _average_rotation(rotary: Rotary, start: int, num_positions: int) -> Rotary:
    """Return the mean of the rotations at ``num_positions`` positions from ``start`` on, a table of one row."""
    table = rotary.cos_sin
    rows = table[min(start, len(table) - 1) : start + num_positions]
    return Rotary(rows.float().mean(dim=0, keepdim=True), rotary.is_neox_style)


def _rotary(inputs: ScoreInputs) -> Rotary:
    if inputs.weights.rotary is None:
        raise ValueError("expected_attention: expected the rotary embedding among the weights, got none")
    return inputs.weights.rotary
