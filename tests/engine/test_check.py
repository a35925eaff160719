"""``kvevict check`` on the engines that are here, and with something made wrong on purpose: the row says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_kvevict.engine.offline.check import engines
from vllm_kvevict.engine.offline.check.__main__ import Rows, check_evicting, check_machine
from vllm_kvevict.engine.offline.check.answers import Answer
from vllm_kvevict.engine.offline.check.engines import AS_STOCK, Running, evicting, questions, running, stock_answers
from vllm_kvevict.kernels import self_test

FLAGS = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "1024", "--kv-cache-memory-bytes", str(64 << 20)]
AT_THE_END, DENSE = "eviction at the prompt's end", "logits equal dense attention over the kept tokens"
MEMORY = "memory counted equals memory held"


@pytest.mark.smoke
def test_all_is_well_here() -> None:
    """As a user runs it. Both engines are stock or evicting by their workers, and by nothing else."""
    command = [sys.executable, "-m", "vllm_kvevict", "check", "--json", "--enforce-eager"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads(done.stdout)
    rows = {row["name"]: row for row in found["rows"]}
    assert {row["verdict"] for row in rows.values()} == {"ok"}, rows
    assert "CPUWorker," in rows["stock vLLM serves"]["detail"]
    assert "EvictionCPUWorker," in rows["vLLM with eviction serves"]["detail"]
    runner = "cpu.model_runner" if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1" else "cpu_model_runner"
    assert all(
        f"vllm.v1.worker.{runner}." in rows[f"{who} serves"]["detail"] for who in ("stock vLLM", "vLLM with eviction")
    )
    assert {AS_STOCK, DENSE, MEMORY, *(f"eviction {name}" for name in engines.SCHEDULES)} <= rows.keys()
    assert {f"kernel {name}" for name in self_test.examples(torch.device("cpu"), torch.float32)} <= rows.keys()
    assert sum(row["seconds"] for row in rows.values()) < 180


@pytest.fixture(scope="module")
def stock(tiny_llama: Path) -> list[Answer]:
    with running(str(tiny_llama), None, FLAGS) as engine:
        return stock_answers(engine)


@pytest.fixture(scope="module")
def checked(tiny_llama: Path, stock: list[Answer]) -> Iterator[Running]:
    with running(str(tiny_llama), evicting(), FLAGS) as engine:
        yield engine


def verdicts(engine: Running, stock: list[Answer], tiny: Path) -> dict[str, str]:
    told: list[Any] = []
    rows = Rows(told.append)
    for name, question in questions(engine, stock, tiny).items():
        if question is not None:
            rows.ask(name, question)
    return {one["row"]: one["verdict"] for one in told if "row" in one}


def wrong(engine: Running, stock: list[Answer], tiny: Path) -> set[str]:
    return {name for name, verdict in verdicts(engine, stock, tiny).items() if verdict != "ok"}


def test_a_wrong_token_is_noticed(
    checked: Running, stock: list[Answer], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checked.worker.model_runner.get_model()
    logits = model.compute_logits
    monkeypatch.setattr(model, "compute_logits", lambda *arguments: logits(*arguments).roll(1, dims=-1))
    assert wrong(checked, stock, tiny_llama) == {AS_STOCK, DENSE}


def test_tokens_that_did_not_move_are_noticed(
    checked: Running, stock: list[Answer], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(checked.worker.eviction.pool), "move", lambda *arguments: None)
    assert wrong(checked, stock, tiny_llama) == {DENSE}


def test_a_lost_block_is_noticed(
    checked: Running, stock: list[Answer], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = checked.scheduler.kv_cache_manager.block_pool
    free, lost = pool.free_blocks, []

    def forget_one(blocks: Any, *arguments: Any, **options: Any) -> None:
        found = [*blocks]
        if checked._num_asked == before + 4 and not lost:  # the answer whose prompt is evicted at its end
            lost.append(found.pop())
        free(found, *arguments, **options)

    before = checked._num_asked
    monkeypatch.setattr(pool, "free_blocks", forget_one)
    assert wrong(checked, stock, tiny_llama) == {AT_THE_END}
    free(lost)


def test_memory_that_was_not_counted_is_noticed(
    checked: Running, stock: list[Answer], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked.worker.eviction, "forgotten", torch.zeros(1 << 17), raising=False)
    assert wrong(checked, stock, tiny_llama) == {MEMORY}


def test_without_stock_answers_that_row_is_skipped(checked: Running, tiny_llama: Path) -> None:
    assert questions(checked, [], tiny_llama)[AS_STOCK] is None
    assert DENSE not in questions(checked, [], None)


@pytest.mark.parametrize("kernel", self_test.examples(torch.device("cpu"), torch.float32))
def test_a_wrong_kernel_is_named(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = getattr(self_test, kernel)

    def spoiled(*arguments: Any) -> Any:
        result = function(*arguments)
        changed = (
            result
            if result is not None
            else next(each for each in reversed(self_test.flat(arguments)) if isinstance(each, torch.Tensor))
        )
        for tensor in changed if isinstance(changed, tuple) else (changed,):
            tensor.flatten()[:1].logical_not_() if tensor.dtype == torch.bool else tensor.view(-1)[:1].add_(1)
        return result

    monkeypatch.setattr(self_test, kernel, spoiled)
    told: list[Any] = []
    check_machine(Rows(told.append), told.append, {})
    assert [one["row"] for one in told if one.get("verdict") == "failed"] == [f"kernel {kernel}"]


@pytest.mark.parametrize("allowed", ["kvevict,another", None, "another"])
def test_whether_vllm_loads_the_plugin(allowed: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if allowed is not None:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    told: list[Any] = []
    check_machine(Rows(told.append), told.append, {})
    failed = [one["row"] for one in told if one.get("verdict") == "failed"]
    assert failed == ["vLLM finds the plugin"] * (allowed == "another")


def test_rows_that_an_engine_does_not_get_to_are_told(tmp_path: Path) -> None:
    told: list[Any] = []
    rows = Rows(told.append)
    check_evicting(rows, told.append, {"model": str(tmp_path / "nowhere"), "flags": [], "stock": None})
    found = {row["row"]: row["verdict"] for row in told if "row" in row}
    served = found.pop("vLLM with eviction serves")
    assert served == "failed" and {*found.values()} == {"skipped"}
    assert {AS_STOCK, MEMORY, *(f"eviction {name}" for name in engines.SCHEDULES)} == found.keys()
