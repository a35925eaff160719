"""A program: what engines would be on CUDA or ROCm, by vLLM's own code on a platform that ``tests.fake_cuda`` fakes.

Reads a list of cases from its standard input and writes to the file that it is given, both JSON; behind it may stand
the platform, "cuda" or "rocm". Of each case it makes
the configuration, then the attention layers as our worker's ``load_model`` makes them, without weights, and asks vLLM
what would come of them. No engine starts.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests import fake_cuda

# what vLLM's module for CPU workers replaces in torch, for the whole process
REPLACED = {
    f"{owner.__name__}.{name}": (owner, name, getattr(owner, name))
    for owner, names in (
        (torch, ("Event",)),
        (torch.cuda, ("Event", "Stream", "current_stream", "stream")),
        (torch.accelerator, ("synchronize", "empty_cache", "get_memory_info")),
        (torch.Tensor, ("pin_memory", "record_stream")),
    )
    for name in names
}
REPLACING_MODULE = "vllm.v1.worker.cpu.shm"

fake_cuda.install(*sys.argv[2:])

import vllm  # noqa: E402
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.layers.attention import Attention  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.utils.import_utils import resolve_obj_by_qualname  # noqa: E402
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts  # noqa: E402
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry  # noqa: E402
from vllm.v1.worker.utils import customize_attention_spec  # noqa: E402

from vllm_kvevict import register  # noqa: E402


def replaced() -> list[str]:
    """Return what was replaced in torch, and the module that does it if it is loaded."""
    found = [name for name, (owner, attribute, own) in REPLACED.items() if getattr(owner, attribute) is not own]
    return found + ([REPLACING_MODULE] if REPLACING_MODULE in sys.modules else [])


class Classes:
    """Every class that a configuration names, by its full name, and what had been replaced once it was imported."""

    def __init__(self) -> None:
        self.replaced: dict[str, list[str]] = {"vLLM's configuration": replaced()}

    def note(self, found: type | str) -> Any:
        """Import a class if need be, and return it."""
        cls = resolve_obj_by_qualname(found) if isinstance(found, str) else found
        self.replaced.setdefault(f"{cls.__module__}.{cls.__name__}", replaced())
        return cls


def build_layers(vllm_config: VllmConfig) -> None:
    """In place of ``Worker.load_model``: the attention layers of the model and of its draft model, and nothing else."""
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    models = {"model": vllm_config.model_config} | ({} if draft is None else {"draft_model": draft})
    torch.set_default_dtype(vllm_config.model_config.dtype)
    with set_current_vllm_config(vllm_config):
        for name, model in models.items():
            for layer in range(model.model_arch_config.total_num_hidden_layers):
                build_layer(vllm_config, model, layer, f"{name}.layers.{layer}.self_attn.attn")
    torch.set_default_dtype(torch.float32)


def build_layer(vllm_config: VllmConfig, model: ModelConfig, layer: int, prefix: str) -> None:
    arch, text_config = model.model_arch_config[layer], model.hf_text_config
    layer_types = getattr(text_config, "layer_types", None) or ["full_attention"] * arch.total_num_hidden_layers
    window = text_config.sliding_window if layer_types[layer] == "sliding_attention" else None
    Attention(
        arch.total_num_attention_heads,
        arch.head_size,
        arch.head_size**-0.5,
        arch.total_num_kv_heads,
        cache_config=vllm_config.cache_config,
        per_layer_sliding_window=window,
        prefix=prefix,
    )


def graph_modes(vllm_config: VllmConfig, builders: list[tuple[Any, Any]]) -> dict[str, str]:
    """Return what vLLM's two model runners make of the graph mode, for these (builder class, cache spec)."""
    modes, use_v2 = {"asked": vllm_config.compilation_config.cudagraph_mode.name}, VllmConfig.use_v2_model_runner
    for runner in ("V1", "V2"):
        VllmConfig.use_v2_model_runner = property(lambda self, is_v2=runner == "V2": is_v2)
        supports = [builder.get_cudagraph_support(vllm_config, spec) for builder, spec in builders]
        support = min(supports, key=lambda s: s.value)
        VllmConfig.use_v2_model_runner = use_v2
        compilation_config = copy.copy(vllm_config.compilation_config)
        mode = compilation_config.resolve_cudagraph_mode_and_sizes(
            support,
            "ours",
            uniform_decode_query_len=1 + vllm_config.num_speculative_tokens,
            use_v2_model_runner=runner == "V2",
            max_num_reqs=vllm_config.scheduler_config.max_num_seqs,
        )
        modes[runner] = mode.name
    return modes


class _Runner:
    """As far as memory beside the KV cache is concerned, on a device without any."""

    device = torch.device("meta")

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._vllm_config = vllm_config

    def get_model(self) -> nn.Module:
        return nn.Module()

    get_draft_model = get_model

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """As vLLM's runners do it."""
        layers = self._vllm_config.compilation_config.static_forward_context
        return {
            name: customize_attention_spec(layer.get_attn_backend(), layer.get_kv_cache_spec(self._vllm_config))
            for name, layer in layers.items()
        }


def configure(case: dict[str, Any], classes: Classes) -> dict[str, Any]:
    fake_cuda.set_gpu(tuple(case["capability"]), case["flash_attention_4"])
    vllm_config = EngineArgs(case["model"], skip_tokenizer_init=True, **case["args"]).create_engine_config()
    worker_class = classes.note(vllm_config.parallel_config.worker_cls)
    scheduler = vllm_config.scheduler_config.get_scheduler_cls()
    worker = worker_class.__new__(worker_class)
    worker.vllm_config = vllm_config
    worker.model_runner = _Runner(vllm_config)
    worker.load_model()
    layers, specs = vllm_config.compilation_config.static_forward_context, worker.get_kv_cache_spec()
    backends = {layer.get_attn_backend() for layer in layers.values()}
    builders = [(layer.get_attn_backend().get_builder_cls(), specs[name]) for name, layer in layers.items()]
    managers = {KVCacheSpecRegistry.get_manager_class(spec) for spec in specs.values()}
    impls = {type(layer.impl) for layer in layers.values()}
    for cls in [scheduler, *backends, *impls, *map(type, specs.values()), *managers, *(cls for cls, _ in builders)]:
        classes.note(cls)
    return {
        "platform": current_platform.device_name,
        "worker": vllm_config.parallel_config.worker_cls,
        "scheduler": f"{scheduler.__module__}.{scheduler.__name__}",
        "is_v2": vllm_config.use_v2_model_runner,
        "block_size": vllm_config.cache_config.block_size,
        "graphs": graph_modes(vllm_config, builders),
        "layers": {
            name: [layer.get_attn_backend().__name__, type(layer.impl).__name__, type(specs[name]).__name__]
            for name, layer in layers.items()
        },
        "layouts": [layout.name for layout in get_supported_kv_cache_layouts(backends)],
    }


def main() -> None:
    warnings: list[str] = []

    def note_warning(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            warnings.append(record.getMessage())
        return True

    logging.getLogger("vllm.kvevict").addFilter(note_warning)  # vLLM may exchange handlers
    register()
    from vllm.v1.worker.gpu_worker import Worker

    Worker.load_model = lambda self: build_layers(self.vllm_config)
    classes, results = Classes(), {}
    for name, case in json.load(sys.stdin).items():
        warnings.clear()
        try:
            results[name] = configure(case, classes)
        except Exception as error:  # one case does not hide the others
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        results[name]["warnings"] = list(warnings)
    found = {"vllm": vllm.__file__, "cases": results, "replaced": classes.replaced}
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
