"""Steps that vLLM's worker makes up by itself: nothing is evicted in them, and a lost decision elsewhere is an error.

The CPU platform never runs the warm-up of a GPU worker. Here it does, through Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.cpu_worker import CPUWorker

from tests.conftest import USES_V2_RUNNER
from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt
from vllm_kvevict.engine.messages import STEP, StepEvictions
from vllm_kvevict.engine.worker.step import Step

PROMPTS = [random_prompt(length, seed=length) for length in (40, 333)]


def warm_up(worker: Any) -> list[tuple[dict[str, int], list[list[int]]]]:
    """Run vLLM's own warm-up; return the tokens of each step, and what it sampled."""
    from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup, warmup_kernels

    steps: list[tuple[dict[str, int], list[list[int]]]] = []
    scheduled: list[dict[str, int]] = []

    def execute(output: SchedulerOutput) -> Any:
        scheduled.append(output.num_scheduled_tokens)
        return worker.execute_model(output)

    def sample(grammar_output: Any) -> Any:
        output = worker.sample_tokens(grammar_output)
        sampled = output.get_output() if hasattr(output, "get_output") else output
        steps.append((scheduled[-1], [list(tokens) for tokens in sampled.sampled_token_ids]))
        return output

    warmup_kernels(worker.model_runner, execute, sample)
    assert run_mixed_prefill_decode_warmup(worker.model_runner, execute, sample, num_tokens=48)
    return steps


@contextmanager
def warmed_up(model: Path, policy: str | None, drafts: bool) -> Iterator[Any]:
    steps, compile_or_warm_up = [], CPUWorker.compile_or_warm_up_model
    sampling = SamplingParams.for_sampler_warmup()
    sampling.seed = 0
    sampling.top_k, sampling.top_p = 0, 1.0  # the interpreter does not carry vLLM's kernel for them

    def with_kernels(worker: CPUWorker) -> Any:
        times = compile_or_warm_up(worker)
        steps.extend(warm_up(worker))
        return times

    speculation = {"method": "draft_model", "model": str(model), "num_speculative_tokens": 2} if drafts else None
    settings = {"max_num_seqs": 4, "speculative_config": speculation, "enable_prefix_caching": False}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SamplingParams, "for_sampler_warmup", lambda: sampling)
        patched.setattr(CPUWorker, "compile_or_warm_up_model", with_kernels)
        with engine(model, policy, budget=96, **settings) as running:
            yield running, steps


@pytest.mark.skipif(not USES_V2_RUNNER, reason="the warm-up of model runner V2, which is the one with such steps")
@pytest.mark.parametrize("drafts", [False, True], ids=["", "with a draft model"])
def test_the_warm_up_of_a_gpu_worker_runs_as_in_stock_vllm(tiny_llama: Path, drafts: bool) -> None:
    with warmed_up(tiny_llama, None, drafts) as (running, stock_steps):
        stock = running.tokens(PROMPTS, max_tokens=4)
    with warmed_up(tiny_llama, "snapkv", drafts) as (running, steps):
        assert all(not len(bridge.page_table) for bridge in running.bridges)
        whole = running.tokens(PROMPTS, max_tokens=4, extra_args={"kv_eviction": "none"})
        assert running.num_evictions == 0
        running.tokens(PROMPTS, max_tokens=4)
        assert running.num_evictions == 1
        running.check_all_free()
    assert len(steps) > 3
    assert steps == stock_steps
    assert whole == stock


@pytest.fixture(scope="module")
def running(tiny_llama: Path) -> Iterator[Engine]:
    with engine(tiny_llama, budget=96) as started:
        yield started


def test_dummy_batches_sleep_and_wake_up_need_no_decisions(running: Engine) -> None:
    """In the middle of an answer of an evicted request, as with data parallelism where another engine has work."""
    (alone,) = running.tokens([PROMPTS[1]])
    name = running.add(PROMPTS[1])
    for _ in range(4):
        running.step()
    for call in ("execute_dummy_batch", "sleep", "wake_up"):
        running.llm.collective_rpc(call)
    assert list(running.run()[name].outputs[0].token_ids) == alone
    running.check_all_free()


def test_a_dummy_batch_finds_no_step_that_did_not_end(running: Engine) -> None:
    """A drafter's ends when tokens are sampled, and in a step without tokens none are."""
    running.bridge.step = Step(StepEvictions(), {})
    running.worker.execute_dummy_batch()
    assert running.bridge.step.is_over


def test_a_step_that_lost_its_decisions_is_an_error(running: Engine) -> None:
    """Also after a warm-up: what it may do without is not what steps may do without."""
    running.worker.compile_or_warm_up_model()
    lost = SchedulerOutput.make_empty()
    assert not hasattr(lost, STEP)
    with pytest.raises(AttributeError, match=STEP):
        running.worker.execute_model(lost)
