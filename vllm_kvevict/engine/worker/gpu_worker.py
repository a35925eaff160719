"""vLLM's GPU worker with eviction, on CUDA and ROCm. Not run on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention

from vllm_kvevict.engine.worker.backends.cuda import check_backends, cuda_backends
from vllm_kvevict.engine.worker.side_memory import SideMemory
from vllm_kvevict.engine.worker.worker import EvictionWorkerMixin


class EvictionGPUWorker(EvictionWorkerMixin):
    """Eviction on vLLM's GPU worker, with model runner V1 or V2."""

    def _make_model_runner(self) -> Any:
        if not self.use_v2_model_runner:
            return super()._make_model_runner()
        from vllm_kvevict.engine.worker.graphs import EvictionModelRunner  # which imports model runner V2

        return EvictionModelRunner(self.vllm_config, self.device)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with cuda_backends(self.vllm_config):
            super().load_model(*args, **kwargs)
        check_backends(get_layers_from_vllm_config(self.vllm_config, Attention).values())
        self.take_memory()

    def memory_left(self) -> tuple[int, int]:
        torch.accelerator.empty_cache()
        free, _ = torch.accelerator.get_memory_info(self.device)
        return free, int(self.requested_memory) - (self.init_snapshot.free_memory - free)

    def with_side_memory(self, available: int, side_memory: SideMemory) -> int:
        cache_bytes = super().with_side_memory(available, side_memory)
        # vLLM reports these two, and suggests a size of the cache by the first
        self.total_consumed += available - cache_bytes
        self.available_kv_cache_memory_bytes = cache_bytes
        return cache_bytes
