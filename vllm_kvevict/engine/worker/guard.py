"""The one guard around code that may be a third party's: what a policy, an allocator or a budget raises ends its
request, and neither the engine nor anybody else's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from functools import partial
from typing import ParamSpec, TypeVar

from vllm_kvevict.foreign.code import apart, contained, said, with_traceback

logger = logging.getLogger("vllm.kvevict")

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Failures:
    """What such code raised first for each request, from then on until the request ends.

    The scheduler hears of it after the step, and may have sent the next one by then. Several workers may share a
    request: its failure is *known to all* when all those have heard of it that run the same batches. Until then each
    goes on as if it had not failed, but asks nothing more about it.
    """

    def __init__(self) -> None:
        self._raised: dict[str, str] = {}
        self._known_to_all: set[str] = set()

    def __contains__(self, req_id: object) -> bool:
        return req_id in self._raised

    def get(self, req_id: str) -> str | None:
        """Return what was raised for a request, None if nothing was."""
        return self._raised.get(req_id)

    @property
    def known_to_all(self) -> Set[str]:
        """The failed requests that all workers know of."""
        return self._known_to_all

    @contextmanager
    def of(self, req_ids: Iterable[str], doing: str) -> Iterator[None]:
        """Inside this context something is done for all of ``req_ids``, which fail if it raises.

        doing: what it is, for the log
        """
        with self.of_ours(req_ids, doing), apart:
            yield

    @contextmanager
    def of_ours(self, req_ids: Iterable[str], doing: str) -> Iterator[None]:
        """As ``of``, around code of ours that may find no memory: it draws nothing at random and sets no defaults."""
        with contained(partial(self._fail, req_ids, doing)):
            yield

    def _fail(self, req_ids: Iterable[str], doing: str, error: BaseException) -> None:
        failed = list(req_ids)
        _log(f"{doing} failed, and with it {', '.join(failed)}:\n{with_traceback(error)}")
        text = said(error, repr)  # the error itself would hold the tensors of its traceback
        for req_id in failed:
            self.note(req_id, text)

    def ask(
        self, req_id: str, doing: str, question: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> _T | None:
        """Return what ``question`` returns; None if it raises, or is not asked since its request has failed before."""
        if req_id not in self._raised:
            with self.of([req_id], doing):
                return question(*args, **kwargs)
        return None

    def together(self, doing: str, question: Callable[_P, object], *args: _P.args, **kwargs: _P.kwargs) -> bool:
        """Ask a question about several requests; return whether it was answered. If it raises, nobody fails by that:
        each of them is to be asked alone, and who is to blame fails then.
        """
        with contained(partial(self._log_together, doing)), apart:
            question(*args, **kwargs)
            return True
        return False

    def _log_together(self, doing: str, error: BaseException) -> None:
        _log(f"{doing} failed for several requests together, which are asked one by one:\n{with_traceback(error)}")

    def note(self, req_id: str, what: str) -> None:
        """A request has failed, if it has not before."""
        self._raised.setdefault(req_id, what)

    def all_know(self, req_ids: Iterable[str] | None = None) -> None:
        """All workers know by now which of these have failed; None: which requests of any."""
        if self._raised:
            self._known_to_all |= self._raised.keys() if req_ids is None else self._raised.keys() & set(req_ids)

    def forget(self, req_id: str) -> None:
        """A request has ended, or starts again."""
        self._raised.pop(req_id, None)
        self._known_to_all.discard(req_id)


def _log(text: str) -> None:
    """Write an error to the log. A handler that cannot write prints the errors that are being handled, one of which may
    raise when it is asked.
    """
    with contained():
        logger.error("%s", text)
