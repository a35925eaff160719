"""The machine that a session runs on: python -m tools.gpu.machine RESULT.json

Beside names and versions, what must hold before an engine can: the plugin's entry point is found, and on a GPU vLLM's
extension computes what PyTorch does and FlashAttention 3 loads.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import machine


def describe() -> dict[str, Any]:
    found = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version_of(name) for name in ("torch", "triton", "transformers", "vllm")},
        "plugins": [entry.value for entry in entry_points(group="vllm.general_plugins")],
    }
    return {**found, **describe_gpu()} if torch.cuda.is_available() else found


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def describe_gpu() -> dict[str, Any]:
    from vllm.platforms import current_platform
    from vllm.third_party import pynvml
    from vllm.vllm_flash_attn import is_fa_version_supported

    current_platform.import_kernels()
    pynvml.nvmlInit()
    driver = pynvml.nvmlSystemGetDriverVersion()
    gate_and_up = torch.randn(64, 2048, device="cuda", dtype=torch.bfloat16)
    actual = gate_and_up.new_empty(64, 1024)
    torch.ops._C.silu_and_mul(actual, gate_and_up)
    gate, up = gate_and_up.float().chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "gpu_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        "driver": driver if isinstance(driver, str) else driver.decode(),
        "flash_attention_3": is_fa_version_supported(3),
        "extension_error": ((actual - expected).abs().max() / expected.abs().max()).item(),
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(describe()))
