"""The verdict on a GPU session, on made-up results: all is well, and each way in which it is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tools.gpu.__main__ import main
from tools.gpu.compare import BACKENDS, GRAPHS, LOGPROB, NEAR_TIE, Check, checks, verdict_of
from tools.gpu.results import RESULTS, Answer, Measured, Record, append, read
from tools.gpu.runs import REFERENCE, RUNS, Run

MACHINE = {"gpu": "GPU", "plugins": ["vllm_kvevict:register"], "extension_error": 0.003, "flash_attention_3": True}
RUNNERS = {1: "vllm.v1.worker.gpu_model_runner", 2: "vllm.v1.worker.gpu.model_runner"}
Records = dict[str, Record]


def answer(lead: float = 1.0, shift: float = 0.0) -> Answer:
    """Ten steps whose chosen token is ahead of token 2 by ``lead``."""
    return [[(1, -1.0 + shift), (2, -1.0 + shift - lead), (3, -9.0)] for _ in range(10)]


def parted(text: Answer, step: int, token: int = 2, lead: float = 1.0) -> Answer:
    """Another run's text that takes ``token`` at ``step``, ahead of what ``text`` has there, and goes its own way."""
    return [*text[:step], [(token, -1.0), (text[step][0][0], -1.0 - lead)], *([[(7, -1.0), (8, -2.0)]] * (9 - step))]


def measured(run: Run) -> Measured:
    return Measured(
        worker="Worker" if run.policy is None else "EvictionGPUWorker",
        runner=RUNNERS[run.runner],
        graphs=GRAPHS[run.runner] if run.graphs else "NONE",
        attention=BACKENDS[str(run.attention)][run.policy is not None],
        peak_gib=1.0,
        weights="abc",
        build_s=1.0,
        start_s=10.0,
        step_ms=5.0,
        total_s=1.0,
        free_start=None if run.core_process else 100,
        free_least=None if run.core_process else 80 if run.evicts else 20,
        free_end=None if run.core_process else 100,
        passes=[[answer(), answer()], [answer(), answer()]],
    )


def session() -> Records:
    """A session in which all is well."""
    return {run.name: Record(run, "ended", 30.0, False, "command", MACHINE, "s", measured(run)) for run in RUNS}


def changed(records: Records, name: str, **fields: Any) -> Records:
    """The same session, but for what one of its engines has measured."""
    found = records[name].measured
    assert found is not None
    return {**records, name: replace(records[name], measured=replace(found, **fields))}


def answers(records: Records, name: str, *texts: Answer) -> Records:
    return changed(records, name, passes=[list(texts), list(texts)])


def failed(records: Records, reference: Records | None = None) -> list[str]:
    return [check.name for check in checks(records, reference) if check.passed is False]


def test_a_good_session_passes() -> None:
    assert failed(session()) == []
    assert failed(session(), session()) == []


def test_the_runs_stand_in_the_order_of_their_importance() -> None:
    assert [run.name for run in RUNS][:4] == ["stock_eager", "nothing_evicted", "evicted_eager", "evicted_decode_eager"]
    assert {run.name for run in RUNS} >= set(REFERENCE)


@pytest.mark.parametrize("status", ["failed", "timed out", "not started"])
def test_a_run_that_did_not_end_fails_and_so_do_its_comparisons(status: str) -> None:
    records = session()
    records["evicted_v1"] = replace(records["evicted_v1"], status=status, measured=None)
    assert failed(records) == ["evicted_v1 ended", "evicted_v1 as evicted_eager"]
    del records["evicted_v1"]
    assert failed(records) == ["evicted_v1 ended", "evicted_v1 as evicted_eager"]


def test_one_other_token_where_nothing_is_evicted_fails_even_at_a_tie() -> None:
    records = answers(session(), "stock_eager", answer(lead=0.0), answer())
    records = answers(records, "stock_graphs", answer(lead=0.0), answer())
    records = answers(records, "nothing_evicted", parted(answer(lead=0.0), 9, lead=0.0), answer())
    assert failed(records) == ["nothing_evicted as stock_eager, same tokens"]


@pytest.mark.parametrize(
    ("lead", "other_lead", "is_tie"),
    [
        pytest.param(NEAR_TIE, NEAR_TIE, True, id="near in both"),
        pytest.param(2 * NEAR_TIE, 0.0, False, id="far in the first"),
        pytest.param(0.0, 2 * NEAR_TIE, False, id="far in the second"),
    ],
)
def test_tokens_may_part_at_a_near_tie_only(lead: float, other_lead: float, is_tie: bool) -> None:
    text = answer(lead)
    records = session()
    for run in RUNS:
        if run.policy == "snapkv" and run.evicts:
            records = answers(records, run.name, answer(), text)
    records = answers(records, "evicted_triton", answer(), parted(text, 5, lead=other_lead))
    expected = [] if is_tie else ["evicted_triton as evicted_eager, lead where tokens part"]
    assert failed(records) == expected


def test_a_token_that_the_other_run_does_not_even_consider_fails() -> None:
    records = answers(session(), "evicted_graphs", answer(), parted(answer(), 5, token=99, lead=0.0))
    assert failed(records) == ["evicted_graphs as evicted_eager, lead where tokens part"]


def test_answers_that_part_at_once_prove_nothing() -> None:
    text = answer(lead=0.0)
    records = answers(session(), "evicted_decode_eager", text, text)
    records = answers(records, "evicted_decode_graphs", parted(text, 0, lead=0.0), parted(text, 1, lead=0.0))
    assert failed(records) == ["evicted_decode_graphs as evicted_decode_eager, tokens until they part"]


