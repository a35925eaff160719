"""Choosing the next holes, of heads of several lengths: which slots they are, what is noted, and without a wait."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.paged import make_pool
from vllm_kvevict.budgets.uniform import Uniform
from vllm_kvevict.cache.readers import Readers
from vllm_kvevict.cache.request_slots import RequestSlots
from vllm_kvevict.eviction.layers import scored_at_once
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.per_token import TokenEvictor
from vllm_kvevict.kernels import slot_scores as slot_scores_module
from vllm_kvevict.policies import scratch
from vllm_kvevict.policies.base import EvictionPolicy, Need
from vllm_kvevict.policies.h2o import H2O
from vllm_kvevict.policies.inputs import LayerWeights, StepInputs

REQS, LAYERS, KV_HEADS, MAX_PAGES, BLOCK, NUM_TOKENS = 2, 3, 2, 3, 16, 90
NUM_PAGES = torch.tensor([[[3, 1], [1, 3], [2, 2]], [[2, 3], [3, 3], [1, 1]]])  # of each request, layer and head
HEADS = list(itertools.product(range(REQS), range(LAYERS), range(KV_HEADS)))
NUM_SINK, NUM_RECENT = 4, 8
SCALES, WEIGHTS = [0.25] * LAYERS, [LayerWeights()] * LAYERS


class Given(EvictionPolicy):
    """Scores [num_reqs, num_layers, num_kv_heads, num_slots] that a test has chosen, given out layer by layer.

    asked: of each call, which layers it was for
    """

    def __init__(self, scores: torch.Tensor, needs: frozenset[Need] = frozenset()) -> None:
        self._scores, self._needs = scores, needs
        self.asked: list[tuple[int, int]] = []

    @property
    def needs(self) -> frozenset[Need]:
        return self._needs

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 0

    def score(self, inputs: Any) -> torch.Tensor:
        raise NotImplementedError

    def score_step(self, inputs: StepInputs) -> torch.Tensor:
        first = self.asked[-1][1] if self.asked and self.asked[-1][1] < LAYERS else 0
        layers = slice(first, first + len(inputs.num_tokens) // REQS)
        self.asked.append((layers.start, layers.stop))
        return self._scores[:, layers].flatten(0, 1)


class Setup:
    """Two requests whose pages are scrambled."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        cache = make_pool(LAYERS, KV_HEADS, 8, BLOCK, 16, "transposed", "LBHNC")
        cache.pool.pages.fill_(float("nan"))
        num_pages = len(cache.pool.pages)
        self.pages = torch.zeros(REQS, LAYERS, KV_HEADS, MAX_PAGES, dtype=torch.int64)
        free = iter((torch.randperm(num_pages - 1, generator=generator) + 1).tolist())
        num_slots = num_pages * BLOCK
        self.residents = SimpleNamespace(
            positions=torch.full((num_slots,), 50, dtype=torch.int32), sums=torch.rand(num_slots, generator=generator)
        )
        for head in HEADS:
            tokens = iter(torch.randperm(NUM_TOKENS, generator=generator).tolist())
            for page in range(NUM_PAGES[head]):
                self.pages[head][page] = next(free)
                cache.pool.keys[self.pages[head][page]] = torch.randn(BLOCK, 16, generator=generator)
                for slot in self.slots(head)[page * BLOCK : (page + 1) * BLOCK]:
                    self.residents.positions[slot] = next(tokens)
        slots = RequestSlots(4)
        for req_id in ("other", "a", "b"):
            slots.take(req_id)
        table: Any = SimpleNamespace(
            slots=slots,
            most_pages=lambda rows: MAX_PAGES,
            layer_rows=lambda layers, *of: (self.pages[:, list(layers)], NUM_PAGES[:, list(layers)]),
        )
        query = torch.randn(REQS, LAYERS, 1, 4, 16, generator=generator)
        ring: Any = SimpleNamespace(
            slots=slots,
            readers=Readers.of_own_pages(LAYERS),
            bytes_per_query=256,
            last_of=lambda layers, *of: query[:, list(layers)],
        )
        self.evictor = TokenEvictor(
            cache.pool, table, self.residents, ring, torch.zeros(4, LAYERS, KV_HEADS, dtype=torch.int64)
        )

    def slots(self, head: tuple[int, int, int]) -> list[int]:
        """Slots of the pool that a head of a layer of a request holds, in the order of its pages."""
        pages = self.pages[head][: NUM_PAGES[head]].tolist()
        return [page * BLOCK + lane for page in pages for lane in range(BLOCK)]

    def step(self, policy: EvictionPolicy) -> Any:
        peers = self.evictor.peers(Method(policy, Uniform(), NUM_SINK, NUM_RECENT), ["a", "b"])
        lens = torch.full((REQS,), NUM_TOKENS)
        return self.evictor.prepare(peers, lens, NUM_TOKENS, torch.tensor([3, 4]))

    def choose(self, policy: EvictionPolicy) -> torch.Tensor:
        """Return the slots [num_reqs, num_layers, num_kv_heads] that are chosen next."""
        self.evictor.choose_holes(self.step(policy), SCALES, WEIGHTS)
        return self.evictor._holes[1:3]

    def lowest(self, scores: torch.Tensor) -> list[int]:
        """Return the slots that go next, head by head, if these are their scores."""
        positions, found = self.residents.positions, []
        for head in HEADS:
            of_head = list(zip(scores[head].nan_to_num(nan=-1).tolist(), self.slots(head), strict=False))
            allowed = [pair for pair in of_head if NUM_SINK <= positions[pair[1]] < NUM_TOKENS - NUM_RECENT]
            found.append(min(allowed)[1])
        return found


