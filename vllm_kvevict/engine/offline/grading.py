"""Teacher-forced grades of answers, through the real engine: was each gold token the likeliest, and how likely?

The gold answer is forced token by token by a logits processor, which sees the model's own logits first. The first token
of an answer is not graded: it is computed from the full KV, whatever is evicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm import LLM, SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from vllm_kvevict.engine.offline.tasks import Example

FORCED, NAME = "forced_tokens", "forced_name"


class ForceAnswer(AdapterLogitsProcessor):
    """Makes a request say the tokens it was given, and notes what it would have said.

    seen: request name -> [vocab_size] float32 log-probabilities of each step; the engine runs in this process
    """

    seen: ClassVar[dict[str, list[torch.Tensor]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        options = params.extra_args or {}
        if FORCED not in options:
            return None
        answer, steps = options[FORCED], self.seen.setdefault(options[NAME], [])

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            steps.append(logits.float().log_softmax(-1))
            forced = torch.full_like(logits, float("-inf"))
            forced[answer[len(output_ids)]] = 0.0
            return forced

        return force


@dataclass(frozen=True)
class Grade:
    """One answer, its first token left out.

    accuracy:   share of the gold tokens that were the likeliest
    likelihood: mean log-probability of the gold tokens, nats
    exact:      1 if all of them were the likeliest
    divergence: mean KL(full KV || this) over the whole vocabulary, nats
    """

    accuracy: float
    likelihood: float
    exact: int
    divergence: float

    def quality(self, full: Grade) -> float:
        """Return the likelihood with the full KV over this one, which is 1 where nothing is lost; at most 1."""
        return min(full.likelihood / self.likelihood, 1.0) if self.likelihood < 0 else 1.0


def grade(llm: LLM, example: Example, arms: Sequence[dict[str, Any]], question_outside: bool = False) -> list[Grade]:
    """Return a grade for the full KV, then one for each arm: the options of a request.

    question_outside: end the prompt, and evict, before the question; it is then forced like the answer
    """
    prompt, forced = example.prompt, example.answer
    if question_outside:
        prompt, forced = example.context, example.question + example.answer
    gold = torch.tensor(example.answer[1:])
    (reference,) = _log_probabilities(llm, prompt, forced, [{"kv_eviction": "none"}])
    seen = [reference, *_log_probabilities(llm, prompt, forced, arms)]
    return [_grade(steps[-len(gold) :], reference[-len(gold) :], gold) for steps in seen]


def _log_probabilities(
    llm: LLM, prompt: list[int], forced: list[int], arms: Sequence[dict[str, Any]]
) -> list[torch.Tensor]:
    """Make every arm say ``forced``; return [len(forced), vocab_size] float32 for each."""
    ForceAnswer.seen.clear()
    names = [str(index) for index in range(len(arms))]
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=len(forced),
            ignore_eos=True,
            detokenize=False,
            extra_args={**arm, FORCED: forced, NAME: name},
        )
        for arm, name in zip(arms, names, strict=True)
    ]
    prompts: list[Any] = [{"prompt_token_ids": prompt}] * len(arms)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    if any(list(output.outputs[0].token_ids) != forced for output in outputs):
        raise RuntimeError("an answer was not forced")
    return [torch.stack(ForceAnswer.seen[name]) for name in names]


def _grade(steps: torch.Tensor, reference: torch.Tensor, gold: torch.Tensor) -> Grade:
    hits = steps.argmax(-1) == gold
    return Grade(
        hits.float().mean().item(),
        steps.gather(1, gold[:, None]).mean().item(),
        int(hits.all()),
        (reference.exp() * (reference - steps)).sum(-1).mean().item(),
    )
