"""Which decode steps a graph can stand for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import USES_V2_RUNNER
from tests.paged import make_pool
from vllm_kvevict.cache.page_table import PageTable
from vllm_kvevict.cache.request_slots import RequestSlots
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.messages import StepEvictions
from vllm_kvevict.engine.worker.step import Step, none

if USES_V2_RUNNER:
    from vllm_kvevict.engine.worker.graphs import needs_python

pytestmark = pytest.mark.skipif(not USES_V2_RUNNER, reason="full graphs are those of model runner V2")
