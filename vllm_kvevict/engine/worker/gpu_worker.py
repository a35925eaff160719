"""vLLM's GPU worker with eviction, on CUDA. Not run on a GPU."""

from __future__ import annotations

from typing import Any

from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention

from vllm_kvevict.engine.worker.backends.cuda import check_backends, cuda_backends
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
