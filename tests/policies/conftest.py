"""What tests of policies share."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def kvpress() -> Any:
    """Imported by the tests that need it only: it takes seconds."""
    return pytest.importorskip("kvpress", reason="kvpress, or `datasets` or `fire`, which it imports, is not installed")
