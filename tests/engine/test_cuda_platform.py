"""What vLLM makes of eviction on CUDA: its own code, in a process where the GPU is faked. No engine starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import vllm
from transformers import Gemma3TextConfig, Gemma4TextConfig, LlamaConfig

from tests.conftest import ROOT
from vllm_kvevict import kv_eviction_args

CAPABILITIES = ("8.0", "9.0", "10.0", "12.0")
SIZES = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 512}
GEMMA = {**SIZES, "num_hidden_layers": 6, "head_dim": 256, "hidden_size_per_layer_input": 0}


def llama(head_size: int) -> Any:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head_size}
    return LlamaConfig(**SIZES, **heads, num_hidden_layers=2, architectures=["LlamaForCausalLM"])


MODELS = {
    "llama": llama(128),
    "llama with heads of 512": llama(512),
    "gemma 3": Gemma3TextConfig(**GEMMA, architectures=["Gemma3ForCausalLM"]),
    # vLLM sees the whole model so, but would need packages for images that are not here
    "gemma 3 with images": Gemma3TextConfig(**GEMMA, architectures=["Gemma3ForCausalLM"], is_mm_prefix_lm=True),
    "gemma 4": Gemma4TextConfig(**GEMMA, architectures=["Gemma4ForCausalLM"]),  # heads of 512 where it sees everything
}


@dataclass(frozen=True)
class Case:
    """An engine's arguments, the card, and the backend that its layers are to have: all of them, or by their spec."""

    expected: str | dict[str, str]
    capability: str
    model: str = "llama"
    args: dict[str, Any] = field(default_factory=dict)
    flash_attention_4: bool = True
    evicts: bool = True

    def resolved(self, folder: Path) -> dict[str, Any]:
        """Return what the program reads. Models are saved in ``folder``."""
        args = {**self.args, **(kv_eviction_args("snapkv", 128) if self.evicts else {})}
        if "speculative_config" in args:
            draft = args["speculative_config"]
            args["speculative_config"] = {**draft, "model": str(folder / draft["model"])}
        return {
            "model": str(folder / self.model),
            "args": args,
            "capability": [int(part) for part in self.capability.split(".")],
            "flash_attention_4": self.flash_attention_4,
        }

    def backend(self, spec: str) -> str:
        return self.expected if isinstance(self.expected, str) else self.expected[spec]


FLASH, TRITON = "EvictionFlashBackend", "EvictionTritonBackend"
NO_FLASH, NO_FLASHINFER, NO_PAIR = "InPlaceOfFlashAttention", "InPlaceOfFlashInfer", "InPlaceOfComposite"
REASONS = {
    NO_FLASH: "FlashAttention attends over evicted rows in its versions 2 and 3, and not with a KV cache in fp8",
    NO_FLASHINFER: "FlashInfer reads no page tables per KV head",
    NO_PAIR: "vLLM's pairs of attention backends for images read no page tables per KV head",
}
FP8 = {"kv_cache_dtype": "fp8"}


def prefer(backend: str) -> dict[str, Any]:
    return {"attention_backend": backend}


