"""Triton where it is installed; elsewhere a stand-in under which kernels can be defined but not launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:
    tl = None

    class triton:  # type: ignore[no-redef]
        """What a module with kernels touches when it is imported."""

        @staticmethod
        def jit(kernel: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
            return triton.jit if kernel is None else kernel


__all__ = ["tl", "triton"]
