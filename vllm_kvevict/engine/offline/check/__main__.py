"""One part of ``kvevict check``, in a process of its own: what it finds goes line by line, as JSON, to an open file.

Arguments: the part, a JSON object of what it must know, and the number of the open file.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

import torch

Tell = Callable[[Mapping[str, Any]], None]
_PACKAGES = ("vllm-kvevict", "vllm", "torch", "triton", "transformers")
_PLUGIN = "vllm_kvevict:register"
_TINY_FLAGS = ["--kv-cache-memory-bytes", str(64 << 20), "--max-model-len", "1024"]


class Rows:
    """Tells what was found, row by row: first that it begins, so that a row is named in which the process dies."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._told: set[str] = set()

    def ask(self, name: str, question: Callable[[], str]) -> None:
        """Answer a row."""
        self._tell({"begins": name})
        start = time.perf_counter()
        try:
            verdict, detail = "ok", question()
        except AssertionError as error:
            verdict, detail = "failed", str(error)
        except Exception as error:
            verdict, detail = "failed", f"{type(error).__name__}: {error}"
        self.say(name, verdict, detail, time.perf_counter() - start)

    def say_if_missing(self, name: str, verdict: str, detail: str) -> None:
        """Tell a row that was not told yet."""
        if name not in self._told:
            self.say(name, verdict, detail)

    def say(self, name: str, verdict: str, detail: str, seconds: float = 0.0) -> None:
        """Tell a row that needs no question."""
        self._told.add(name)
        self._tell({"row": name, "verdict": verdict, "detail": detail, "seconds": round(seconds, 2)})


def check_machine(rows: Rows, tell: Tell, known: Mapping[str, Any]) -> None:
    """What is installed, and every kernel against its definition."""
    from vllm_kvevict.engine.versions import check_version
    from vllm_kvevict.kernels.self_test import compare, examples

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    tell({"machine": {"python": sys.version.split()[0], "device": name} | {one: _version(one) for one in _PACKAGES}})

    def supported() -> str:
        check_version()
        return f"vLLM {version('vllm')}"

    rows.ask("vLLM is a supported one", supported)
    rows.ask("vLLM finds the plugin", _plugin)
    _say_compiled(rows, device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    for kernel, example in examples(device, dtype).items():

        def as_defined(example: Any = example) -> str:
            compare(example)
            return f"as its definition, on {device.type}"

        rows.ask(f"kernel {kernel}", as_defined)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _plugin() -> str:
    from vllm.plugins import DEFAULT_PLUGINS_GROUP

    found = [plugin.value for plugin in entry_points(group=DEFAULT_PLUGINS_GROUP)]
    allowed = os.environ.get("VLLM_PLUGINS")
    if _PLUGIN not in found:
        raise AssertionError(f"expected {_PLUGIN} among vLLM's plugins, got {found}; install the package")
    if allowed is not None and "kvevict" not in allowed.split(","):
        raise AssertionError(f"VLLM_PLUGINS: expected kvevict in it, got {allowed!r}")
    return _PLUGIN


def _say_compiled(rows: Rows, device: torch.device) -> None:
    from vllm_kvevict.kernels import native

    found = {"cpu": native.library, "cuda": native.cuda_library}
    missing = [kind for kind, library in found.items() if kind in ("cpu", device.type) and library() is None]
    slower = {"cpu": "torch's definitions run in their place, slower", "cuda": "Triton's run in their place"}
    if missing:
        detail = "; ".join(f"{kind}: not compiled, {slower[kind]}" for kind in missing)
        rows.say("compiled kernels", "warning", detail)
    else:
        rows.say("compiled kernels", "ok", " and ".join(kind for kind in found if kind in ("cpu", device.type)))


def check_stock(rows: Rows, tell: Tell, known: Mapping[str, Any]) -> None:
    """Stock vLLM's answers, to compare with."""
    from vllm_kvevict.engine.offline.check.engines import described, running, stock_answers

    def serves() -> str:
        with running(_model(known), None, _flags(known)) as engine:
            tell({"stock": [asdict(answer) for answer in stock_answers(engine)]})
            return described(engine)

    rows.ask("stock vLLM serves", serves)


def check_evicting(rows: Rows, tell: Tell, known: Mapping[str, Any]) -> None:
    """An engine that evicts."""
    from vllm_kvevict.engine.offline.check.answers import Answer
    from vllm_kvevict.engine.offline.check.engines import (
        described,
        evicting,
        names_of_questions,
        questions,
        refused_policies,
        running,
    )

    model = _model(known)
    stock = [Answer(one["tokens"], [_by_token(step) for step in one["steps"]]) for one in known["stock"] or []]

    def serves() -> str:
        with running(model, evicting(), _flags(known)) as engine:
            for name, question in questions(engine, stock, Path(model) if known["model"] is None else None).items():
                if question is None:
                    rows.say(name, "skipped", "stock vLLM did not answer")
                else:
                    rows.ask(name, question)
            _say_refused(rows, refused_policies(engine))
            return described(engine)

    rows.ask("vLLM with eviction serves", serves)
    for name in names_of_questions(known["model"] is None):
        rows.say_if_missing(name, "skipped", "the engine did not get so far")


def _say_refused(rows: Rows, refused: Mapping[str, str]) -> None:
    reasons = [f"{', '.join(name for name in refused if refused[name] == why)}: {why}" for why in {*refused.values()}]
    detail = f"all but {'; '.join(sorted(reasons))}" if refused else "all"
    rows.say("policies that the model allows", "warning" if refused else "ok", detail)


def _by_token(step: Mapping[str, float]) -> dict[int, float]:
    return {int(token): logprob for token, logprob in step.items()}


def _model(known: Mapping[str, Any]) -> str:
    """Return the user's model, or the folder of the tiny one, built if it is not there."""
    from vllm_kvevict.engine.offline.check.tiny_llama import build_tiny_llama

    if known["model"] is not None:
        model: str = known["model"]
        return model
    folder = Path(known["folder"]) / "tiny_llama"
    if not folder.exists():
        build_tiny_llama(folder, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    return str(folder)


def _flags(known: Mapping[str, Any]) -> list[str]:
    if known["model"] is not None:
        return ["--max-model-len", "-1", *known["flags"]]  # as many tokens as fit into the memory
    return [*_TINY_FLAGS, "--dtype", "bfloat16" if torch.cuda.is_available() else "float32", *known["flags"]]


PARTS = {"machine": check_machine, "stock": check_stock, "evicting": check_evicting}


def main(part: str, known: str, file: str) -> None:
    """Run one part."""
    with os.fdopen(int(file), "w") as found:

        def tell(what: Mapping[str, Any]) -> None:
            found.write(json.dumps(what) + "\n")
            found.flush()

        PARTS[part](Rows(tell), tell, json.loads(known))
        tell({"done": part})


if __name__ == "__main__":
    main(*sys.argv[1:])
