"""The quality studies: their prompts, their arithmetic, and their grades against a plain forward pass of the model."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.quality import study
from benchmarks.quality.study import Arm, Cell, compare, interval, run, summarise
from tests.conftest import USES_V2_RUNNER
from vllm_kvevict.engine.offline.tasks import TASKS, make_example


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


LONGER = pytest.mark.more("longer prompts of the studies are made in the same way")


@pytest.mark.parametrize("length", [512, pytest.param(1024, marks=LONGER), pytest.param(4096, marks=LONGER)])
@pytest.mark.parametrize("task", TASKS)
def test_prompts_have_their_length_and_hold_the_answer(smollm2: Path, tokenizer: Any, task: str, length: int) -> None:
    for index in range(3):
        example = make_example(smollm2, task, length, index)
        assert length - 40 < len(example.prompt) <= length
        assert len(example.answer) > 5
        answer = tokenizer.decode(example.answer[1:]).strip()
        assert tokenizer.decode(example.context).count(answer) == (2 if task == "passkey" else 1)
        assert answer not in tokenizer.decode(example.question)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_reproducible_and_differ(smollm2: Path, task: str) -> None:
    examples = [make_example(smollm2, task, 512, index) for index in range(4)]
    assert examples == [make_example(smollm2, task, 512, index) for index in range(4)]
    assert len({tuple(example.prompt) for example in examples}) == 4
    assert len({example.answer[0] for example in examples}) == 1, "the token that is not graded says nothing"


@pytest.mark.parametrize("task", TASKS)
def test_the_question_begins_where_the_context_ends(smollm2: Path, tokenizer: Any, task: str) -> None:
    example = make_example(smollm2, task, 512, 0)
    question = tokenizer.decode(example.question)
    assert question.startswith("\n\nWhat is") and "assistant" in question
    assert "assistant" not in tokenizer.decode(example.context[40:])


def test_needles_lie_at_every_depth(smollm2: Path, tokenizer: Any) -> None:
    depths = []
    for index in range(10):
        text = tokenizer.decode(make_example(smollm2, "needle_prose", 1024, index).context)
        depths.append(text.index("The code of the") / len(text))
    gaps = [b - a for a, b in zip([0, *sorted(depths)], [*sorted(depths), 1], strict=True)]
    assert max(gaps) < 0.25


def test_intervals_are_those_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(size=400)
    low, high = interval(list(values))
    error = values.std() / 20
    # the 2.5 % points of 2,000 resamples are known to about 0.06 standard errors
    assert abs(low - (values.mean() - 1.96 * error)) < 0.25 * error
    assert abs(high - (values.mean() + 1.96 * error)) < 0.25 * error
    assert interval([0.5] * 7) == (0.5, 0.5)


def graded(task: str, prompt: int, kept: float, arm: Arm, value: float) -> dict[str, Any]:
    row = {"task": task, "length": 1024, "question": "inside", "prompt": prompt}
    row |= {"policy": arm.policy, "allocator": arm.allocator, "kept": kept}
    return row | dict.fromkeys(study.METRICS, value)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_comparisons_pair_prompts_and_weigh_cells_alike(results: Path) -> None:
    base, new, rows = Arm("base", "uniform"), Arm("new", "uniform"), []
    for task, gain, prompts in (("a", 0.1, 4), ("b", 0.5, 2)):
        for prompt in range(prompts):
            for kept in (0.1, 0.2):
                rows.append(graded(task, prompt, kept, base, prompt))
                rows.append(graded(task, prompt, kept, new, prompt + gain))
    rows.append(graded("b", 9, 0.1, new, 100.0))  # the other arm has no such prompt: it does not count
    write(results / "quality_made_up_prompts.csv", rows)
    assert compare("made_up", new, base, "exact") == pytest.approx((0.3, 0.3, 0.3))
    summary = summarise("made_up")
    assert [(row["task"], row["kept"], row["policy"], row["prompts"]) for row in summary[:2]] == [
        ("a", "0.1", "base", 4),
        ("a", "0.2", "base", 4),
    ]
    assert summary[0]["accuracy"] == pytest.approx(1.5)
    assert (results / "quality_made_up.csv").exists()


@pytest.fixture(scope="module")
def llm(smollm2: Path) -> Iterator[Any]:
    from benchmarks.quality.study import grading_engine

    with grading_engine(smollm2, 1200, kv_bytes=256 << 20, dtype="float32") as llm:
        yield llm


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


@pytest.mark.skipif(USES_V2_RUNNER, reason="custom logits processors need model runner V1")
@pytest.mark.parametrize(("task", "outside"), [("needle_noise", False), ("key_value", True), ("copying", False)])
def test_grades_are_those_of_a_forward_pass_of_transformers(
    llm: Any, model: Any, smollm2: Path, task: str, outside: bool
) -> None:
    from vllm_kvevict.engine.offline.grading import grade

    example = make_example(smollm2, task, 700, 1)
    with torch.no_grad():
        logits = model(torch.tensor([example.prompt + example.answer])).logits[0, len(example.prompt) : -1]
    gold = torch.tensor(example.answer[1:])
    expected = logits.log_softmax(-1).gather(1, gold[:, None]).mean().item()
    right = logits.argmax(-1) == gold
    # everything stays, in two ways: not evicted, and evicted to a budget that holds the whole prompt
    arms = [Arm("snapkv", "uniform", 0.999), Arm("snapkv", "uniform", 0.1)]
    full, whole, evicted = grade(llm, example, [arm.options() for arm in arms], outside)
    for result in (full, whole):
        # float32 through 30 layers, in another order of summation
        assert result.likelihood == pytest.approx(expected, abs=2e-3)
        assert result.accuracy == pytest.approx(right.float().mean().item())
        assert result.exact == bool(right.all())
        assert result.divergence == pytest.approx(0.0, abs=1e-4)
    assert evicted.divergence > 0.01 and evicted.likelihood != full.likelihood


@pytest.mark.skipif(USES_V2_RUNNER, reason="custom logits processors need model runner V1")
def test_a_study_resumes(llm: Any, smollm2: Path, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    monkeypatch.setattr(study, "grading_engine", lambda *args, **kwargs: nullcontext(llm))
    cells, arms = [Cell("passkey", 512, "inside", 3)], [Arm("knorm", "uniform", 0.5)]
    run("small", cells, arms, smollm2, limit=1)
    first = (results / "quality_small_prompts.csv").read_text()
    assert len(first.splitlines()) == 1 + 2
    run("small", cells, arms, smollm2)
    text = (results / "quality_small_prompts.csv").read_text()
    assert text.startswith(first) and len(text.splitlines()) == 1 + 3 * 2
    run("small", cells, arms, smollm2)
    assert (results / "quality_small_prompts.csv").read_text() == text
