"""What requests ask for beside an answer: adapters, beams, a grammar, a stream, a stop string."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import BeamSearchParams, RequestOutputKind, StructuredOutputsParams

from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt
from tests.tiny_lora import make_adapter
from tests.tiny_tokenizer import build_tiny_tokenizer

PROMPT = random_prompt(333, seed=1)
WHOLE = {"kv_eviction": "none"}


@pytest.fixture(scope="module")
def running(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    settings = {
        "tokenizer": str(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))),
        "skip_tokenizer_init": False,
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        "enable_lora": True,
        # one slot stays empty: vLLM's LoRA on CPU gives a base model's rows in a mixed batch what is in the last one
        "max_loras": 3,
        "max_lora_rank": 8,
    }
    fields = {"calibration": {"snapkv": {"alpha": 10.0, "beta": -74.0}}}
    with engine(tiny_llama, budget=96, fields=fields, **settings) as started:
        started.poison_unowned_memory()
        yield started


@pytest.mark.feature("structured output")
def test_structured_output(running: Engine) -> None:
    schema = {
        "type": "object",
        "properties": {"place": {"enum": ["lighthouse", "harbour"]}, "code": {"type": "integer", "maximum": 99}},
        "required": ["place", "code"],
        "additionalProperties": False,
    }
    grammar = StructuredOutputsParams(json=schema)
    evictions = running.num_evictions
    free, *bound = (
        running.generate([PROMPT], max_tokens=60, structured_outputs=wanted, extra_args=options, ignore_eos=False)[0]
        for wanted, options in ((None, {}), (grammar, {}), (grammar, WHOLE))
    )
    assert running.num_evictions == evictions + 2
    with pytest.raises(json.JSONDecodeError):
        json.loads(free.outputs[0].text)
    for output in bound:
        fact = json.loads(output.outputs[0].text)
        assert fact["place"] in ("lighthouse", "harbour") and isinstance(fact["code"], int)
    running.check_all_free()


@pytest.mark.feature("streaming and stop strings")
def test_streams_and_stop_strings(running: Engine) -> None:
    evictions = running.num_evictions
    (whole,) = running.generate([PROMPT], max_tokens=24)
    text = whole.outputs[0].text
    running.add(PROMPT, max_tokens=24, output_kind=RequestOutputKind.DELTA)
    parts = []
    while running.llm.llm_engine.has_unfinished_requests():
        parts += [output.outputs[0].text for output in running.step()]
    assert "".join(parts) == text
    assert len(parts) == 24
    stop = text[20:23]
    (stopped,) = running.generate([PROMPT], max_tokens=24, stop=[stop])
    assert stopped.outputs[0].finish_reason == "stop"
    assert stopped.outputs[0].text == text[: text.index(stop)]
    assert running.num_evictions == evictions + 3
    running.check_all_free()


@pytest.mark.feature("beam search")
def test_beam_search(running: Engine) -> None:
    """Every step of a beam is a request of one token, which is not evicted: nothing would read what is kept."""
    evictions = running.num_evictions
    (output,) = running.llm.beam_search([{"prompt_token_ids": PROMPT}], BeamSearchParams(beam_width=2, max_tokens=5))
    assert running.num_evictions == evictions
    beams = [sequence.tokens[len(PROMPT) :] for sequence in output.sequences]
    assert beams == whole_beams(running, width=2, num_tokens=5)
    running.check_all_free()


def whole_beams(running: Engine, width: int, num_tokens: int) -> list[list[int]]:
    """Return the best beams of a search that nothing is evicted from, best first."""
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    for _ in range(num_tokens):
        outputs = running.generate(
            [PROMPT + beam for beam, _ in beams], max_tokens=1, logprobs=2 * width, extra_args=WHOLE
        )
        grown = [
            ([*beam, token], total + entry.logprob)
            for (beam, total), output in zip(beams, outputs, strict=True)
            for token, entry in output.outputs[0].logprobs[0].items()
        ]
        beams = sorted(grown, key=lambda candidate: candidate[1], reverse=True)[:width]
    return [beam for beam, _ in beams]


@pytest.mark.feature("LoRA")
@pytest.mark.parametrize("options", [{}, {"kv_budget": "auto"}], ids=str)
def test_two_adapters_and_the_base_model_in_one_batch(
    tiny_llama: Path, running: Engine, tmp_path: Path, options: dict[str, Any]
) -> None:
    paths = [make_adapter(tiny_llama, tmp_path / name, seed) for seed, name in enumerate(("red", "blue"))]
    adapters = [None, *(LoRARequest(path.name, index, str(path)) for index, path in enumerate(paths, start=1))]
    cases = [(random_prompt(length, seed=9), adapter) for length in (333, 450) for adapter in adapters]

    def answers(*batch: Any) -> list[list[int]]:
        for index, (prompt, adapter) in enumerate(batch):
            params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, extra_args=options)
            running.llm.llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, params, lora_request=adapter)
        outputs = running.run()
        return [list(outputs[str(index)].outputs[0].token_ids) for index in range(len(batch))]

    alone = [answers(case)[0] for case in cases]
    evictions = running.num_evictions
    running.max_running = 0
    assert answers(*cases) == alone
    assert running.max_running == len(cases)
    assert running.num_evictions == evictions + len(cases)
    assert len(set(map(tuple, alone))) == len(cases)
    running.check_all_free()
