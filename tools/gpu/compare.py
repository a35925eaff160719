"""The verdict on a session: what must hold between its runs, each with the value found and its limit.

Runs whose kernels differ do not round alike, so their greedy tokens part sooner or later. From there on they answer
different texts, and nothing can be compared. So two runs agree if every request's answers part at a near tie, where
both runs find the two tokens about equally likely, and if the log-probabilities up to there are about the same.
A token that comes from wrong keys or values is seldom a near tie, and not in every request: this model's best token
leads by 0.6 on average, and by less than the limit in a quarter of the steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from tools.gpu.results import Answer, Measured, Record, Step
from tools.gpu.runs import REFERENCE, RUNS, Run

# In natural logarithms. Logits of this model reach 8 to 16, where neighbouring bfloat16 numbers are 0.0625 apart. On a
# CPU two kinds of attention, and prefill in chunks, changed the best token of 1.6 % of the steps, at leads of 0.125 at
# most, and its log-probability by 0.066 at most.
NEAR_TIE = 0.25
LOGPROB = 0.25
LEAST_COMPARED = 0.1  # of all tokens: or the two limits above say nothing
EXTENSION_ERROR = 2**-7  # two roundings to bfloat16
MOST_IN_USE = 0.5  # blocks of an evicted run to stock vLLM's; the budget is a sixth of the prompt
STOCK = "stock_eager"
AS_STOCK = (("nothing_evicted", STOCK),)
AGREE = (
    ("stock_graphs", STOCK),
    ("evicted_graphs", "evicted_eager"),
    ("evicted_triton", "evicted_eager"),
    ("evicted_v1", "evicted_eager"),
    ("evicted_core_process", "evicted_eager"),
    ("evicted_decode_graphs", "evicted_decode_eager"),
)
RUNNERS = {
    1: ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.cpu_model_runner"),
    2: ("vllm.v1.worker.gpu.model_runner", "vllm_kvevict.engine.worker.graphs"),
}
# of engines with eviction: V1's full ones would replay stock attention for evicted rows
GRAPHS = {1: "PIECEWISE", 2: "FULL_AND_PIECEWISE"}
# --attention-backend: the class that stock vLLM takes for it, and ours
BACKENDS = {
    "FLASH_ATTN": ("FlashAttentionBackend", "EvictionFlashBackend"),
    "TRITON_ATTN": ("TritonAttentionBackend", "EvictionTritonBackend"),
}
PLUGIN = "vllm_kvevict:register"


@dataclass(frozen=True)
class Check:
    """One line of the verdict. passed is None for what is reported, not judged; runs are those that it is about."""

    name: str
    value: str
    limit: str
    passed: bool | None
    runs: tuple[str, ...] = ()

    def __str__(self) -> str:
        verdict = {True: "ok", False: "FAIL", None: "report"}[self.passed]
        return f"{verdict:6} {self.name}: {self.value}" + (f" (limit: {self.limit})" if self.limit else "")


def checks(records: Mapping[str, Record], reference: Mapping[str, Record] | None = None) -> Iterator[Check]:
    """Yield every check on a session; a run that has no record fails.

    records:   of the session, by the names of their runs
    reference: of the same work on a CPU
    """
    for run in RUNS:
        record = records.get(run.name)
        status = "not run" if record is None else record.status
        yield Check(f"{run.name} ended", status, "ended", status == "ended", (run.name,))
    yield from _machines(records)
    measured = {name: record.measured for name, record in records.items() if record.measured is not None}
    for name, found in measured.items():
        yield _who_ran(records[name].run, found)
        first, second = found.passes
        yield from _same_answers(f"{name}, second pass as first", first, second, (name,))
        yield from _free_blocks(name, found, measured.get(STOCK) if records[name].run.evicts else None)
    for name, other in AS_STOCK:
        yield from _pair(name, measured.get(name), other, measured.get(other), is_exact=True)
    for name, other in AGREE:
        yield from _pair(name, measured.get(name), other, measured.get(other))
    if reference is not None:
        for name in REFERENCE:
            record = reference.get(name)
            yield from _pair(name, measured.get(name), f"{name} on CPU", record.measured if record else None)
    for name, record in records.items():
        if record.run.graphs:
            yield Check(f"{name}, kernels compiled late", ", ".join(record.compiled) or "none", "", None)
        else:
            synced = ", ".join(f"{place} x {times}" for place, times in record.synced.items())
            yield Check(f"{name}, where the CPU waited for the GPU", synced or "nowhere", "", None)


def verdict_of(name: str, found: Iterable[Check]) -> str:
    """Return "ok", or which checks on a run failed."""
    return "; ".join(check.name for check in found if name in check.runs and check.passed is False) or "ok"


def _machines(records: Mapping[str, Record]) -> Iterator[Check]:
    """Whether each machine could run an engine at all, and all ran the same files."""
    sources = {record.sources for record in records.values()}
    yield Check("states of the source files", str(len(sources)), "1", len(sources) <= 1)
    for machine in {json.dumps(record.machine): record.machine for record in records.values()}.values():
        is_found = PLUGIN in machine.get("plugins", [])
        yield Check("plugin's entry point", "found" if is_found else "missing", PLUGIN, is_found)
        if all(record.dry_run for record in records.values()):
            continue
        yield Check("GPU", machine.get("gpu", "none"), "one", "gpu" in machine)
        error = machine.get("extension_error", math.inf)
        yield Check("vLLM's extension against PyTorch", f"{error:.4f}", f"{EXTENSION_ERROR}", error <= EXTENSION_ERROR)
        loads = machine.get("flash_attention_3", False)
        yield Check("FlashAttention 3 loads", str(loads), "True", loads)


def _who_ran(run: Run, found: Measured) -> Check:
    is_ours, has_graphs = found.worker.startswith("Eviction"), found.graphs != "NONE"
    backend = found.attention if run.attention is None else BACKENDS[run.attention][is_ours]
    as_asked = (is_ours, has_graphs) == (run.policy is not None, run.graphs) and found.runner in RUNNERS[run.runner]
    as_asked = as_asked and found.attention == backend
    if is_ours and has_graphs:
        as_asked = as_asked and found.graphs == GRAPHS[run.runner]
    who = f"{found.worker}, {found.runner}, {found.attention}, graphs {found.graphs}"
    asked = (
        f"{'our' if run.policy else 'stock'} worker, V{run.runner}, {backend}, graphs {'on' if run.graphs else 'off'}"
    )
    return Check(f"{run.name}, what ran", who, asked, as_asked, (run.name,))


def _free_blocks(name: str, found: Measured, stock: Measured | None) -> Iterator[Check]:
    """Whether all blocks came back in the end and, of an evicted run, most of them before that."""
    if found.free_start is None or found.free_least is None:
        yield Check(f"{name}, free blocks", "not seen, the scheduler is in another process", "", None)
        return
    ends = f"{found.free_end} at the end, {found.free_start} at the start"
    yield Check(f"{name}, free blocks", ends, "as many", found.free_end == found.free_start, (name,))
    if stock is not None and stock.free_start is not None and stock.free_least is not None:
        used, stock_used = found.free_start - found.free_least, stock.free_start - stock.free_least
        value = f"{used} blocks, {stock_used} of {STOCK}"
        yield Check(f"{name}, most in use", value, f"{MOST_IN_USE} of them", used <= MOST_IN_USE * stock_used, (name,))


def _pair(
    name: str, found: Measured | None, other: str, wanted: Measured | None, is_exact: bool = False
) -> Iterator[Check]:
    title, runs = f"{name} as {other}", (name, other)
    if found is None or wanted is None:
        missing = name if found is None else other
        yield Check(title, f"{missing} has no answers", "both", False, runs)
    elif found.weights != wanted.weights:
        yield Check(title, f"models {found.weights} and {wanted.weights}", "one model", False, runs)
    else:
        yield from _same_answers(title, wanted.passes[0], found.passes[0], runs, is_exact)


def _same_answers(
    title: str, wanted: list[Answer], found: list[Answer], runs: tuple[str, ...], is_exact: bool = False
) -> Iterator[Check]:
    """Compare the answers to the same requests, each up to the first token that differs."""
    num_tokens = sum(map(len, wanted))
    num_same, gap, difference = 0, 0.0, 0.0
    for left, right in zip(wanted, found, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a[0][0] != b[0][0]), len(left))
        num_same += same
        difference = _most(difference, *(abs(a[0][1] - b[0][1]) for a, b in zip(left[:same], right, strict=False)))
        if same < len(left):
            gap = _most(gap, _lead(left[same], right[same][0][0]), _lead(right[same], left[same][0][0]))
    share = num_same / num_tokens
    if is_exact:
        yield Check(f"{title}, same tokens", f"{num_same} of {num_tokens}", "all", num_same == num_tokens, runs)
    else:
        yield Check(f"{title}, lead where tokens part", f"{gap:.3f}", f"{NEAR_TIE}", gap <= NEAR_TIE, runs)
        enough = share >= LEAST_COMPARED
        yield Check(f"{title}, tokens until they part", f"{share:.3f} of all", f"{LEAST_COMPARED}", enough, runs)
    value = f"{difference:.3f} at most"
    yield Check(f"{title}, log-probabilities", value, f"{LOGPROB}", difference <= LOGPROB, runs)


def _most(*values: float) -> float:
    """Return the largest value; NaN, which compares as nothing, counts as infinite."""
    return max(math.inf if math.isnan(value) else value for value in values)


def _lead(step: Step, rival: int) -> float:
    """By how much the chosen token is likelier than ``rival``; infinite if that is none of the candidates."""
    (_, chosen), *others = step
    return chosen - dict(others).get(rival, -math.inf)
