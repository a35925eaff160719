"""Counts what a piece of code launches: operators of torch, and our own kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_kvevict.kernels import (
    chunk_attention,
    leverage,
    move_tokens,
    select,
    slot_scores,
    streaming_sums,
    tiled_tokens,
    window_scores,
)

_KERNELS = (chunk_attention, leverage, move_tokens, select, slot_scores, streaming_sums, tiled_tokens, window_scores)
# what only makes another view of memory, or takes some, launches nothing
VIEWS = {
    "_unsafe_view", "alias", "as_strided", "detach", "empty", "expand", "narrow", "new_empty", "permute", "select",
    "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip
# what a GPU could only answer by letting the host wait
_WAITS = {
    "_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "unique_dim", "_unique2",
    "_linalg_eigh", "_linalg_svd", "linalg_cholesky", "linalg_pinv",  # which look whether they have failed
}  # fmt: skip


def is_waiting(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a GPU would let the host wait for the result of an operator."""
    name = func.overloadpacket.__name__
    if name == "repeat_interleave":  # whose size is the sum of what is on the device
        return func is not torch.ops.aten.repeat_interleave.self_int and not kwargs.get("output_size")
    index = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else []
    return name in _WAITS or any(part is not None and part.dtype == torch.bool for part in index)


def _span(tensor: torch.Tensor) -> int:
    """Elements of memory from the first to the last of a tensor."""
    steps = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return sum(steps) + 1 if tensor.numel() else 0


class Launches(TorchDispatchMode):
    """counts: of the operators and kernels that ran; waits: those whose result the host had to wait for"""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            # of tensors with gaps a GPU takes one after the other
            gaps = [each for each in args[0] if _span(each) > each.numel()] if "_foreach" in name else []
            self.counts[name] += max(len(gaps), 1)
        if is_waiting(func, args, kwargs or {}):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """Count the launches of the code inside, as they would be on a GPU: there nobody looks at numbers to check them."""
    launches = Launches()

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def found(name: str, device: torch.device) -> Any:
            kernel = function(name, device)
            if kernel is None:
                pytest.skip("the CPU kernels are not built: run `python setup.py build_ext --inplace`")

            def launch(*arguments: Any) -> Any:
                launches.counts[name] += 1
                return kernel(*arguments)

            return launch

        return found

    with monkeypatch.context() as patched, launches:
        for module in _KERNELS:
            patched.setattr(module, "function", counting(module.function))
        checks = [(select, "check_arguments"), (select, "_check_groups")]
        checks += [(slot_scores, "check_page_ids"), (leverage, "check_blocks")]
        checks += [(move_tokens, "check_slots"), (tiled_tokens, "check_slots")]
        for module, check in checks:
            patched.setattr(module, check, lambda *arguments, **options: None)
        for module in (chunk_attention, streaming_sums, window_scores):
            patched.setattr(module, "check_lengths", lambda *arguments: None)
        yield launches
