"""One attention layer of a random Llama after its prefill: what a policy sees of it, and what kvpress sees of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tests.paged import PagedCache, make_pool, scrambled_blocks
from tests.tiny_llama import tiny_llama_config
from vllm_kvevict.eviction.selection import protect, select
from vllm_kvevict.kernels.rotary import Rotary
from vllm_kvevict.policies import EvictionPolicy, Need, ScoreInputs
from vllm_kvevict.policies.inputs import LayerWeights

BLOCK_SIZE = 32


@dataclass(frozen=True)
class LlamaLayer:
    """
    hidden_states:       [1, num_tokens, hidden_size], what goes into the layer
    position_embeddings: cos and sin, [1, num_tokens, head_size] each
    query:               [num_tokens, num_heads, head_size], RoPE applied
    keys, values:        [num_kv_heads, num_tokens, head_size], RoPE applied
    """

    module: Any
    hidden_states: torch.Tensor
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[1]

    @property
    def attentions(self) -> torch.Tensor:
        """[1, num_heads, num_tokens, num_tokens] float32, the causal softmax: what eager attention returns."""
        keys = self.keys.repeat_interleave(self.query.shape[1] // len(self.keys), 0)
        logits = torch.einsum("qhd,hkd->hqk", self.query, keys) * self.module.scaling
        hidden = torch.ones(self.num_tokens, self.num_tokens).triu(1).bool()
        return logits.masked_fill(hidden, float("-inf")).softmax(-1)[None]

    @property
    def output(self) -> torch.Tensor:
        """[num_tokens, num_heads, head_size], what attention returns, before W_O."""
        values = self.values.repeat_interleave(self.query.shape[1] // len(self.values), 0)
        return torch.einsum("hqk,hkd->qhd", self.attentions[0], values)

    @property
    def weights(self) -> LayerWeights:
        cos, sin = (table[0, :, : table.shape[2] // 2] for table in self.position_embeddings)
        return LayerWeights(Rotary(torch.cat([cos, sin], dim=-1), is_neox_style=True), self.module.o_proj.weight)

    def press_arguments(self, attentions: bool = False) -> tuple[Any, ...]:
        """Those of kvpress's ``ScorerPress.score`` and ``compress``."""
        kwargs = {"position_embeddings": self.position_embeddings}
        seen = self.attentions if attentions else None
        return self.module, self.hidden_states, self.keys[None], self.values[None], seen, kwargs

    def cache(self, block_size: int = BLOCK_SIZE) -> tuple[PagedCache, torch.Tensor]:
        """Return the layer's keys and values in scrambled pages among NaN, and the block ids."""
        num_kv_heads, num_tokens, head_size = self.keys.shape
        num_blocks = -(-num_tokens // block_size)
        cache = make_pool(1, num_kv_heads, num_blocks + 3, block_size, head_size)
        block_ids = scrambled_blocks(cache, num_blocks, torch.Generator().manual_seed(0))
        cache.write(self.keys[None], self.values[None], block_ids)
        return cache, block_ids

    def inputs(self, policy: EvictionPolicy, chunks: Sequence[int] = ()) -> ScoreInputs:
        """Return what ``policy.score`` gets at the end of the prompt, as the engine makes it.

        chunks: sizes of the chunks in which the prompt is computed, the last one repeated; empty: the whole prompt
        """
        cache, block_ids = self.cache()
        pool, needs = cache.pool, policy.needs
        page_table = pool.layer_page_ids(0, block_ids)
        known = LayerWeights(
            self.weights.rotary if Need.ROTARY in needs else None,
            self.weights.output_projection if Need.OUTPUT_PROJECTION in needs else None,
        )
        window = self.query[max(self.num_tokens - policy.query_window, 0) :].contiguous()
        inputs = ScoreInputs(
            window, pool.keys, pool.values, page_table, self.num_tokens, self.module.scaling, weights=known
        )
        if Need.OUTPUTS in needs:
            inputs = replace(inputs, output=self.output[self.num_tokens - len(window) :])
        if Need.ALL_QUERIES in needs:
            inputs = replace(inputs, state=self._observed(policy, inputs, chunks))
        return inputs

    def _observed(self, policy: EvictionPolicy, inputs: ScoreInputs, chunks: Sequence[int]) -> Any:
        state, start, sizes = None, 0, list(chunks) or [self.num_tokens]
        while start < self.num_tokens:
            size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
            end = min(start + size, self.num_tokens)
            pages = inputs.page_table[:, : -(-end // BLOCK_SIZE)]
            # a copy that is overwritten afterwards: the engine reuses its buffers
            query = self.query[start:end].clone()
            chunk = replace(inputs, query=query, page_table=pages, kv_len=end, output=None)
            state, start = policy.observe(state, chunk), end
            query.fill_(float("nan"))
        return state


@torch.no_grad()
def make_llama_layer(num_tokens: int, seed: int) -> LlamaLayer:
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding, apply_rotary_pos_emb

    torch.manual_seed(seed)
    config = tiny_llama_config()
    module = LlamaAttention(config, layer_idx=0).float().eval()
    for projection in (module.q_proj, module.k_proj):
        projection.weight.mul_(6.0)  # as in a trained model, attention is sharp enough for scores to differ
    hidden_states = torch.randn(1, num_tokens, config.hidden_size)
    cos, sin = LlamaRotaryEmbedding(config)(hidden_states, torch.arange(num_tokens)[None])
    states = [
        projection(hidden_states).unflatten(2, (-1, module.head_dim)).transpose(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    ]
    query, keys = apply_rotary_pos_emb(*states[:2], cos, sin)
    return LlamaLayer(module, hidden_states, (cos, sin), query[0].transpose(0, 1), keys[0], states[2][0])


def kept_by(policy: EvictionPolicy, layer: LlamaLayer, num_kept: int) -> torch.Tensor:
    """Return [num_kv_heads, num_kept] positions that selection keeps."""
    scores = protect(policy.score(layer.inputs(policy))[None], policy.num_sink, policy.num_recent)
    kept = select(scores, torch.full((1, len(layer.keys)), num_kept))[0]
    return kept.nonzero()[:, 1].view(len(layer.keys), num_kept)


def kept_by_press(press: Any, layer: LlamaLayer) -> torch.Tensor:
    """Return [num_kv_heads, num_kept] positions, read from values that say which token they belong to."""
    named = replace(layer, values=torch.arange(layer.num_tokens).float()[:, None].expand_as(layer.values))
    return press.compress(*named.press_arguments())[1][0, :, :, 0].sort().values.long()
