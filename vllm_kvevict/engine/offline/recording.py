"""Run one prompt through a real engine in this process and note what its eviction saw and decided."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm import LLM, SamplingParams

from vllm_kvevict.cache.compaction import Compaction
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.offline.run import check_in_process, engine_args
from vllm_kvevict.eviction import prompt
from vllm_kvevict.eviction.prompt import Eviction
from vllm_kvevict.eviction.record import Inspection, RecordedEviction
from vllm_kvevict.eviction.traits import traits_of


def inspect_prompt(
    model: str, prompt: str | list[int], config: EvictionConfig, max_tokens: int, engine_flags: list[str]
) -> Inspection:
    """Answer one prompt greedily and return what its eviction did.

    prompt:       text, or token ids; with ids no tokenizer is loaded and the answer is ids as well
    engine_flags: further command-line flags of vLLM's engine

    Raises ValueError if the prompt was not evicted, or vLLM refuses the model, the prompt or a flag.
    """
    llm = LLM.from_engine_args(engine_args(model, isinstance(prompt, list), config, engine_flags))
    try:
        check_in_process(llm)
        _check_token_ids(llm, prompt)
        with recorded_evictions() as records:
            params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
            (output,) = llm.generate(_as_input(prompt), params, use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()
    if not records:
        raise ValueError(
            f"kv_budget: {config.budget} holds the whole prompt of {len(output.prompt_token_ids)} tokens, so nothing "
            f"was evicted and there is nothing to show; lower the budget or take a longer prompt"
        )
    completion = output.outputs[0]
    answer = completion.text or f"token ids {' '.join(map(str, completion.token_ids))}"
    return Inspection(records[0], model, config.policy, config.allocator_name, config.budget, answer)


@contextmanager
def recorded_evictions() -> Iterator[list[RecordedEviction]]:
    """Note every eviction that ends in this process while the context is open, in order.

    Wraps functions of ours, ``Eviction.choose`` with the ``select`` it calls and ``Eviction.compact``; none behaves
    differently. Copying the scores is outside of the time that an eviction reports.
    """
    records: list[RecordedEviction] = []
    kept: list[torch.Tensor] = []
    chosen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    choose, compact, select = Eviction.choose, Eviction.compact, vars(prompt)["select"]

    def noting_select(scores: torch.Tensor, num_kept: torch.Tensor, *protection: int) -> torch.Tensor:
        kept.append(select(scores, num_kept, *protection))
        return kept[-1]

    def noting_choose(eviction: Eviction) -> None:
        scores = eviction._all_scores().cpu()
        choose(eviction)
        chosen[id(eviction)] = scores, kept.pop().cpu()

    def noting_compact(eviction: Eviction) -> Compaction:
        compaction = compact(eviction)
        records.append(_record(eviction, *chosen.pop(id(eviction)), compaction))
        return compaction

    # setattr: to mypy, methods and imported names are not variables
    setattr(prompt, "select", noting_select)  # noqa: B010
    setattr(Eviction, "choose", noting_choose)  # noqa: B010
    setattr(Eviction, "compact", noting_compact)  # noqa: B010
    try:
        yield records
    finally:
        setattr(prompt, "select", select)  # noqa: B010
        setattr(Eviction, "choose", choose)  # noqa: B010
        setattr(Eviction, "compact", compact)  # noqa: B010


def _record(eviction: Eviction, scores: torch.Tensor, kept: torch.Tensor, compaction: Compaction) -> RecordedEviction:
    method, pages = eviction.method, eviction.pool.pages
    return RecordedEviction(
        scores,
        kept,
        compaction.num_pages.cpu(),
        eviction.plan,
        num_first=method.num_sink,
        num_last=max(method.num_recent, traits_of(method.policy).num_recent),
        page_bytes=pages.shape[1] * pages.element_size(),
        seconds=eviction.seconds,
    )


def _check_token_ids(llm: LLM, prompt: str | list[int]) -> None:
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    if isinstance(prompt, list) and max(prompt) >= vocabulary:
        raise ValueError(f"--prompt-tokens: expected token ids below {vocabulary}, got {max(prompt)}")


def _as_input(prompt: str | list[int]) -> Any:
    return prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