def scores_of(seed: int) -> torch.Tensor:
    shape = REQS, LAYERS, KV_HEADS, MAX_PAGES * BLOCK
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 0.5


@pytest.fixture
def setup() -> Setup:
    return Setup()


def test_layers_with_other_logits_are_scored_apart():
    kinds = [LayerWeights(), LayerWeights(), LayerWeights(sinks=torch.zeros(4)), LayerWeights(softcap=2.0)]
    assert [*scored_at_once([0.25] * 4, kinds, 4)] == [(0, 2), (2, 3), (3, 4)]


def test_a_row_has_the_sinks_of_its_layer(setup, monkeypatch):
    policy, seen = Given(scores_of(1)), []
    monkeypatch.setattr(policy, "score_step", lambda inputs: seen.append(inputs.sinks) or scores_of(1).flatten(0, 1))
    weights = [LayerWeights(softcap=2.0, sinks=torch.full((4,), float(layer))) for layer in range(LAYERS)]
    setup.evictor.choose_holes(setup.step(policy), SCALES, weights)
    assert [sinks.tolist() for sinks in seen] == [[[layer] * 4 for _ in range(REQS) for layer in range(LAYERS)]]


@pytest.mark.parametrize("needs", [frozenset(), frozenset({Need.ALL_QUERIES})], ids=["no sums", "sums"])
def test_the_lowest_score_that_is_not_protected_goes(setup, needs):
    scores = scores_of(1)
    scores[0, 0, 0, 5:9], scores[1, 0, 0, 2] = float("inf"), float("nan")
    expected = setup.lowest(scores)
    assert setup.choose(Given(scores, needs)).flatten().tolist() == expected


@pytest.mark.parametrize(
    ("needs", "key_scales", "layers_in_scratch", "expected"),
    [
        ((), (1.0, 1.0, 1.0), 10, [(0, 3)]),
        ((), (1.0, 1.0, 1.0), 2, [(0, 2), (2, 3)]),
        ((), (1.0, 1.0, 1.0), 0, [(0, 1), (1, 2), (2, 3)]),
        ((), (0.5, 1.0, 1.0), 10, [(0, 1), (1, 3)]),
        ((Need.OUTPUT_PROJECTION,), (1.0, 1.0, 1.0), 10, [(0, 1), (1, 2), (2, 3)]),
    ],
    ids=["all", "as fit", "none fits", "other scales", "own weights"],
)
def test_layers_are_scored_together_that_fit_and_have_the_same_weights(
    setup, monkeypatch, needs, key_scales, layers_in_scratch, expected
):
    bytes_per_layer = REQS * (KV_HEADS * MAX_PAGES * BLOCK * 32 + 4 * NUM_TOKENS)  # it looks at no query
    monkeypatch.setattr(scratch, "most_bytes", lambda: layers_in_scratch * bytes_per_layer)
    scores = scores_of(2)
    policy, lowest = Given(scores, frozenset(needs)), setup.lowest(scores)
    setup.evictor.choose_holes(setup.step(policy), SCALES, [LayerWeights(key_scale=scale) for scale in key_scales])
    assert policy.asked == expected
    assert setup.evictor._holes[1:3].flatten().tolist() == lowest


def test_sums_are_noted_where_a_head_holds_a_token_and_nowhere_else(setup):
    scores = scores_of(3) + 1
    step = setup.step(Given(scores, frozenset({Need.ALL_QUERIES})))
    expected = setup.residents.sums.clone()  # 0 in the first holes
    for head in HEADS:
        slots = setup.slots(head)
        expected[slots] = scores[head][: len(slots)]
    setup.evictor.choose_holes(step, SCALES, WEIGHTS)
    assert setup.residents.sums.equal(expected)


class Waits(TorchDispatchMode):
    """Notes the operators for which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put_", "index_put") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or name in ("nonzero", "_local_scalar_dense", "masked_select", "equal"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_choosing_waits_for_no_device(setup, monkeypatch):
    monkeypatch.setattr(slot_scores_module, "check_page_ids", lambda *_: None)  # which it leaves out on a GPU
    policy = H2O()
    setup.choose(policy)  # the policy's traits are read once
    step = setup.step(policy)
    with Waits() as waits:
        setup.evictor.choose_holes(step, SCALES, WEIGHTS)
    assert not waits.found
