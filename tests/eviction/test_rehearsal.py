"""What a rehearsal is for: behind it, nothing is compiled for requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.compilations import DTYPE, SCALE, methods, weights_of
from tests.conftest import ROOT
from tests.paged import PACKINGS, make_pool
from vllm_kvevict.cache.pages import Packing
from vllm_kvevict.eviction.rehearsal import Rehearsal
from vllm_kvevict.kernels.optional_triton import tl


@pytest.mark.skipif(tl is None, reason="Triton is not installed")
def test_nothing_is_compiled_for_a_request_of_any_length() -> None:
    """Takes five seconds: a process of its own, since Triton's compiler and its interpreter exclude each other."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compilations"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["later"] == []
    # the kernels that evictions launch, all of them, for three models
    assert set(found["rehearsed"]) == set(found["kernels"])
    assert len(found["rehearsed"]) < 3 * 36


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_rehearsal_leaves_the_cache_and_what_others_draw_as_they_are(packing: Packing) -> None:
    pool = make_pool(2, 2, 12, 16, 16, packing, dtype=DTYPE).pool
    pool.pages[:] = torch.randn(pool.pages.shape)
    before, state = pool.pages.clone(), torch.get_rng_state()
    for method in methods():
        Rehearsal(method, pool, 4, DTYPE, SCALE, weights_of).run()
    assert pool.pages.equal(before)
    assert torch.get_rng_state().equal(state)
