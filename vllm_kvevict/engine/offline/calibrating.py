"""Measures what prompts lose with a part of them kept: the points that a calibration is fitted to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tqdm import tqdm
from vllm import LLM, SamplingParams

from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.offline.grading import ForceAnswer, grade
from vllm_kvevict.engine.offline.run import check_in_process, engine_args
from vllm_kvevict.engine.offline.tasks import TASKS, make_example
from vllm_kvevict.engine.worker.likelihood import STRIDE


@dataclass(frozen=True)
class Point:
    """One prompt with a part of it kept.

    kept:    fraction of the prompt
    nll:     mean negative log-likelihood of the prompt, nats per token, of those tokens that a server looks at
    quality: log-likelihood of the answer with all of the prompt over the one with this part of it, at most 1
    """

    task: str
    index: int
    kept: float
    nll: float
    quality: float


def measure(
    model: str, policy: str, num_tokens: int, num_prompts: int, fractions: list[float], engine_flags: list[str]
) -> list[Point]:
    """Return a point for each of the first prompts of every task and each fraction.

    num_tokens:   length of the prompts
    num_prompts:  of each task
    engine_flags: further command-line flags of vLLM's engine

    Raises ValueError if vLLM refuses the model or a flag.
    """
    config = EvictionConfig.parse({"policy": policy, "budget": fractions[0]})
    lengths = ["--max-model-len", str(num_tokens + 64), "--no-enable-prefix-caching"]
    args = engine_args(model, True, config, [*lengths, *engine_flags])
    args.logits_processors = [*(args.logits_processors or []), ForceAnswer]
    llm = LLM.from_engine_args(args)
    try:
        check_in_process(llm)
        examples = [(task, index) for index in range(num_prompts) for task in TASKS]
        points = []
        for task, index in tqdm(examples, unit="prompt"):
            example = make_example(model, task, num_tokens, index)
            nll = prompt_nll(llm, example.prompt)
            full, *parts = grade(llm, example, [{"kv_budget": kept} for kept in fractions])
            for kept, part in zip(fractions, parts, strict=True):
                points.append(Point(task, index, kept, nll, part.quality(full)))
    finally:
        llm.llm_engine.engine_core.shutdown()
    return points


def prompt_nll(llm: LLM, prompt: list[int]) -> float:
    """Return the mean negative log-likelihood of a prompt by vLLM's own prompt log-probabilities, nats."""
    options: dict[str, Any] = {"kv_eviction": "none"}
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, extra_args=options)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    seen = output.prompt_logprobs or []
    places = range(STRIDE // 2, len(prompt) - 1, STRIDE)
    found = [seen[place + 1][prompt[place + 1]].logprob for place in places]
    return -sum(found) / len(found)
