"""Makes vLLM believe that it was installed for CUDA or ROCm and sees one GPU. Nothing can run on it.

What is faked, and all that is: NVML, or AMD SMI, and what it says of the card; vLLM's version, without ``+cpu``; the
compiled extensions, as empty modules that support nothing, and with them which versions of FlashAttention were built;
and that Triton has an active driver. Everything that decides something is vLLM's own code.
"""

from __future__ import annotations

import functools
import gc
import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
import types
from typing import Any

_CAPABILITY = [9, 0]
_MEMORY = 150 * 2**30  # bytes
_EXTENSIONS = (
    "vllm._C",
    "vllm._rocm_C",
    "vllm._C_stable_libtorch",
    "vllm._moe_C_stable_libtorch",
    "vllm.vllm_flash_attn._vllm_fa2_C",
    "vllm.vllm_flash_attn._vllm_fa3_C",
)

# what vLLM asks its extensions when it is imported
_QUESTIONS = ("cutlass_scaled_mm_supports_fp8", "cutlass_scaled_mm_supports_block_fp8")


def install(platform: str = "cuda") -> None:
    """Must be called before vLLM is imported. Is for the whole process, so for one of its own.

    platform: "cuda" or "rocm"
    """
    assert "vllm" not in sys.modules
    sys.meta_path.insert(0, _FakeModules(_SMI[platform]))
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: version(name).removesuffix("+cpu" if name == "vllm" else "")
    import torch
    from triton.backends import backends

    for name in _QUESTIONS:
        torch.library.define(f"_C::{name}", "(int cuda_device_capability) -> bool")
        torch.library.impl(f"_C::{name}", "CompositeExplicitAutograd", lambda capability: False)
    backends["nvidia" if platform == "cuda" else "amd"].driver.is_active = staticmethod(lambda: True)


def set_gpu(capability: tuple[int, int], flash_attention_4: bool = True) -> None:
    """Exchange the card, and say whether FlashAttention 4 was built beside 2 and 3. vLLM forgets all it has cached."""
    from vllm.platforms import current_platform
    from vllm.vllm_flash_attn import flash_attn_interface

    _CAPABILITY[:] = capability
    flash_attn_interface.FA4_AVAILABLE = flash_attention_4
    cached = [value for value in gc.get_objects() if type(value) is functools._lru_cache_wrapper]
    for function in cached:
        if function.__module__.startswith("vllm."):
            function.cache_clear()
    assert tuple(current_platform.get_device_capability()) == capability


class _FakeModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, smi: str) -> None:
        self._smi = smi

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        is_fake = name == self._smi or name in _EXTENSIONS
        return importlib.machinery.ModuleSpec(name, self) if is_fake else None

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ not in _EXTENSIONS:
            _FILL[module.__name__](module)


def _fill_nvml(module: Any) -> None:
    module.NVMLError = type("NVMLError", (Exception,), {})
    module.nvmlInit = module.nvmlShutdown = lambda: None
    module.nvmlDeviceGetCount = lambda: 1
    module.nvmlDeviceGetHandleByIndex = lambda index: index
    module.nvmlDeviceGetCudaComputeCapability = lambda handle: tuple(_CAPABILITY)
    module.nvmlDeviceGetName = lambda handle: "a GPU that is not there"
    module.nvmlDeviceGetUUID = lambda handle: "GPU-0"
    module.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(total=_MEMORY, free=_MEMORY, used=0)


def _fill_amdsmi(module: Any) -> None:
    """An MI300X, whose capability is (9, 4)."""
    module.AmdSmiException = type("AmdSmiException", (Exception,), {})
    module.AmdSmiMemoryType = types.SimpleNamespace(VRAM=0)
    module.amdsmi_init = module.amdsmi_shut_down = lambda: None
    module.amdsmi_get_processor_handles = lambda: [0]
    module.amdsmi_get_gpu_asic_info = lambda handle: {
        "target_graphics_version": "gfx942", "device_id": "0x74a1", "market_name": "a GPU that is not there"
    }  # fmt: skip
    module.amdsmi_get_gpu_device_uuid = lambda handle: "GPU-0"
    module.amdsmi_get_gpu_memory_total = lambda handle, kind: _MEMORY
    module.amdsmi_topo_get_link_type = module.amdsmi_topo_get_numa_node_number = lambda *handles: {}


# of each platform the module that knows the cards, and what makes up its contents
_SMI = {"cuda": "vllm.third_party.pynvml", "rocm": "amdsmi"}
_FILL = {"vllm.third_party.pynvml": _fill_nvml, "amdsmi": _fill_amdsmi}
