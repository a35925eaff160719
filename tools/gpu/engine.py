"""One engine of a GPU session, in this process: python -m tools.gpu.engine SETTINGS.json RESULT.json MODEL

What every request asks for is the same in all runs: greedy tokens, and the log-probabilities of the best candidates.
The requests are served twice, together. The first pass pays for what is compiled late; the second is timed.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams

from tools.gpu.model import build_model
from tools.gpu.results import Answer, Measured
from tools.gpu.runs import CANDIDATES, Run, Work
from vllm_kvevict import kv_eviction_args

PASSES = 2
MAX_NUM_REQS = 64


class Engine:
    """An engine as ``run`` wants it, its free blocks watched where its scheduler is in this process."""

    def __init__(self, run: Run, work: Work, model: Path) -> None:
        self.work = work
        eviction: dict[str, Any] = {}
        if run.policy is not None:
            budget = work.budget if run.evicts else work.longest + work.block_size
            eviction = kv_eviction_args(run.policy, budget, during_decode=run.during_decode)
        graphs: dict[str, Any] = {"enforce_eager": not run.graphs}
        if run.compile_backend is not None:
            graphs["compilation_config"] = {"backend": run.compile_backend}
        if run.attention is not None:
            graphs["attention_backend"] = run.attention
        self.llm = LLM(
            str(model),
            skip_tokenizer_init=True,
            seed=0,
            gpu_memory_utilization=0.3,
            max_model_len=work.longest + work.block_size,
            max_num_seqs=MAX_NUM_REQS,
            max_num_batched_tokens=work.batch_tokens,
            block_size=work.block_size,
            num_gpu_blocks_override=work.num_blocks,
            enable_prefix_caching=False,
            **graphs,
            **eviction,
        )
        core = getattr(self.llm.llm_engine.engine_core, "engine_core", None)
        self.block_pool = None if core is None else core.scheduler.kv_cache_manager.block_pool
        self.free_least = self.free_start = self.num_free_blocks

    @property
    def num_free_blocks(self) -> int | None:
        """Blocks of the pool that are free; None if the scheduler is in another process."""
        return None if self.block_pool is None else int(self.block_pool.get_num_free_blocks())

    def serve(self, prompts: list[list[int]]) -> tuple[list[Answer], list[float], float]:
        """Answer all prompts at once; return the answers, the seconds of the steps in which all decode, and of all."""
        engine = self.llm.llm_engine
        params = SamplingParams(
            temperature=0.0, max_tokens=self.work.answer, ignore_eos=True, detokenize=False, logprobs=CANDIDATES
        )
        for index, prompt in enumerate(prompts):
            engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
        answers: dict[int, Answer] = {}
        steps: list[float] = []
        start = last = time.perf_counter()
        was_decoding = False
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            if outputs:  # the asynchronous scheduler's first step has none
                is_decoding = len(outputs) == len(prompts)
                if is_decoding and was_decoding:
                    steps.append(now - last)
                last, was_decoding = now, is_decoding
            answers |= {int(output.request_id): answer_of(output) for output in outputs if output.finished}
            self._watch()
        return [answers[index] for index in range(len(prompts))], steps, time.perf_counter() - start

    def _watch(self) -> None:
        free = self.num_free_blocks
        if free is not None and self.free_least is not None:
            self.free_least = min(self.free_least, free)


def answer_of(output: Any) -> Answer:
    """Return every step of a finished request."""
    (completion,) = output.outputs
    steps = []
    for token, candidates in zip(completion.token_ids, completion.logprobs, strict=True):
        rivals = sorted((-entry.logprob, other) for other, entry in candidates.items() if other != token)
        steps.append([(token, candidates[token].logprob), *((other, -negative) for negative, other in rivals)])
    return steps


def describe_worker(worker: Any) -> dict[str, Any]:
    """Return who does the work; runs in the worker's process."""
    worker = getattr(worker, "worker", worker)
    groups = [group for groups in worker.model_runner.attn_groups for group in groups]
    return {
        "worker": type(worker).__name__,
        "runner": type(worker.model_runner).__module__,
        "graphs": worker.vllm_config.compilation_config.cudagraph_mode.name,
        "attention": ", ".join(sorted({group.backend.__name__ for group in groups})),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
    }


def random_prompts(work: Work) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [work.prompt + work.longer_by * index for index in range(work.num_requests)]
    return [torch.randint(3, work.vocab_size, (length,), generator=generator).tolist() for length in lengths]


def measure(run: Run, work: Work, model: Path) -> Measured:
    """Start the engine, serve the work ``PASSES`` times and end it."""
    start = time.perf_counter()
    checksum = build_model(work, model)
    built = time.perf_counter()
    engine = Engine(run, work, model)
    started = time.perf_counter()
    prompts = random_prompts(work)
    passes = []
    for _ in range(PASSES):
        answers, steps, total = engine.serve(prompts)
        passes.append(answers)
    (worker,) = engine.llm.collective_rpc(describe_worker)
    return Measured(
        **worker,
        weights=checksum,
        build_s=built - start,
        start_s=started - built,
        step_ms=1e3 * statistics.median(steps),
        total_s=total,
        free_start=engine.free_start,
        free_least=engine.free_least,
        free_end=engine.num_free_blocks,
        passes=passes,
    )


def main(settings: str, result: str, model: str) -> None:
    read = json.loads(Path(settings).read_text())
    measured = measure(Run(**read["run"]), Work(**read["work"]), Path(model))
    Path(result).write_text(json.dumps(asdict(measured)))
    print({name: value for name, value in asdict(measured).items() if name != "passes"}, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
