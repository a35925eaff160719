"""The dense model in a process of its own: vLLM changes classes of transformers when it serves a model by them."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from vllm_kvevict.engine.offline.check.dense import DenseModel


class Oracle:
    """Forked before an engine starts; the model is loaded for the first question."""

    def __init__(self, folder: Path) -> None:
        fork = multiprocessing.get_context("fork")
        self._questions, theirs = fork.Pipe()
        fork.Process(target=_answer, args=(theirs, self._questions, folder), daemon=True).start()
        theirs.close()

    def logits(self, tokens: list[int], kept: torch.Tensor | None = None) -> torch.Tensor:
        """Return what ``DenseModel.logits`` does, and raise what it raises."""
        self._questions.send((tokens, None if kept is None else kept.numpy()))
        answer = self._questions.recv()
        if isinstance(answer, Exception):
            raise answer
        return torch.from_numpy(answer)


def _answer(questions: Connection, other_end: Connection, folder: Path) -> None:
    other_end.close()  # so that this process ends with the other one
    model: DenseModel | None = None
    while True:
        try:
            tokens, kept = questions.recv()
        except EOFError:
            return
        try:
            model = model or DenseModel(folder)
            questions.send(model.logits(tokens, None if kept is None else torch.from_numpy(kept)).numpy())
        except Exception as error:  # the other process raises it
            questions.send(error)
