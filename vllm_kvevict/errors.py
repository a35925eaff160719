"""Errors of code that may be a third party's: which of them end the process, and what they say."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from types import CodeType


def ends_process(error: BaseException) -> bool:
    """Return whether ``error`` has to pass, and is no fault of the code that was called.

    That is an interrupt from the keyboard, and what a handler of signals raises, which Python calls in the middle of
    any other code: vLLM's raise SystemExit. A policy that raises SystemExit by itself ends its request, as with any
    other error.
    """
    return isinstance(error, KeyboardInterrupt) or not _handlers().isdisjoint(_raised_in(error))


def said(error: BaseException, form: Callable[[BaseException], str] = str) -> str:
    """Return what an error says, or its ``repr``; its name if it fails to, as a third party's may."""
    try:
        return form(error)
    except BaseException as another:
        if ends_process(another):
            raise
        return type(error).__name__


def _handlers() -> set[CodeType]:
    """Return the code of this process's handlers of signals."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = [getattr(handler, "__code__", None) for handler in handlers]
    return {code for code in codes if code is not None}


def _raised_in(error: BaseException) -> Iterator[CodeType]:
    """Yield the code that ``error`` has left, from the catching function on."""
    place = error.__traceback__
    while place is not None:
        yield place.tb_frame.f_code
        place = place.tb_next