CASES = {
    "8.0": Case(FLASH, "8.0"),
    "9.0": Case(FLASH, "9.0"),
    "10.0": Case(NO_FLASHINFER, "10.0"),
    "12.0": Case(FLASH, "12.0"),
    **{
        f"{capability}, {preferred}": Case(expected, capability, args=prefer(preferred))
        for capability in CAPABILITIES
        for preferred, expected in {
            "FLASH_ATTN": NO_FLASH if capability == "10.0" else FLASH,  # there it is FlashAttention 4
            "TRITON_ATTN": TRITON,
            "FLASHINFER": NO_FLASHINFER,
        }.items()
    },
    "10.0, FLASH_ATTN, version 2": Case(FLASH, "10.0", args=prefer("FLASH_ATTN"), flash_attention_4=False),
    "9.0, version 4": Case(NO_FLASH, "9.0", args={"attention_config": {"flash_attn_version": 4}}),
    "9.0, fp8": Case(NO_FLASH, "9.0", args=FP8),
    "9.0, FLASH_ATTN, fp8": Case(NO_FLASH, "9.0", args={**FP8, **prefer("FLASH_ATTN")}),
    "10.0, fp8": Case(NO_FLASHINFER, "10.0", args=FP8),
    "12.0, fp8": Case(NO_FLASHINFER, "12.0", args=FP8),  # vLLM's FlashAttention takes no fp8 there
    "gemma 3, 9.0": Case(FLASH, "9.0", "gemma 3"),
    "gemma 3, 10.0": Case(NO_FLASHINFER, "10.0", "gemma 3"),
    "gemma 3, 10.0, FLASH_ATTN": Case(NO_FLASH, "10.0", "gemma 3", prefer("FLASH_ATTN")),
    "gemma 3, 9.0, FLASH_ATTN for one kind, fp8": Case(
        {"EvictionSpec": NO_FLASH, "PrivateSlidingWindowSpec": TRITON},
        "9.0",
        "gemma 3",
        {**FP8, "attention_config": {"backend": "TRITON_ATTN", "backend_per_kind": {"full_attention": "FLASH_ATTN"}}},
    ),
    "gemma 3 with images, 8.0": Case(NO_FLASHINFER, "8.0", "gemma 3 with images"),
    "gemma 3 with images, 9.0": Case(NO_PAIR, "9.0", "gemma 3 with images"),
    "gemma 3 with images, 10.0": Case(NO_PAIR, "10.0", "gemma 3 with images"),
    "gemma 4, 9.0": Case(NO_FLASH, "9.0", "gemma 4"),
    "gemma 4, 9.0, fp8": Case(NO_FLASH, "9.0", "gemma 4", FP8),
    "gemma 4, 9.0, no version 4": Case(TRITON, "9.0", "gemma 4", flash_attention_4=False),  # by vLLM's own choice
    "gemma 4, 10.0": Case(NO_FLASHINFER, "10.0", "gemma 4"),
    "9.0, a draft model with version 4": Case(
        NO_FLASH,
        "9.0",
        args={
            "speculative_config": {
                "method": "draft_model",
                "model": "llama with heads of 512",
                "num_speculative_tokens": 2,
            }
        },
    ),
}
REFUSED = {
    "8.0, fp8": (Case("", "8.0", args=FP8), "FP8 KV cache is not supported by the Triton attention backend"),
    "8.0, FLASH_ATTN, fp8": (
        Case("", "8.0", args={**FP8, **prefer("FLASH_ATTN")}),
        "FLASH_ATTN is not valid for this configuration. Reason: ['kv_cache_dtype not supported', 'FP8 KV cache",
    ),
    "9.0, FLEX_ATTENTION": (
        Case("", "9.0", args=prefer("FLEX_ATTENTION")),
        "--kv-eviction does not work with the attention backend FLEX_ATTENTION; use --attention-backend FLASH_ATTN or",
    ),
}
WITHOUT = {"9.0, eviction off": Case("FlashAttentionBackend", "9.0", evicts=False)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases in one process, since it takes seconds to import vLLM."""
    folder = tmp_path_factory.mktemp("cuda")
    for name, config in MODELS.items():
        config.dtype = "bfloat16"
        config.save_pretrained(folder / name)
    return configured_by({**CASES, **{name: case for name, (case, _) in REFUSED.items()}, **WITHOUT}, folder, "cuda")


def configured_by(cases: dict[str, Case], folder: Path, platform: str) -> dict[str, Any]:
    decided_here = ("TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER")
    environment = {name: value for name, value in os.environ.items() if name not in decided_here}
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.cuda_platform", str(folder / "results.json"), platform],
        input=json.dumps({name: case.resolved(folder) for name, case in cases.items()}),
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    assert found["vllm"] == vllm.__file__
    return found


def configured(results: dict[str, Any], name: str) -> dict[str, Any]:
    result: dict[str, Any] = results["cases"][name]
    assert "error" not in result, result["error"]
    return result


def said(result: dict[str, Any]) -> list[str]:
    return [warning for warning in result["warnings"] if "takes its place" in warning]


@pytest.mark.parametrize("name", CASES)
def test_every_layer_has_our_backend_and_the_log_says_once_what_was_replaced(
    results: dict[str, Any], name: str
) -> None:
    result = configured(results, name)
    backends = set()
    for backend, impl, spec in result["layers"].values():
        assert backend == CASES[name].backend(spec)
        assert impl == ("EvictionFlashImpl" if backend == FLASH else "EvictionTritonImpl")
        assert spec in ("EvictionSpec", "PrivateSlidingWindowSpec")
        backends.add(backend)
    assert ("PrivateSlidingWindowSpec" in {spec for *_, spec in result["layers"].values()}) == ("gemma" in name)
    assert result["layouts"] == ["LBHNC"]  # the one in which a page is contiguous, for all layers
    reasons = [REASONS[backend] for backend in backends if backend in REASONS]
    assert said(result) == [f"{reason}: Triton attention takes its place" for reason in reasons]


@pytest.mark.parametrize("name", CASES)
def test_worker_and_scheduler_are_ours_and_the_runner_is_v2_with_full_graphs(
    results: dict[str, Any], name: str
) -> None:
    """V1's would go on with stock attention for rows that are evicted later."""
    result = configured(results, name)
    assert result["platform"] == "cuda"
    assert result["worker"] == "vllm_kvevict.engine.worker.gpu_worker.EvictionGPUWorker"
    assert result["scheduler"] == "vllm_kvevict.engine.scheduler.scheduler.AsyncEvictionScheduler"
    assert result["is_v2"]
    assert result["block_size"] == 16
    assert result["graphs"] == {"asked": "FULL_AND_PIECEWISE", "V1": "PIECEWISE", "V2": "FULL_AND_PIECEWISE"}
    assert "not been run on a GPU" in result["warnings"][0]


@pytest.mark.parametrize("name", REFUSED)
def test_what_neither_flash_attention_nor_triton_can_do_is_refused(results: dict[str, Any], name: str) -> None:
    error = results["cases"][name]["error"]
    assert error.startswith("ValueError: ") and REFUSED[name][1] in error


def test_without_eviction_all_is_vllm_s(results: dict[str, Any]) -> None:
    (result,) = (configured(results, name) for name in WITHOUT)
    assert result["worker"] == "vllm.v1.worker.gpu_worker.Worker"
    assert result["scheduler"] == "vllm.v1.core.sched.async_scheduler.AsyncScheduler"
    assert {tuple(layer) for layer in result["layers"].values()} == {
        ("FlashAttentionBackend", "FlashAttentionImpl", "FullAttentionSpec")
    }
    assert result["graphs"] == dict.fromkeys(("asked", "V1", "V2"), "FULL_AND_PIECEWISE")
    assert not result["warnings"]


def test_no_class_of_ours_replaces_the_streams_and_events_of_torch(results: dict[str, Any]) -> None:
    """As vLLM's CPU worker does when it is imported, for the whole process."""
    assert not {name: replaced for name, replaced in results["replaced"].items() if replaced}
    assert {
        "worker.gpu_worker.EvictionGPUWorker",
        "scheduler.scheduler.AsyncEvictionScheduler",
        "worker.backends.flash.EvictionFlashBackend",
        "worker.backends.flash.EvictionFlashImpl",
        "worker.backends.flash.EvictionFlashMetadataBuilder",
        "worker.backends.triton.EvictionTritonBackend",
        "worker.backends.triton.EvictionTritonImpl",
        "worker.backends.triton.EvictionTritonMetadataBuilder",
        "scheduler.managers.EvictionSpec",
        "scheduler.managers.EvictionManager",
        "scheduler.managers.PrivateSlidingWindowSpec",
        "scheduler.managers.PrivateSlidingWindowManager",
    } <= {name.removeprefix("vllm_kvevict.engine.") for name in results["replaced"]}


@pytest.mark.more("on ROCm the worker is the same, and one attention backend takes the place of all")
@pytest.mark.feature("ROCm: vLLM's GPU worker with Triton attention, not run on a GPU", runners=("V2",))
def test_on_rocm_triton_attention_takes_the_place_of_all(tmp_path: Path) -> None:
    for name in ("llama", "gemma 3"):
        MODELS[name].dtype = "bfloat16"
        MODELS[name].save_pretrained(tmp_path / name)
    cases = {
        "any": Case("InPlaceOfROCm", "9.4"),
        "gemma 3": Case("InPlaceOfROCm", "9.4", "gemma 3"),
        "triton": Case(TRITON, "9.4", args=prefer("TRITON_ATTN")),
        "aiter": Case("InPlaceOfROCm", "9.4", args=prefer("ROCM_AITER_UNIFIED_ATTN")),
    }
    found = configured_by(cases, tmp_path, "rocm")
    for name, case in cases.items():
        result = configured(found, name)
        assert result["platform"] == "rocm"
        assert result["worker"] == "vllm_kvevict.engine.worker.gpu_worker.EvictionGPUWorker"
        assert {backend for backend, *_ in result["layers"].values()} == {case.expected}
        assert {impl for _, impl, _ in result["layers"].values()} == {"EvictionTritonImpl"}
        assert result["layouts"] == ["LBHNC"] and result["block_size"] == 16
        assert "not been run on a GPU" in result["warnings"][0]