def test_the_same_tokens_with_other_probabilities_fail() -> None:
    records = answers(session(), "evicted_v1", answer(shift=-2 * LOGPROB), answer())
    assert failed(records) == ["evicted_v1 as evicted_eager, log-probabilities"]


@pytest.mark.parametrize("name", ["nothing_evicted", "evicted_v1"])
def test_probabilities_that_are_no_numbers_fail(name: str) -> None:
    records = answers(session(), name, answer(shift=float("nan")), answer())
    assert f"{name}, second pass as first, log-probabilities" in failed(records)


def test_runs_of_different_files_are_no_session() -> None:
    records = session()
    records["stock_eager"] = replace(records["stock_eager"], sources="other")
    assert failed(records) == ["states of the source files"]


def test_a_second_pass_that_answers_otherwise_fails() -> None:
    records = changed(session(), "evicted_decode_eager", passes=[[answer()] * 2, [answer(), parted(answer(), 5)]])
    assert failed(records) == ["evicted_decode_eager, second pass as first, lead where tokens part"]


def test_blocks_that_do_not_come_back_fail() -> None:
    assert failed(changed(session(), "evicted_eager", free_end=99)) == ["evicted_eager, free blocks"]


def test_an_evicted_run_that_holds_as_many_blocks_as_stock_fails() -> None:
    assert failed(changed(session(), "evicted_graphs", free_least=20)) == ["evicted_graphs, most in use"]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"runner": RUNNERS[1]}, id="fell back to V1"),
        pytest.param({"worker": "Worker"}, id="stock worker"),
        pytest.param({"graphs": "NONE"}, id="without graphs"),
        pytest.param({"graphs": "PIECEWISE"}, id="without full graphs"),
        pytest.param({"attention": "EvictionTritonBackend"}, id="another attention backend"),
    ],
)
def test_an_engine_that_is_not_what_was_asked_for_fails(fields: dict[str, str]) -> None:
    assert failed(changed(session(), "evicted_graphs", **fields)) == ["evicted_graphs, what ran"]


@pytest.mark.parametrize(
    ("found", "name"),
    [
        ({"plugins": []}, "plugin's entry point"),
        ({"extension_error": 0.5}, "vLLM's extension against PyTorch"),
        ({"flash_attention_3": False}, "FlashAttention 3 loads"),
    ],
)
def test_a_machine_that_cannot_run_an_engine_fails(found: dict[str, Any], name: str) -> None:
    records = {run: replace(record, machine={**MACHINE, **found}) for run, record in session().items()}
    assert failed(records) == [name]


def test_a_session_without_a_gpu_passes_only_as_a_dry_run() -> None:
    machine = {"plugins": MACHINE["plugins"]}
    records = {name: replace(record, machine=machine) for name, record in session().items()}
    assert "GPU" in failed(records)
    assert failed({name: replace(record, dry_run=True) for name, record in records.items()}) == []


def test_the_cpu_s_answers_are_a_reference() -> None:
    reference = answers(session(), "evicted_eager", parted(answer(), 5), answer())
    assert failed(session(), reference) == ["evicted_eager as evicted_eager on CPU, lead where tokens part"]
    other_model = changed(session(), "evicted_eager", weights="other")
    assert failed(session(), other_model) == ["evicted_eager as evicted_eager on CPU"]


def test_waits_and_late_compilation_are_reported_where_vllm_looks_for_them() -> None:
    records = session()
    for name in ("evicted_eager", "evicted_graphs"):
        records[name] = replace(records[name], synced={"rows.py:1": 3}, compiled=["kernel"])
    lines = [str(check) for check in checks(records) if check.value in ("rows.py:1 x 3", "kernel")]
    assert lines == [
        "report evicted_eager, where the CPU waited for the GPU: rows.py:1 x 3",
        "report evicted_graphs, kernels compiled late: kernel",
    ]
    assert failed(records) == []


def test_a_check_is_a_line_with_value_limit_and_verdict() -> None:
    assert str(Check("blocks", "3", "4", True)) == "ok     blocks: 3 (limit: 4)"
    assert str(Check("blocks", "5", "4", False)) == "FAIL   blocks: 5 (limit: 4)"


def test_a_run_s_verdict_names_its_failed_checks() -> None:
    found = list(checks(changed(session(), "evicted_eager", free_end=99)))
    assert verdict_of("evicted_eager", found) == "evicted_eager, free blocks"
    assert verdict_of("stock_eager", found) == "ok"


def write(records: Records, folder: Path) -> str:
    for record in records.values():
        append(folder / RESULTS, record)
    return str(folder / RESULTS)


def test_results_are_read_as_they_were_written_and_later_ones_count(tmp_path: Path) -> None:
    path = Path(write(session(), tmp_path))
    assert [str(check) for check in checks(read([path]))] == [str(check) for check in checks(session())]
    append(path, replace(session()["evicted_v1"], status="failed", measured=None))
    assert read([path])["evicted_v1"].status == "failed"


@pytest.mark.parametrize(
    ("edit", "status"),
    [(lambda records: records, 0), (lambda records: changed(records, "evicted_eager", free_end=99), 1)],
    ids=["good", "blocks missing"],
)
def test_compare_exits_with_the_verdict(
    edit: Callable[[Records], Records], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", write(edit(session()), tmp_path)]) == status
    assert f"{status} of " in capsys.readouterr().out.splitlines()[-1]
