"""Which decode steps no graph can stand for, and which backends have one for the others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.v1.attention.backend import AttentionCGSupport

from tests.conftest import USES_V2_RUNNER
from tests.paged import make_pool
from vllm_kvevict.cache.page_table import PageTable
from vllm_kvevict.cache.plan import EvictionPlan
from vllm_kvevict.cache.request_slots import RequestSlots
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.messages import ChunkEnd, PrefillEnd, StepEvictions
from vllm_kvevict.engine.worker.step import Step

if USES_V2_RUNNER:
    from vllm_kvevict.engine.worker.backends.cpu import EvictionCPUMetadataBuilder
    from vllm_kvevict.engine.worker.backends.flash import EvictionFlashMetadataBuilder
    from vllm_kvevict.engine.worker.backends.triton import EvictionTritonMetadataBuilder
    from vllm_kvevict.engine.worker.backends.xformers import EvictionXformersMetadataBuilder
    from vllm_kvevict.engine.worker.graphs import needs_python

pytestmark = pytest.mark.skipif(not USES_V2_RUNNER, reason="full graphs are those of model runner V2")

CONFIG = EvictionConfig(policy="snapkv", budget=32)
PLAN = EvictionPlan(num_tokens=64, num_kept_blocks=2, block_size=16)
IDS = ["whole", "evicted"]


def bridge(decisions: StepEvictions | None = None) -> SimpleNamespace:
    """What a step of ``IDS`` is judged by, of a worker that knows two more requests."""
    table = PageTable.of(make_pool(2, 2, 20, 16, 32).pool, max_num_reqs=4, max_tokens=256)
    for req_id, per_token in (("evicted", False), ("replaced", True)):
        table.slots.take(req_id)
        table.shrink([req_id], [64], per_token)
    slots = RequestSlots(4)
    slots.take("remembered")
    step = Step(decisions or StepEvictions(), {})
    return SimpleNamespace(step=step, page_table=table, ring=SimpleNamespace(slots=slots))


def test_decoding_needs_no_python() -> None:
    assert not needs_python(bridge(), IDS)


@pytest.mark.parametrize("req_id", ["remembered", "replaced"])
def test_remembered_queries_and_tokens_that_are_replaced_need_it(req_id: str) -> None:
    assert needs_python(bridge(), [*IDS, req_id])


@pytest.mark.parametrize(
    "decisions",
    [
        StepEvictions(prefilling={"whole": CONFIG}),
        StepEvictions(ending={"whole": PrefillEnd(CONFIG, PLAN, None)}),
        StepEvictions(growing={"whole": 64}),
        StepEvictions(shrinking={"evicted": 64}),
        StepEvictions(chunks={"evicted": ChunkEnd(PLAN, goes_on=False)}),
    ],
    ids=["prefilling", "ending", "growing", "shrinking", "chunks"],
)
def test_requests_that_are_looked_at_need_it(decisions: StepEvictions) -> None:
    assert needs_python(bridge(decisions), IDS)
    assert not needs_python(bridge(decisions), ["someone else"])


def test_batches_that_vllm_makes_up_need_none() -> None:
    made_up = bridge(StepEvictions(growing={"whole": 64}))
    made_up.step.is_over = True
    assert not needs_python(made_up, IDS)


def test_kernels_that_read_what_is_made_anew_for_a_batch_are_in_no_graph() -> None:
    always = [EvictionFlashMetadataBuilder, EvictionTritonMetadataBuilder]
    never = [EvictionCPUMetadataBuilder, EvictionXformersMetadataBuilder]
    for is_v2 in (False, True):
        config = SimpleNamespace(use_v2_model_runner=is_v2)
        found = {builder: builder.get_cudagraph_support(config, None) for builder in always + never}
        assert {builder for builder, support in found.items() if support == AttentionCGSupport.NEVER} == {
            *never,
            *(() if is_v2 else always),
        }
