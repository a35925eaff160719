"""What happens to an evicted request while its answer grows, on a GPU as on the CPU: the same bits everywhere."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.gpu import HAS_GPU, on_gpu
from tests.paged import make_pool, random_kv, scrambled_blocks
from vllm_kvevict.budgets.lava import Lava
from vllm_kvevict.cache.page_table import PageTable
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.plan import plan_eviction
from vllm_kvevict.cache.query_ring import QueryRing
from vllm_kvevict.cache.residents import Residents
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.per_token import TokenEvictor
from vllm_kvevict.eviction.prompt import Eviction
from vllm_kvevict.eviction.resident import ResidentEvictions
from vllm_kvevict.eviction.schedule import DuringDecode, Schedule
from vllm_kvevict.kernels.expand_page_table import BatchRows
from vllm_kvevict.policies import POLICIES
from vllm_kvevict.policies.inputs import LayerWeights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")]

LAYERS, KV_HEADS, GROUP, HEAD_SIZE, BLOCK_SIZE, SCALE = 2, 2, 2, 16, 16, 0.25
PROMPT, ANSWER, WINDOW, REQUEST = 300, 20, 32, "request"


def request() -> tuple[PagePool, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A prompt in its pages, the blocks of prompt and answer, all queries, and keys and values of the answer."""
    generator = torch.Generator().manual_seed(0)
    num_blocks = -(-(PROMPT + ANSWER) // BLOCK_SIZE)
    cache = make_pool(LAYERS, KV_HEADS, num_blocks + 3, BLOCK_SIZE, HEAD_SIZE, "interleaved", "LBHNC")
    block_ids = scrambled_blocks(cache, num_blocks, generator)
    cache.write(*random_kv(LAYERS, KV_HEADS, PROMPT, HEAD_SIZE, generator), block_ids[: -(-PROMPT // BLOCK_SIZE)])
    queries = torch.randn(LAYERS, PROMPT + ANSWER, KV_HEADS * GROUP, HEAD_SIZE, generator=generator)
    return cache.pool, block_ids, queries, torch.randn(2, ANSWER, LAYERS, KV_HEADS, HEAD_SIZE, generator=generator)


def evict_prompt(
    method: Method, per_token: bool, pool: PagePool, block_ids: torch.Tensor, queries: torch.Tensor
) -> tuple[Eviction, PageTable, Residents]:
    plan = plan_eviction(PROMPT, 0.4, BLOCK_SIZE, method.min_tokens, during_decode=True)
    plan = replace(plan, per_token=per_token)
    blocks = block_ids[: plan.num_blocks]
    eviction = Eviction(method, plan, pool, blocks)
    for layer in range(LAYERS):
        eviction.score_layer(layer, queries[layer, PROMPT - WINDOW : PROMPT], SCALE)
    compaction = eviction.finish()
    table, residents = PageTable.of(pool, 2, PROMPT + ANSWER), Residents(pool)
    table.add([REQUEST], compaction.pages, [plan], [eviction.full_block_ids])
    eviction.alone.note(residents, [None])
    return eviction, table, residents


def write(pool: PagePool, layer: int, block: torch.Tensor, position: int, kv: torch.Tensor) -> None:
    """Put the keys and values [2, num_kv_heads, head_size] of a token where vLLM would."""
    pages = pool.layer_page_ids(layer, block)
    pool.keys[pages, position % BLOCK_SIZE], pool.values[pages, position % BLOCK_SIZE] = kv


def token_by_token(
    pool: PagePool, block_ids: torch.Tensor, queries: torch.Tensor, answer: torch.Tensor
) -> list[torch.Tensor]:
    device = pool.pages.device
    method = Method(POLICIES.get("morphkv")(), Lava(), 4, WINDOW, Schedule(during_decode=DuringDecode.BY_TOKEN))
    eviction, table, residents = evict_prompt(method, True, pool, block_ids, queries)
    ring = QueryRing(torch.zeros(LAYERS, 2, 64, *queries.shape[2:], dtype=queries.dtype, device=device))
    ring.slots.take(REQUEST)
    where = ring.to_write([REQUEST], np.array([0, WINDOW]), torch.tensor([PROMPT], device=device))
    for layer in range(LAYERS):
        ring.write(layer, queries[layer, PROMPT - WINDOW : PROMPT], where)
    evictor = TokenEvictor(
        pool, table, residents, ring, torch.zeros(2, LAYERS, KV_HEADS, dtype=torch.int64, device=device)
    )
    evictor.open_holes([REQUEST], eviction.next_victims[None])
    holes = []
    for step in range(ANSWER):
        num_tokens = torch.tensor([PROMPT + step + 1], device=device)
        block = block_ids[(PROMPT + step) // BLOCK_SIZE]
        remembered = ring.to_write([REQUEST], np.array([0, 1]), num_tokens)
        replacement = evictor.prepare(evictor.peers(method, [REQUEST]), num_tokens, PROMPT + step + 1, block[None])
        for layer in range(LAYERS):
            write(pool, layer, block, PROMPT + step, answer[:, step, layer])
            evictor.fill_holes(layer, replacement)
            ring.write(layer, queries[layer, PROMPT + step, None], remembered)
        evictor.choose_holes(replacement, [SCALE] * LAYERS, [LayerWeights()] * LAYERS)
        holes.append(replacement.holes)
    (pages,) = table.expand([(_step(table, block_ids), PROMPT + ANSWER)])
    expanded = [part for layer in range(LAYERS) for part in pages.of(layer)]
    return [torch.stack(holes), *expanded]


def block_by_block(
    pool: PagePool, block_ids: torch.Tensor, queries: torch.Tensor, answer: torch.Tensor
) -> list[torch.Tensor]:
    method = Method(POLICIES.get("snapkv")(), Lava(), 4, WINDOW, Schedule(during_decode=DuringDecode.BY_BLOCK))
    _, table, residents = evict_prompt(method, False, pool, block_ids, queries)
    for step in range(ANSWER):
        for layer in range(LAYERS):
            write(pool, layer, block_ids[(PROMPT + step) // BLOCK_SIZE], PROMPT + step, answer[:, step, layer])
    tables = (*table.rows([REQUEST], [PROMPT + ANSWER], [block_ids]), table.num_full_pages([REQUEST]))
    eviction = ResidentEvictions(method, [PROMPT + ANSWER], [ANSWER], pool, residents, *tables)
    for layer in range(LAYERS):
        last, chunk = queries[None, None, layer, -WINDOW:], queries[None, None, layer, -ANSWER:]
        eviction.score_layers(range(layer, layer + 1), last, chunk, [SCALE], [LayerWeights()])
    eviction.compact()
    table.shrink([REQUEST], [PROMPT + ANSWER])
    return [*table.rows([REQUEST], [PROMPT + ANSWER], [block_ids]), residents.positions]


def _step(table: PageTable, block_ids: torch.Tensor) -> BatchRows:
    device = block_ids.device
    slots = torch.tensor([table.slots[REQUEST]], dtype=torch.int32, device=device)
    seq_lens = torch.full_like(slots, PROMPT + ANSWER)
    return BatchRows(torch.zeros_like(slots), slots, seq_lens, block_ids[None].to(torch.int32))


@pytest.mark.parametrize("grow", [token_by_token, block_by_block], ids=lambda function: function.__name__)
def test_a_gpu_evicts_from_an_answer_as_the_cpu_does(grow: Callable[..., list[torch.Tensor]]) -> None:
    cpu, gpu = request(), request()
    expected, actual = grow(*cpu), on_gpu(grow)(*gpu)
    assert all(one.equal(other) for one, other in zip(actual, expected, strict=True))
    assert gpu[0].pages.view(torch.int32).equal(cpu[0].pages.view(torch.int32))
