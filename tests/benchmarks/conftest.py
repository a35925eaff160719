"""A small model for whole runs of scripts, and a folder for what they write."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import timing
from benchmarks.quality import bench_auto, bench_policies, bench_schedules, study
from tests.tiny_llama import tiny_llama_config


@pytest.fixture(scope="module")
def model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama that takes SmolLM2's tokens and lengths."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    tokenizer, config = AutoTokenizer.from_pretrained(smollm2), tiny_llama_config()
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 8192
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    shutil.copy(timing.RESULTS / "calibration.json", folder)
    for module in (timing, study, bench_auto, bench_policies, bench_schedules):
        monkeypatch.setattr(module, "RESULTS", folder)
    return folder
