"""Code that may be a third party's: which of its errors end the process, what they say, and what it must not change."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from traceback import format_exception
from types import CodeType, TracebackType
from typing import Any

import torch
from numpy.random import MT19937
from numpy.random.mtrand import get_bit_generator, set_bit_generator


def ends_process() -> bool:
    """Return whether the error that is being handled has to pass, and is no fault of the code that was called.

    That is an interrupt from the keyboard, and what a handler of signals raises, which Python calls in the middle of
    any other code: vLLM's raise SystemExit. A policy that raises SystemExit by itself ends its request, as with any
    other error.
    """
    kind, _, place = sys.exc_info()  # an error's own attributes may raise
    return kind is not None and (issubclass(kind, KeyboardInterrupt) or not _handlers().isdisjoint(_raised_in(place)))


@contextmanager
def contained(handle: Callable[[BaseException], object] = lambda error: None) -> Iterator[None]:
    """What the code inside this context raises ends here and goes to ``handle``, which may raise another error.

    What ends the process passes.
    """
    try:
        yield
    except BaseException as error:
        if ends_process():
            raise
        handle(error)


def said(error: BaseException, form: Callable[[BaseException], str] = str, longest: int | None = 1000) -> str:
    """Return what an error says, or its ``repr``; its name if it fails to, as a third party's may.

    longest: characters of the text at most, which can be sent; None: all of them
    """
    with contained():
        return form(error)[:longest].encode("utf-8", "replace").decode()
    return type(error).__name__


def with_traceback(error: BaseException) -> str:
    """Return what an error that is being handled says, and where it was raised."""
    return said(error, lambda raised: "".join(format_exception(raised)), longest=None)


class _Apart:
    """What code inside this context draws at random, or sets as torch's defaults, changes nothing outside.

    The workers of a tensor-parallel engine sample the same tokens only while their generators are in the same state,
    and each of them may ask a policy another number of times. What is drawn without a generator of one's own comes from
    a sequence that all such code shares.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._numpy = MT19937(0)
        self._states: dict[torch.Generator, torch.Tensor] = {}

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        self._defaults = torch.get_default_dtype(), torch.get_default_device()
        self._numpy_outside = get_bit_generator()
        set_bit_generator(self._numpy)
        self._outside = [(generator, generator.get_state()) for generator in _generators()]
        for generator, _ in self._outside:
            if generator in self._states:
                generator.set_state(self._states[generator])
            else:
                generator.manual_seed(0)

    def __exit__(self, *raised: Any) -> None:
        self._depth -= 1
        if self._depth:
            return
        for generator, state in self._outside:
            self._states[generator] = generator.get_state()
            generator.set_state(state)
        set_bit_generator(self._numpy_outside)
        dtype, device = self._defaults
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)  # a default slows every call down


apart = _Apart()


def _generators() -> Iterator[torch.Generator]:
    yield torch.default_generator
    if torch.cuda.is_initialized():
        yield torch.cuda.default_generators[torch.cuda.current_device()]


def _handlers() -> set[CodeType]:
    """Return the code of this process's handlers of signals."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = [getattr(handler, "__code__", None) for handler in handlers]
    return {code for code in codes if code is not None}


def _raised_in(place: TracebackType | None) -> Iterator[CodeType]:
    """Yield the code that an error has left, from the catching function on."""
    while place is not None:
        yield place.tb_frame.f_code
        place = place.tb_next
