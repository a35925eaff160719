"""vLLM's CPU worker with eviction. Not to be imported where torch.cuda is to be used: vLLM's own module replaces it."""

from __future__ import annotations

from typing import Any

import psutil
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_kvevict.engine.worker.backends.cpu import cpu_backend
from vllm_kvevict.engine.worker.worker import EvictionWorkerMixin


class EvictionCPUWorker(EvictionWorkerMixin, CPUWorker):
    """Eviction on vLLM's CPU worker, with model runner V1 or V2."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with cpu_backend():
            super().load_model(*args, **kwargs)
        self.take_memory()

    def memory_left(self) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, min(memory.available, self.requested_cpu_memory - psutil.Process().memory_info().rss)
