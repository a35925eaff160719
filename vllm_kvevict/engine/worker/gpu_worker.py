"""vLLM's GPU worker with eviction, on CUDA. Not run on a GPU."""

from __future__ import annotations

from typing import Any

from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention

from vllm_kvevict.engine.worker.backends.cuda import check_backends, cuda_backends
from vllm_kvevict.engine.worker.worker import EvictionWorkerMixin


class EvictionGPUWorker(EvictionWorkerMixin):
    """Eviction on vLLM's GPU worker, with model runner V1 or V2."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with cuda_backends(self.vllm_config):
            super().load_model(*args, **kwargs)
        check_backends(get_layers_from_vllm_config(self.vllm_config, Attention).values())
