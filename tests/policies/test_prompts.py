"""Prompts that are observed and scored in one call: each gets what it gets alone, bit by bit, in as many launches."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from tests.implementations import hard_sinks
from tests.launches import counted
from vllm_kvevict.kernels.rotary import Rotary
from vllm_kvevict.policies import scratch
from vllm_kvevict.policies.base import Need
from vllm_kvevict.policies.batch import Prompt, ScoreBatch, observes_chunks, preselects_batches, scores_batches
from vllm_kvevict.policies.chunkkv import ChunkKV
from vllm_kvevict.policies.compactor import Compactor, gaussian_sketch
from vllm_kvevict.policies.criticalkv import CriticalKV
from vllm_kvevict.policies.expected_attention import ExpectedAttention
from vllm_kvevict.policies.h2o import H2O
from vllm_kvevict.policies.inputs import LayerWeights, ScoreInputs
from vllm_kvevict.policies.laq import LookaheadQCache, LookaheadQCachePlus
from vllm_kvevict.policies.prompt_chunks import PromptChunks

pytestmark = pytest.mark.usefixtures("one_thread")
KV_HEADS, GROUP, HEAD_SIZE, BLOCK, SCALE, MAX_POSITION = 3, 2, 16, 16, 0.25, 1300
KEY_SCALE = 0.5
SOFTCAP, SINKS = 2.0, hard_sinks(KV_HEADS * GROUP)
# of each prompt, the chunks that it comes in; all have a first and a last one. The last prompt is all NaN
CHUNKS = [(200, 133), (3, 1), (700, 390, 10), (40, 1, 24), (1, 15), (500, 100)]
OTHERS = range(len(CHUNKS) - 1)
ENGINE = {"chunk": 128, "leverage_block": 512, "ridge": 0.005, "z_scope": "block", "pool_kernel": 1}
KVPRESS = {"ridge": 0.01, "value_norm": True, "num_sink": 8, "num_recent": 4, "exclude_protected": True}
OBSERVING = [
    H2O(),
    H2O(normalize=True),
    Compactor(),
    Compactor(**ENGINE),
    Compactor(leverage_weight=None, **KVPRESS),
    Compactor(z_scope="head", group="max", chunk=10, scale_logits=True, leverage_block=100),
    ExpectedAttention(),
    ExpectedAttention(use_covariance=False, num_sink=0, epsilon=0.1, num_future_positions=3),
    ChunkKV("h2o"),
    CriticalKV("compactor"),
    CriticalKV("expected_attention"),
]
LOOKING_AHEAD = [
    LookaheadQCache(first_window=4),
    LookaheadQCache(first_window=4, capacity=9, misplaced_mask=True),
    LookaheadQCachePlus(window=3, first_window=2, misplaced_mask=True),
    LookaheadQCachePlus(window=4, first_window=2, num_lookahead=3),
    CriticalKV("laq", {"first_window": 4}),
]


class Prompts:
    """Prompts in one layer of a cache that is NaN elsewhere."""

    def __init__(self, chunks=CHUNKS):
        generator = torch.Generator().manual_seed(0)
        self.chunks, self.lens = chunks, [sum(of_prompt) for of_prompt in chunks]
        max_pages = -(-max(self.lens) // BLOCK) + 1
        num_pages = len(chunks) * KV_HEADS * max_pages + 1
        order = torch.randperm(num_pages - 1, generator=generator) + 1
        self.page_table = order.view(len(chunks), KV_HEADS, max_pages)
        is_held = torch.arange(max_pages * BLOCK) < torch.tensor(self.lens)[:, None, None]
        is_held[len(OTHERS) :] = False
        self.pages = []
        for _ in range(2):
            tokens = torch.randn(*self.page_table.shape[:2], max_pages * BLOCK, HEAD_SIZE, generator=generator)
            tokens = tokens.masked_fill(~is_held[..., None], float("nan"))
            pages = torch.full((num_pages, BLOCK, HEAD_SIZE), float("nan"))
            pages[self.page_table] = tokens.unflatten(2, (-1, BLOCK))
            self.pages.append(pages)
        shape = max(self.lens), KV_HEADS * GROUP, HEAD_SIZE
        self.queries = [torch.randn(shape, generator=generator)[:num_tokens] for num_tokens in self.lens]
        for queries in self.queries[len(OTHERS) :]:
            queries.fill_(float("nan"))
        self.pseudo = [torch.randn(8, *shape[1:], generator=generator)[: 1 + place % 4] for place in range(len(chunks))]
        angles = torch.arange(MAX_POSITION)[:, None] * 10.0 ** -torch.arange(HEAD_SIZE // 2)
        self.rotary = Rotary(torch.cat([angles.cos(), angles.sin()], dim=1), is_neox_style=True)
        self.projection = torch.randn(24, KV_HEADS * GROUP * HEAD_SIZE, generator=generator)

    def chunk_of(self, prompts, number):
        """The chunks of some prompts, of each its first, its last or those between."""
        bounds = []
        for prompt in prompts:
            ends = [sum(self.chunks[prompt][:count]) for count in range(len(self.chunks[prompt]) + 1)]
            cuts = {"first": (0, ends[1]), "between": (ends[1], ends[-2]), "last": (ends[-2], ends[-1])}
            bounds.append(cuts[number])
        return PromptChunks(
            torch.cat([self.queries[prompt][slice(*cut)] for prompt, cut in zip(prompts, bounds, strict=True)]),
            [end - start for start, end in bounds],
            [end for _, end in bounds],
            self.pages[0],
            lambda: self.pages[1],
            self.page_table[prompts],
            SCALE,
            KEY_SCALE,
            rotary=self.rotary,
        )

    def observe(self, policy, prompts):
        """Return the states of some prompts, observed in one call for each part of them."""
        states = dict.fromkeys(prompts)
        for number in ("first", "between", "last"):
            some = [prompt for prompt in prompts if number != "between" or len(self.chunks[prompt]) > 2]
            if some:
                found = policy.observe_chunks([states[prompt] for prompt in some], self.chunk_of(some, number))
                states |= dict(zip(some, found, strict=True))
        return [*states.values()]

    def batch_of(self, policy, prompts, states):
        lens = [self.lens[prompt] for prompt in prompts]
        window, width = policy.query_window, max(lens)
        pseudo = [self.pseudo[prompt] for prompt in prompts] if policy.num_pseudo_tokens else []
        most = max(map(len, pseudo), default=0)
        padded = [torch.nn.functional.pad(queries, (0, 0, 0, 0, 0, most - len(queries))) for queries in pseudo]
        return ScoreBatch(
            torch.stack([self.queries[prompt][self.lens[prompt] - window :] for prompt in prompts])[:, None],
            self.pages[0],
            lambda: self.pages[1],
            self.page_table[prompts][:, None],
            torch.tensor(lens)[:, None, None].expand(-1, 1, KV_HEADS).contiguous(),
            width,
            SCALE * KEY_SCALE,
            alike=True,
            key_scale=KEY_SCALE,
            layers=[0],
            num_kept=torch.tensor(lens)[:, None, None].expand(-1, 1, KV_HEADS) // 2,
            projections=[self.projection],
            prompts=[Prompt(count, count // 2) for count in lens],
            observed=states,
            rotary=self.rotary,
            pseudo_query=torch.stack(padded)[:, None] if pseudo else None,
            num_pseudo=torch.tensor([len(queries) for queries in pseudo]) if pseudo else None,
            softcap=SOFTCAP,
            sinks=SINKS[None],
        )

    def inputs_of(self, prompt, state, pseudo=False):
        weights = LayerWeights(self.rotary, self.projection, KEY_SCALE, softcap=SOFTCAP, sinks=SINKS)
        return ScoreInputs(
            self.queries[prompt],
            *self.pages,
            self.page_table[prompt, :, : -(-self.lens[prompt] // BLOCK)],
            self.lens[prompt],
            SCALE,
            weights=weights,
            state=state,
            num_kept=self.lens[prompt] // 2,
            pseudo_query=self.pseudo[prompt] if pseudo else None,
        )


def states_of(state):
    """The tensors in what a policy has observed."""
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, tuple):
        return [tensor for part in state for tensor in states_of(part)]
    return [tensor for part in vars(state).values() if not isinstance(part, int) for tensor in states_of(part)]


@pytest.mark.parametrize("policy", OBSERVING, ids=str)
@pytest.mark.parametrize("most_bytes", [scratch.DEFAULT_MOST_BYTES, 2**21, 1])
def test_each_prompt_gets_what_it_gets_alone(policy, most_bytes):
    """Observed and scored together, alone, and in tiles of any size, with NaN beside all of it."""
    prompts, everybody = Prompts(), list(range(len(CHUNKS)))
    with patch.object(scratch, "_most_bytes", most_bytes):
        states = prompts.observe(policy, everybody)
        before = [[tensor.clone() for tensor in states_of(state)] for state in states]
        together = policy.score_batch(prompts.batch_of(policy, everybody, states))
    for prompt, state in zip(OTHERS, states, strict=False):
        (alone,) = prompts.observe(policy, [prompt])
        for ours, theirs, earlier in zip(states_of(state), states_of(alone), before[prompt], strict=True):
            assert ours.equal(theirs) and ours.equal(earlier), "a state has changed when it was scored"
        scores = policy.score(prompts.inputs_of(prompt, alone))
        assert scores.isfinite().all()
        assert together[prompt, 0, :, : prompts.lens[prompt]].equal(scores)


@pytest.mark.parametrize("policy", OBSERVING, ids=str)
def test_what_was_observed_is_in_own_memory_and_no_call_changes_what_an_earlier_one_returned(policy):
    prompts, everybody = Prompts(), [0, 1, 2]
    first = policy.observe_chunks([None] * 3, prompts.chunk_of(everybody, "first"))
    before = [[tensor.clone() for tensor in states_of(state)] for state in first]
    policy.observe_chunks(first, prompts.chunk_of(everybody, "last"))
    storages = []
    for state, copies in zip(first, before, strict=True):
        for tensor, copy in zip(states_of(state), copies, strict=True):
            assert tensor.equal(copy)
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            storages += [tensor.untyped_storage().data_ptr()] if tensor.numel() else []
    assert len(storages) == len(set(storages))


@pytest.mark.parametrize("policy", LOOKING_AHEAD, ids=str)
def test_each_prompt_looks_ahead_as_it_does_alone(policy):
    prompts, everybody = Prompts(), list(range(len(CHUNKS)))
    batch = prompts.batch_of(policy, everybody, [None] * len(everybody))
    selected, together = policy.preselect_batch(batch), policy.score_batch(batch)
    for prompt in OTHERS:
        inputs = prompts.inputs_of(prompt, None, pseudo=True)
        inputs = replace(inputs, query=inputs.query[len(inputs.query) - policy.query_window :])
        alone, scores = policy.preselect(inputs), policy.score(inputs)
        assert (alone >= 0).all()
        assert selected[prompt, 0, :, : alone.shape[1]].equal(alone)
        assert (selected[prompt, 0, :, alone.shape[1] :] == -1).all()
        assert scores.isfinite().all()
        assert together[prompt, 0, :, : prompts.lens[prompt]].equal(scores)


def launches_of(policy, num_prompts, monkeypatch):
    """Return what observing, preselecting and scoring as many alike prompts launch, and what the host waits for."""
    prompts = Prompts([(40, 24, 9)] * num_prompts)
    gaussian_sketch(HEAD_SIZE, Compactor.sketch_rank, Compactor.seed)  # which is drawn once
    everybody = list(range(num_prompts))
    with counted(monkeypatch) as launches:
        observes = Need.ALL_QUERIES in policy.needs
        states = prompts.observe(policy, everybody) if observes else [None] * num_prompts
        batch = prompts.batch_of(policy, everybody, states)
        if policy.num_pseudo_tokens:
            policy.preselect_batch(batch)
        policy.score_batch(batch)
    return launches


@pytest.mark.parametrize("policy", OBSERVING + LOOKING_AHEAD, ids=str)
def test_launches_do_not_depend_on_how_many_prompts_there_are(policy, monkeypatch):
    two, five = (launches_of(policy, count, monkeypatch) for count in (2, 5))
    del two.counts["constant_pad_nd"], five.counts["constant_pad_nd"]  # this test's own
    assert two.counts == five.counts
    assert two.waits == five.waits == []
    assert two.counts.total() > 0


@pytest.mark.parametrize("policy", OBSERVING + LOOKING_AHEAD, ids=str)
def test_a_subclass_that_changes_one_of_the_ways_for_one_prompt_is_asked_so(policy):
    kind = type(policy)

    class Changed(kind):
        def observe(self, state, inputs):
            return super().observe(state, inputs)

        def score(self, inputs):
            return super().score(inputs)

        def preselect(self, inputs):
            return super().preselect(inputs)

    assert scores_batches(policy) and not scores_batches(Changed())
    if Need.ALL_QUERIES in policy.needs:
        assert observes_chunks(policy) and not observes_chunks(Changed())
    if policy.num_pseudo_tokens:
        assert preselects_batches(policy) and not preselects_batches(Changed())
