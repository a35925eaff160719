"""Random lives of requests over vLLM's block pool, without an engine: every event that is legal, in any order."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool

from vllm_kvevict.cache.plan import cdiv
from vllm_kvevict.config import AUTO, EvictionConfig
from vllm_kvevict.engine.fit import EmptyCache
from vllm_kvevict.engine.messages import StepEvictions
from vllm_kvevict.engine.scheduler.life import IllegalTransitionError, RequestLife, State
from vllm_kvevict.engine.scheduler.managers import EvictionManager, EvictionSpec

BLOCK = 4
NUM_BLOCKS = 40
LONGEST = 100
SMALL = {"num_sink": 1, "num_recent": 2}
KINDS: list[dict[str, Any]] = [
    {"policy": "streaming_llm", "budget": 12, **SMALL},
    {"policy": "streaming_llm", "budget": 0.5, **SMALL},
    {"policy": "knorm", "budget": AUTO, "calibration": {"knorm": {"alpha": 10.0, "beta": -74.0}}, **SMALL},
    {"policy": "streaming_llm", "budget": 12, "during_decode": True, **SMALL},
    {"policy": "streaming_llm", "budget": 13, "during_decode": True, "interval": 1, **SMALL},
    {"policy": "streaming_llm", "budget": 16, "during_prefill": True, **SMALL},
    {"policy": "streaming_llm", "budget": 0.4, "during_prefill": True, "during_decode": True, **SMALL},
    {"policy": "tova", "budget": 16, "during_prefill": True, "during_decode": True, "interval": 1, **SMALL},
    {"policy": "laq_deferred", "budget": 20, "policy_options": {"window": 2, "num_lookahead": 5}, **SMALL},
]
CONFIGS = [EvictionConfig.parse(kind) for kind in KINDS]
PHASES = ("prefilling", "ending", "growing", "shrinking", "chunks")


@dataclass(eq=False)
class Walker:
    """A request, as vLLM would keep it.

    num_scheduled, num_processed: tokens that are in the cache when all its steps are through, and are by now
    kept_from: first block that it holds since it was evicted, the first time
    """

    name: str
    life: RequestLife
    num_prompt: int
    num_answer: int
    answer: int = 0
    num_scheduled: int = 0
    num_processed: int = 0
    is_running: bool = False
    kept_from: int | None = None

    @property
    def num_tokens(self) -> int:
        return self.num_prompt + self.answer


@dataclass(eq=False)
class Step:
    evictions: StepEvictions
    tokens: dict[Walker, int] = field(default_factory=dict)
    stale: set[Walker] = field(default_factory=set)


class Walk:
    """One sequence of events over one cache."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.num_late = self.rng.choice([0, 0, 1, 2])
        self.cache = EmptyCache(
            NUM_BLOCKS - 1, BLOCK, LONGEST, chunk=16, num_late=self.num_late, is_shared=self.rng.random() < 0.7
        )
        spec = EvictionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
        self.pool = BlockPool(NUM_BLOCKS, enable_caching=False, hash_block_size=BLOCK)
        self.lives: dict[str, RequestLife] = {}
        self.manager = EvictionManager(
            kv_cache_spec=spec,
            block_pool=self.pool,
            enable_caching=False,
            kv_cache_group_id=0,
            scheduler_block_size=BLOCK,
        )
        self.manager.lives, self.manager.cache = self.lives, self.cache
        self.walkers: list[Walker] = []
        self.in_flight: deque[Step] = deque()
        self.num_arrived = 0

    def run(self, num_events: int) -> None:
        events = [self.arrive, self.schedule, self.schedule, self.schedule, self.process, self.preempt, self.abort]
        for _ in range(num_events):
            self.rng.choices(events, [2, 5, 5, 5, 8, 1, 0.5])[0]()
            self.check()
        for _ in range(10_000):
            if not self.walkers and not self.in_flight:
                break
            if not self.schedule():
                self.process()
            self.check()
        assert not self.walkers and self.pool.get_num_free_blocks() == NUM_BLOCKS - 1

    def arrive(self) -> None:
        num_prompt, num_answer = self.rng.randint(1, 60), self.rng.randint(1, 30)
        config = self.rng.choice(CONFIGS)
        prefill = self.cache.plan_prefill(config, num_prompt, num_prompt)
        if prefill is None or len(self.walkers) >= 4 or self.cache.longest(prefill) < num_prompt + num_answer:
            return
        name = str(self.num_arrived)
        self.num_arrived += 1
        life = self.lives[name] = RequestLife(config, config.method(), prefill)
        self.walkers.append(Walker(name, life, num_prompt, num_answer))

    def schedule(self) -> bool:
        """Whether anything was scheduled."""
        if len(self.in_flight) > self.num_late:
            return False
        step = Step(StepEvictions())
        for walker in list(self.walkers):
            if self.rng.random() < 0.9:
                self.schedule_one(walker, step)
        if step.tokens:
            self.in_flight.append(step)
        return bool(step.tokens)

    def schedule_one(self, walker: Walker, step: Step) -> None:
        life = walker.life
        if not walker.is_running:
            if any(walker in earlier.stale for earlier in self.in_flight):
                return
            prefill = self.cache.plan_prefill(life.config, walker.num_prompt, walker.num_tokens)
            assert prefill is not None
            life.start(prefill)
        # of an answer one token at a time; a step whose token is not known yet may be in flight
        num_new = walker.num_tokens - walker.num_scheduled or int(walker.answer + self.num_late < walker.num_answer)
        if walker.num_scheduled >= walker.num_tokens + (self.num_late > 0):
            return
        num_new = life.limit_chunk(walker.num_scheduled, min(num_new, self.rng.randint(1, 24)))
        if not num_new:
            return
        num_tokens = walker.num_scheduled + num_new
        if not self.allocate(walker, num_tokens, step):
            return
        walker.is_running, walker.num_scheduled = True, num_tokens
        step.tokens[walker] = num_new
        life.scheduled(walker.name, num_tokens, step.evictions)
        self.check_task(walker, step.evictions)

    def allocate(self, walker: Walker, num_tokens: int, step: Step) -> bool:
        self.manager.remove_skipped_blocks(walker.name, walker.num_processed)
        while True:
            missing = self.manager.get_num_blocks_to_allocate(
                walker.name, num_tokens, (), walker.num_scheduled, walker.num_scheduled, num_tokens
            )
            if missing <= self.pool.get_num_free_blocks():
                break
            others = [other for other in self.walkers if other.is_running and other not in step.tokens]
            if not others or (others == [walker] and not walker.is_running):
                return False
            victim = self.rng.choice(others)
            self.give_up(victim)
            if victim is walker:
                return False
        self.manager.allocate_new_blocks(walker.name, num_tokens, num_tokens)
        self.manager.num_cached_block.setdefault(walker.name, 0)
        return True

    def check_task(self, walker: Walker, evictions: StepEvictions) -> None:
        tasks = [phase for phase in PHASES if walker.name in getattr(evictions, phase)]
        assert len(tasks) <= 1
        if tasks == ["ending"]:
            end = evictions.ending[walker.name]
            assert end.plan.num_tokens == walker.num_scheduled
            assert end.fresh_block_ids is None or len(end.fresh_block_ids) == end.plan.num_full_blocks
            assert end.is_late == (walker.num_scheduled > walker.life.prefill.num_tokens)

    def process(self) -> None:
        """The workers are through with the oldest step, and a policy may have failed in it."""
        if not self.in_flight:
            return
        step = self.in_flight.popleft()
        for walker, num_new in step.tokens.items():
            evictions, life = step.evictions, walker.life
            if walker not in self.walkers or walker in step.stale:
                continue
            walker.num_processed += num_new
            expects = [phase for phase in ("ending", "chunks", "shrinking") if walker.name in getattr(evictions, phase)]
            if expects and self.rng.random() < 0.03:
                life.failed()
                self.end(walker)
                continue
            if expects:
                if expects == ["ending"] and life.config.budget == AUTO and self.rng.random() < 0.5:
                    plan = evictions.ending[walker.name].plan
                    life.adopt(replace(plan, num_kept_blocks=self.rng.randint(1, plan.num_kept_blocks)))
                life.evicted()
            if walker.num_processed == walker.num_tokens:
                walker.answer += 1
                if walker.answer == walker.num_answer:
                    self.end(walker)

    def preempt(self) -> None:
        running = [walker for walker in self.walkers if walker.is_running]
        if running:
            self.give_up(self.rng.choice(running))

    def give_up(self, walker: Walker) -> None:
        self.free(walker)
        walker.life.preempted()
        walker.num_scheduled = walker.num_processed = 0
        walker.is_running = False
        for step in self.in_flight:
            if walker in step.tokens:
                step.stale.add(walker)

    def abort(self) -> None:
        if self.walkers:
            self.end(self.rng.choice(self.walkers))

    def end(self, walker: Walker) -> None:
        self.free(walker)
        self.walkers.remove(walker)
        self.lives.pop(walker.name).finished()

    def free(self, walker: Walker) -> None:
        self.pool.free_blocks(reversed(self.manager.pop_blocks_for_free(walker.name)))

    def check(self) -> None:
        owner: dict[int, str] = {}
        for walker in self.walkers:
            life, blocks = walker.life, self.manager.req_to_blocks.get(walker.name, [])
            held = [block for block in [*blocks, *life.fresh_blocks] if block is not self.pool.null_block]
            for block in held:
                assert block.block_id not in owner, f"{block} is {owner[block.block_id]}'s and {walker.name}'s"
                owner[block.block_id] = walker.name
            assert (life.state is State.EVICTING) == (life.num_pending > 0)
            assert life.state is not State.DECODING or life.has_prefilled
            if walker.is_running:
                assert len(held) <= self.cache.num_held(life.prefill, walker.num_scheduled)
                self.check_kept(walker, len(held))
        assert len(owner) + self.pool.get_num_free_blocks() == NUM_BLOCKS - 1

    def check_kept(self, walker: Walker, num_held: int) -> None:
        """A request that keeps its answer holds the budget of its prompt and all of its answer, resumed or not."""
        life = walker.life
        is_decided = life.state is State.DECODING and life.evictions and not life.to_free
        if not is_decided or life.prefill.evicts_answer or life.config.budget == AUTO:
            return
        kept_from = cdiv(walker.num_scheduled, BLOCK) - num_held
        if walker.kept_from is None:
            walker.kept_from = kept_from
        # a prompt that was cut into chunks keeps a block less of its last full one, and chunks fall as they may
        assert abs(kept_from - walker.kept_from) <= life.prefill.between_chunks


