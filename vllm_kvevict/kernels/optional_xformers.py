"""What we use of xformers where it is installed; elsewhere names that say so when they are used."""

from __future__ import annotations

from typing import Any

try:
    from xformers.ops import fmha
    from xformers.ops.fmha.attn_bias import PagedBlockDiagonalPaddedKeysMask
    from xformers.ops.fmha.triton_splitk import FwOp as SplitK

    HAS_XFORMERS = True
except ImportError:
    HAS_XFORMERS = False

    class _Missing:
        def __getattr__(self, name: str) -> Any:
            raise ImportError("xformers is not installed; install it with `pip install vllm-kvevict[xformers]`")

    fmha = PagedBlockDiagonalPaddedKeysMask = SplitK = _Missing()

__all__ = ["HAS_XFORMERS", "PagedBlockDiagonalPaddedKeysMask", "SplitK", "fmha"]
