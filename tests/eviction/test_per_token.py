"""Choosing the next holes, of heads of several lengths: which slots they are, what is noted, and without a wait."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.paged import make_pool
from vllm_kvevict.budgets.uniform import Uniform
from vllm_kvevict.cache.request_slots import RequestSlots
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.per_token import TokenEvictor
from vllm_kvevict.kernels import slot_scores as slot_scores_module
from vllm_kvevict.policies.base import EvictionPolicy, LayerWeights, Need, StepInputs
from vllm_kvevict.policies.h2o import H2O

LAYERS, KV_HEADS, BLOCK, NUM_TOKENS, LAYER = 2, 2, 16, 90, 1
NUM_PAGES = torch.tensor([[3, 1], [2, 3]])  # of each request and head
NUM_SINK, NUM_RECENT = 4, 8


class Given(EvictionPolicy):
    """Scores that a test has chosen."""

    def __init__(self, scores: torch.Tensor, needs: frozenset[Need]) -> None:
        self._scores, self._needs = scores, needs

    @property
    def needs(self) -> frozenset[Need]:
        return self._needs

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 0

    def score(self, inputs: Any) -> torch.Tensor:
        raise NotImplementedError

    def score_step(self, inputs: StepInputs) -> torch.Tensor:
        return self._scores


class Setup:
    """Two requests in a layer whose pages are scrambled."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        cache = make_pool(LAYERS, KV_HEADS, 12, BLOCK, 16, "transposed", "LBHNC")
        cache.pool.pages.fill_(float("nan"))
        num_pages = len(cache.pool.pages)
        self.pages = torch.zeros(2, KV_HEADS, 3, dtype=torch.int64)
        free = iter((torch.randperm(num_pages - 1, generator=generator) + 1).tolist())
        num_slots = num_pages * BLOCK
        self.residents = SimpleNamespace(
            positions=torch.full((num_slots,), 50, dtype=torch.int32), sums=torch.rand(num_slots, generator=generator)
        )
        for req in range(2):
            for head in range(KV_HEADS):
                tokens = iter(torch.randperm(NUM_TOKENS, generator=generator).tolist())
                for page in range(NUM_PAGES[req, head]):
                    self.pages[req, head, page] = next(free)
                    cache.pool.keys[self.pages[req, head, page]] = torch.randn(BLOCK, 16, generator=generator)
                    for slot in self.slots(req, head)[page * BLOCK : (page + 1) * BLOCK]:
                        self.residents.positions[slot] = next(tokens)
        slots = RequestSlots(4)
        for req_id in ("other", "a", "b"):
            slots.take(req_id)
        table: Any = SimpleNamespace(
            slots=slots, most_pages=lambda rows: 3, layer_rows=lambda layer, rows, most: (self.pages, NUM_PAGES)
        )
        query = torch.randn(2, 1, 4, 16, generator=generator)
        ring: Any = SimpleNamespace(slots=slots, last_of=lambda *of: query)
        self.evictor = TokenEvictor(
            cache.pool, table, self.residents, ring, torch.zeros(2, 4, KV_HEADS, dtype=torch.int64)
        )

    def slots(self, req: int, head: int) -> list[int]:
        """Slots of the pool that a head holds, in the order of its pages."""
        pages = self.pages[req, head, : NUM_PAGES[req, head]].tolist()
        return [page * BLOCK + lane for page in pages for lane in range(BLOCK)]

    def step(self, policy: EvictionPolicy) -> Any:
        peers = self.evictor.peers(Method(policy, Uniform(), NUM_SINK, NUM_RECENT), ["a", "b"])
        lens = torch.full((2,), NUM_TOKENS)
        return self.evictor.prepare(peers, lens, NUM_TOKENS, torch.tensor([3, 4]))

    def choose(self, policy: EvictionPolicy) -> torch.Tensor:
        """Return the slots [num_reqs, num_kv_heads] that are chosen next."""
        self.evictor.choose_holes(LAYER, self.step(policy), 0.25, LayerWeights())
        return self.evictor._holes[LAYER, 1:3]


@pytest.fixture
def setup() -> Setup:
    return Setup()


@pytest.mark.parametrize("needs", [frozenset(), frozenset({Need.ALL_QUERIES})], ids=["no sums", "sums"])
def test_the_lowest_score_that_is_not_protected_goes(setup, needs):
    scores = torch.rand(2, KV_HEADS, 3 * BLOCK, generator=torch.Generator().manual_seed(1)) - 0.5
    scores[0, 0, 5:9], scores[1, 0, 2] = float("inf"), float("nan")
    expected = []
    for req, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        of_head = list(zip(scores[req, head].nan_to_num(nan=-1).tolist(), setup.slots(req, head), strict=False))
        positions = setup.residents.positions
        allowed = [pair for pair in of_head if NUM_SINK <= positions[pair[1]] < NUM_TOKENS - NUM_RECENT]
        expected.append(min(allowed)[1])
    assert setup.choose(Given(scores, needs)).flatten().tolist() == expected


def test_sums_are_noted_where_a_head_holds_a_token_and_nowhere_else(setup):
    scores = torch.rand(2, KV_HEADS, 3 * BLOCK) + 1
    step = setup.step(Given(scores, frozenset({Need.ALL_QUERIES})))
    expected = setup.residents.sums.clone()  # 0 in the first holes
    for req, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        slots = setup.slots(req, head)
        expected[slots] = scores[req, head, : len(slots)]
    setup.evictor.choose_holes(LAYER, step, 0.25, LayerWeights())
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
        setup.evictor.choose_holes(LAYER, step, 0.25, LayerWeights())
    assert not waits.found