MORE = pytest.mark.more("other random sequences")


@pytest.mark.more_on_v2("the scheduler does not know the runner")
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=MORE) for part in range(1, 4))])
def test_no_sequence_of_events_loses_a_block(part: int) -> None:
    for seed in range(2500 * part, 2500 * (part + 1)):
        try:
            Walk(seed).run(60)
        except (AssertionError, RuntimeError) as error:
            raise AssertionError(f"sequence {seed}: {error!r}") from error


@pytest.mark.parametrize("lost", ["preempted", "evicted"])
def test_an_event_that_is_lost_is_noticed(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RequestLife, lost, lambda life: None)
    with pytest.raises((IllegalTransitionError, AssertionError)):
        for seed in range(200):
            Walk(seed).run(60)


def test_an_illegal_transition_is_an_error() -> None:
    config = CONFIGS[0]
    prefill = Walk(0).cache.plan_prefill(config, 40, 40)
    assert prefill is not None
    life = RequestLife(config, config.method(), prefill)
    with pytest.raises(IllegalTransitionError, match="a request that is waiting cannot become preempted"):
        life.preempted()
    with pytest.raises(IllegalTransitionError, match="a request that is waiting waits for no eviction"):
        life.evicted()
    with pytest.raises(IllegalTransitionError, match="a step ends at 41 tokens, an eviction was due at 40"):
        life.scheduled("0", 41, StepEvictions())
