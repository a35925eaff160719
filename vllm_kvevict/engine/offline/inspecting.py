"""Run one prompt through a real engine in this process and note what its eviction saw and decided."""

from __future__ import annotations

from typing import Any

from vllm import LLM, SamplingParams

from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.offline.run import check_in_process, engine_args
from vllm_kvevict.eviction.record import Inspection, recorded_evictions


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


def _check_token_ids(llm: LLM, prompt: str | list[int]) -> None:
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    if isinstance(prompt, list) and max(prompt) >= vocabulary:
        raise ValueError(f"--prompt-tokens: expected token ids below {vocabulary}, got {max(prompt)}")


def _as_input(prompt: str | list[int]) -> Any:
    return prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
