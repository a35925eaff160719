"""What a third party's code raises never ends a process, what ends one passes."""

import io
import logging
import os
import signal
import sys
from dataclasses import dataclass
from functools import partial
from types import FrameType

import numpy as np
import pytest
import torch

from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.worker.guard import Failures
from vllm_kvevict.foreign.code import contained, ends_process, said
from vllm_kvevict.policies import POLICIES, EvictionPolicy


def quit_process(number: int, frame: FrameType | None = None) -> None:
    raise SystemExit(f"signal {number}")


class Owner:
    def quit_process(self, number: int, frame: FrameType | None) -> None:
        quit_process(number)


@pytest.fixture(params=[quit_process, lambda number, frame: quit_process(number), Owner().quit_process])
def handler(request):
    before = signal.signal(signal.SIGTERM, request.param)
    yield
    signal.signal(signal.SIGTERM, before)


def test_what_a_handler_of_signals_raises_passes(handler):
    failures = Failures()
    with pytest.raises(SystemExit, match="signal 15"), failures.of(["a"], "scoring"):
        os.kill(os.getpid(), signal.SIGTERM)
        sum(range(1000))
    assert "a" not in failures


def test_an_interrupt_passes():
    failures = Failures()
    with pytest.raises(KeyboardInterrupt), failures.of(["a"], "scoring"):
        raise KeyboardInterrupt  # as Python's own handler of SIGINT, which is no Python code
    assert "a" not in failures


class Refusal(BaseException):
    """No Exception."""


@pytest.mark.parametrize(
    "raised", [SystemExit(3), GeneratorExit(), Refusal("no"), StopIteration()], ids=lambda raised: type(raised).__name__
)
def test_whatever_else_is_raised_is_a_failure(handler, raised):
    failures = Failures()
    with failures.of(["a"], "scoring"):
        raise raised
    assert failures.get("a") == repr(raised)


def test_a_failure_may_become_another_error():
    def refuse(error: BaseException) -> None:
        raise ValueError(f"refused: {said(error)}") from None

    with pytest.raises(ValueError, match="refused: no"), contained(refuse):
        raise Refusal("no")
    with contained(refuse):
        pass


def test_a_function_that_is_no_handler_now_is_a_failure(handler):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    failures = Failures()
    with failures.of(["a"], "scoring"):
        quit_process(15)
    assert failures.get("a") == "SystemExit('signal 15')"


def test_handlers_without_code_are_none_of_the_raised():
    before = signal.signal(signal.SIGTERM, partial(print, "signal"))
    try:
        try:
            raise ValueError("no")
        except ValueError:
            assert not ends_process()
    finally:
        signal.signal(signal.SIGTERM, before)


class Mute(Exception):
    def __str__(self) -> str:
        sys.exit("nothing to say")


class Liar(Exception):
    @property
    def __traceback__(self):
        raise ZeroDivisionError

    @property
    def __class__(self):
        raise ZeroDivisionError


def test_an_error_that_quits_when_it_is_asked_is_named():
    assert said(Mute()) == "Mute"


@pytest.mark.parametrize("can_log", [True, False])
def test_an_error_that_lies_about_itself_is_a_failure(can_log, monkeypatch):
    failures, stream = Failures(), io.StringIO()
    monkeypatch.setattr(logging.getLogger("vllm.kvevict"), "handlers", [logging.StreamHandler(stream)])
    if not can_log:
        stream.close()  # as a pipe to a collector of logs may be
    with failures.of(["a"], "scoring"):
        raise Liar
    assert failures.get("a") == "Liar()"
    assert not can_log or "scoring failed, and with it a:\nLiar" in stream.getvalue()


def test_what_an_error_says_can_be_sent():
    assert said(ValueError("cannot read weights-\udcff.pt")) == "cannot read weights-?.pt"
    assert said(ValueError("x" * 10**6)) == "x" * 1000


def outside() -> list:
    """What code of a third party must not change, as far as an engine depends on it."""
    drawn = [torch.random.get_rng_state().tolist(), np.random.get_state()[1].tolist(), np.random.get_state()[2]]
    return [*drawn, torch.get_default_dtype(), torch.get_default_device()]


def draw() -> tuple[float, float]:
    return torch.rand(()).item(), np.random.rand()


@pytest.mark.parametrize("fails", [False, True])
def test_third_parties_draw_and_set_defaults_for_themselves(fails):
    torch.manual_seed(1)  # theirs begin with 0
    np.random.seed(1)
    before, failures, drawn = outside(), Failures(), []
    for _ in range(3):
        with failures.of(["a"], "scoring"):
            drawn.append(draw())
            torch.set_default_dtype(torch.float64)
            torch.set_default_device("meta")
            if fails:
                raise ValueError
    assert outside() == before
    assert len({*drawn, draw()}) == 4, "a sequence of their own, which goes on"
    before = outside()
    with failures.of(["a"], "scoring"), failures.of(["a"], "within"):
        torch.manual_seed(0)
        np.random.seed(0)
    assert outside() == before


def test_a_policy_that_quits_when_it_is_built_is_refused(monkeypatch):
    @dataclass(frozen=True)
    class Quitting(EvictionPolicy):
        def __post_init__(self) -> None:
            sys.exit("this file is missing")

        def score(self, inputs):
            return inputs.query

        def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
            return 0

    monkeypatch.setitem(POLICIES._classes, "quitting", Quitting)
    with pytest.raises(ValueError, match=r"quitting.*this file is missing"):
        EvictionConfig(policy="quitting", budget=64).method()
