"""The highest scores: which tokens every head keeps, and how many each wins where heads are ranked together."""

from __future__ import annotations

from typing import Any

import torch

from vllm_kvevict.kernels.native import cuda_function, cuda_library, function, pointers
from vllm_kvevict.kernels.operators import operator
from vllm_kvevict.kernels.optional_triton import tl, triton

_TILE, _COUNT_TILE, _NUM_WARPS = 2048, 1024, 8  # scores that a program looks at at once; more spill on sm_80
# What differs from request to request: a kernel is compiled for none of it.
_VARYING = ("num_rows", "kv_len", "max_kv_len", "num_sink", "num_recent")
_UNALIGNED = ("scores_ptr", "num_kept_ptr", "kv_lens_ptr", "totals_ptr")  # some are views of a layer or a group


@operator(
    "(Tensor scores, Tensor num_kept, int num_sink=0, int num_recent=0, Tensor? kv_lens=None) -> Tensor",
    fake=lambda scores, *arguments: scores.new_empty(scores.shape, dtype=torch.bool),
)
def select(
    scores: torch.Tensor,
    num_kept: torch.Tensor,
    num_sink: int = 0,
    num_recent: int = 0,
    kv_lens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mark the ``num_kept`` highest scores of every head, protected tokens before all others.

    scores:     [*heads, kv_len] float32; NaN ranks last, both zeros alike. Of equal scores, and of protected tokens,
                those of the lower cache index stay
    num_kept:   [*heads] int64, 0 to the tokens of its head
    num_sink:   first tokens that are protected, whatever their scores
    num_recent: last tokens that are protected; together they may be more than there are
    kv_lens:    [*heads] int64, 0 to kv_len, tokens of every head: what lies behind them is neither read nor kept;
                None: all heads have ``kv_len``
    returns:    [*heads, kv_len] bool, exactly num_kept each

    CPU tensors use csrc/cpu/select.cpp where it was built, with 4 bytes of scratch per token and thread; CUDA tensors
    csrc/cuda/select.cu where it was, else the Triton kernel; everything else ``select_reference``. All agree bit for
    bit.

    Raises ValueError for a wrong shape or dtype and, on CPU, for a number out of range, which would have to wait for a
    GPU; MemoryError if the scratch memory cannot be had.
    """
    num_kept = num_kept.to(scores.device)
    check_arguments(scores, num_kept, num_sink, num_recent, kv_lens)
    if scores.numel() == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.device.type == "cuda":
        launch = select_triton if cuda_library() is None else select_cuda
        return launch(scores, num_kept, num_sink, num_recent, kv_lens)
    kernel = function("kvevict_select", scores.device)
    if kernel is None:
        return select_reference(scores, num_kept, num_sink, num_recent, kv_lens)
    tensors = _contiguous(scores, num_kept, kv_lens)
    kept = torch.empty(scores.shape, dtype=torch.bool)
    if kernel(*pointers(*tensors, kept), num_kept.numel(), scores.shape[-1], num_sink, num_recent) != 0:
        raise MemoryError(f"select: no scratch memory for {scores.shape[-1]} tokens per thread.")
    return kept


def _contiguous(
    scores: torch.Tensor, num_kept: torch.Tensor, kv_lens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return scores.contiguous(), num_kept.contiguous(), None if kv_lens is None else kv_lens.contiguous()


@operator(
    "(Tensor scores, Tensor totals) -> (Tensor, Tensor)",
    fake=lambda scores, totals: (
        scores.new_empty(scores.shape[:2], dtype=torch.int64),
        scores.new_empty(scores.shape[:2], dtype=torch.int64),
    ),
)
def count_best(scores: torch.Tensor, totals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Count the scores of every row that are among the ``totals`` highest of its group.

    scores:  [num_groups, num_rows, kv_len] float32; NaN ranks last, both zeros alike
    totals:  [num_groups] int64, 1 to num_rows * kv_len
    returns: two of [num_groups, num_rows] int64: scores that are among them, and scores that tie for the places that
             these leave. Of a group without such ties the first sum to its total, and the others are 0

    Implementations as for ``select``, but no CUDA C++, with 4 bytes of scratch per score of a group and thread.

    Raises ValueError for a wrong shape or dtype and, on CPU, for a total out of range, as ``select`` does; MemoryError
    if the scratch memory cannot be had.
    """
    totals = totals.to(scores.device)
    _check_groups(scores, totals)
    if scores.device.type == "cuda":
        return count_best_triton(scores, totals)
    kernel = function("kvevict_count_best", scores.device)
    if kernel is None:
        return count_best_reference(scores, totals)
    scores, totals = scores.contiguous(), totals.contiguous()
    above, ties = (torch.empty(scores.shape[:2], dtype=torch.int64) for _ in range(2))
    if kernel(*pointers(scores, totals, above, ties), *scores.shape) != 0:
        raise MemoryError(f"count_best: no scratch memory for {scores[0].numel()} scores per thread.")
    return above, ties


def check_arguments(
    scores: torch.Tensor, num_kept: torch.Tensor, num_sink: int, num_recent: int, kv_lens: torch.Tensor | None = None
) -> None:
    """Raise ValueError unless the arguments are as ``select`` documents them."""
    if scores.dim() == 0 or scores.dtype != torch.float32:
        raise ValueError(f"`scores`: expected float32 [*heads, kv_len], got {scores.dtype} {tuple(scores.shape)}.")
    for name, numbers in (("num_kept", num_kept), ("kv_lens", kv_lens)):
        if numbers is not None and (numbers.shape != scores.shape[:-1] or numbers.dtype != torch.int64):
            raise ValueError(
                f"`{name}`: expected int64 {tuple(scores.shape[:-1])}, got {numbers.dtype} {tuple(numbers.shape)}."
            )
    if kv_lens is not None and kv_lens.device != scores.device:
        raise ValueError(f"`kv_lens`: expected them on {scores.device}, got {kv_lens.device}.")
    if min(num_sink, num_recent) < 0:
        raise ValueError(f"`num_sink`, `num_recent`: expected at least 0 tokens, got {num_sink} and {num_recent}.")
    if num_kept.numel() and scores.device.type == "cpu":
        _check_numbers("num_kept", num_kept, scores.shape[-1])
        if kv_lens is not None:
            _check_numbers("kv_lens", kv_lens, scores.shape[-1])
            if (num_kept > kv_lens).any():
                most = int((num_kept - kv_lens).max())
                raise ValueError(f"`num_kept`: expected at most the tokens of each head, got {most} more.")


def _check_numbers(name: str, numbers: torch.Tensor, most: int) -> None:
    fewest, largest = numbers.aminmax()
    if fewest < 0 or largest > most:
        raise ValueError(f"`{name}`: expected 0 to {most} tokens, got {int(fewest)} to {int(largest)}.")


def _check_groups(scores: torch.Tensor, totals: torch.Tensor) -> None:
    if scores.dim() != 3 or 0 in scores.shape or scores.dtype != torch.float32:
        raise ValueError(
            f"`scores`: expected float32 [num_groups, num_rows, kv_len], got {scores.dtype} {tuple(scores.shape)}."
        )
    if totals.shape != scores.shape[:1] or totals.dtype != torch.int64:
        raise ValueError(f"`totals`: expected int64 ({len(scores)},), got {totals.dtype} {tuple(totals.shape)}.")
    if scores.device.type == "cpu":
        fewest, most = totals.aminmax()
        if fewest < 1 or most > scores[0].numel():
            raise ValueError(f"`totals`: expected 1 to {scores[0].numel()} scores, got {int(fewest)} to {int(most)}.")


def select_triton(
    scores: torch.Tensor,
    num_kept: torch.Tensor,
    num_sink: int = 0,
    num_recent: int = 0,
    kv_lens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch the kernel of ``select``, one program for each head; same arguments, all on one device."""
    scores, num_kept, kv_lens = _contiguous(scores, num_kept, kv_lens)
    kept = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    is_ragged = kv_lens is not None
    _select_kernel[(num_kept.numel(),)](
        scores, num_kept, kv_lens if is_ragged else num_kept, kept, scores.shape[-1], num_sink, num_recent,
        IS_RAGGED=is_ragged, TILE=_TILE, num_warps=_NUM_WARPS,
    )  # fmt: skip
    return kept


def select_cuda(
    scores: torch.Tensor,
    num_kept: torch.Tensor,
    num_sink: int = 0,
    num_recent: int = 0,
    kv_lens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch csrc/cuda/select.cu, which must have been built, one block for each head; as ``select_triton``."""
    kernel = cuda_function("kvevict_cuda_select")
    tensors = _contiguous(scores, num_kept, kv_lens)
    kept = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    with torch.cuda.device(scores.device):
        kernel(*pointers(*tensors, kept), num_kept.numel(), scores.shape[-1], num_sink, num_recent)
    return kept


def count_best_triton(scores: torch.Tensor, totals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel of ``count_best``, one program for each group; same arguments, all on one device."""
    scores, totals = scores.contiguous(), totals.contiguous()
    num_groups, num_rows, kv_len = scores.shape
    above, ties = (totals.new_empty(num_groups, num_rows) for _ in range(2))
    _count_best_kernel[(num_groups,)](
        scores, totals, above, ties, num_rows, kv_len, TILE=_COUNT_TILE, num_warps=_NUM_WARPS
    )  # fmt: skip
    return above, ties


@triton.jit
def _keys(scores):
    # unsigned integers that sort like the scores: NaN is 0, below -inf, and both zeros are alike
    bits = scores.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    ordered = tl.where(bits > 0x7FFFFFFF, 0x80000000 - magnitude, 0x80000000 + magnitude)
    return tl.where(magnitude > 0x7F800000, 0, ordered)


@triton.jit
def _load_keys(row_ptr, index, kv_len, first, last):
    # tokens outside of first .. last - 1 are protected: no score has their key
    scores = tl.load(row_ptr + index, mask=index < kv_len, other=0.0)
    return tl.where((index < first) | (index >= last), 0xFFFFFFFF, _keys(scores)).to(tl.uint32)


@triton.jit
def _find_threshold(row_ptr, kv_len, first, last, wanted, TILE: tl.constexpr):
    """Return the ``wanted``-th highest key, and how many of the wanted ones are equal to it, by radix select."""
    digits = tl.arange(0, 256)
    threshold = wanted.to(tl.uint32) * 0
    remaining = wanted
    for shift in tl.static_range(24, -1, -8):
        counts = tl.zeros([256], tl.int32)
        for start in range(0, kv_len, TILE):
            index = start + tl.arange(0, TILE)
            key = _load_keys(row_ptr, index, kv_len, first, last)
            # the higher bits are those that earlier passes have found
            higher = key & ((0xFFFFFFFF << (shift + 8)) & 0xFFFFFFFF)
            is_candidate = (index < kv_len) & (higher == threshold)
            counts += tl.histogram(((key >> shift) & 0xFF).to(tl.int32), 256, mask=is_candidate)
        from_digit = tl.sum(counts) - tl.cumsum(counts) + counts
        digit = tl.maximum(tl.sum((from_digit >= remaining).to(tl.int32)) - 1, 0)
        remaining -= tl.sum(tl.where(digits > digit, counts, 0))
        threshold |= digit.to(tl.uint32) << shift
    return threshold, remaining


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _select_kernel(
    scores_ptr, num_kept_ptr, kv_lens_ptr, kept_ptr, max_kv_len, num_sink, num_recent,
    IS_RAGGED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # one program: one head. Each of its five passes reads the row again, from the second on out of a cache
    head = tl.program_id(0).to(tl.int64)
    row_ptr = scores_ptr + head * max_kv_len
    wanted = tl.load(num_kept_ptr + head).to(tl.int32)
    kv_len = max_kv_len
    if IS_RAGGED:
        kv_len = tl.load(kv_lens_ptr + head).to(tl.int32)
    first, last = tl.minimum(num_sink, kv_len), tl.maximum(kv_len - num_recent, tl.minimum(num_sink, kv_len))
    threshold, remaining = _find_threshold(row_ptr, kv_len, first, last, wanted, TILE)
    if wanted <= 0:  # no key is above this one, and none of its ties is kept
        threshold |= 0xFFFFFFFF
        remaining *= 0
    for start in range(0, max_kv_len, TILE):
        index = start + tl.arange(0, TILE)
        key = _load_keys(row_ptr, index, kv_len, first, last)
        is_tie = ((key == threshold) & (index < kv_len)).to(tl.int32)
        rank = tl.cumsum(is_tie)  # from 1 on
        kept = (index < kv_len) & ((key > threshold) | ((is_tie != 0) & (rank <= remaining)))
        tl.store(kept_ptr + head * max_kv_len + index, kept, mask=index < max_kv_len)
        remaining -= tl.sum(is_tie)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _count_best_kernel(scores_ptr, totals_ptr, above_ptr, ties_ptr, num_rows, kv_len, TILE: tl.constexpr):
    # one program: one group
    group = tl.program_id(0).to(tl.int64)
    group_ptr = scores_ptr + group * num_rows * kv_len
    num_scores = num_rows * kv_len
    wanted = tl.load(totals_ptr + group).to(tl.int32)
    threshold, remaining = _find_threshold(group_ptr, num_scores, 0, num_scores, wanted, TILE)
    num_ties = 0
    for start in range(0, num_scores, TILE):
        index = start + tl.arange(0, TILE)
        key = _load_keys(group_ptr, index, num_scores, 0, num_scores)
        num_ties += tl.sum(((key == threshold) & (index < num_scores)).to(tl.int32))
    are_split = num_ties > remaining
    for row in range(num_rows):
        row_ptr = group_ptr + row * kv_len
        above = 0
        equal = 0
        for start in range(0, kv_len, TILE):
            index = start + tl.arange(0, TILE)
            key = _load_keys(row_ptr, index, kv_len, 0, kv_len)
            above += tl.sum(((key > threshold) & (index < kv_len)).to(tl.int32))
            equal += tl.sum(((key == threshold) & (index < kv_len)).to(tl.int32))
        tl.store(above_ptr + group * num_rows + row, tl.where(are_split, above, above + equal).to(tl.int64))
        tl.store(ties_ptr + group * num_rows + row, tl.where(are_split, equal, 0).to(tl.int64))


def triton_signatures() -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Return kernel, argument types, constants and warps of every kernel here, to compile it without a GPU."""
    rows = {"scores_ptr": "*fp32", "num_kept_ptr": "*i64", "kv_lens_ptr": "*i64", "kept_ptr": "*i1"}
    rows |= dict.fromkeys(("max_kv_len", "num_sink", "num_recent"), "i32")
    groups = {"scores_ptr": "*fp32", "totals_ptr": "*i64", "above_ptr": "*i64", "ties_ptr": "*i64"}
    groups |= dict.fromkeys(("num_rows", "kv_len"), "i32")
    return [
        (_select_kernel, rows, {"IS_RAGGED": True, "TILE": _TILE}, _NUM_WARPS),
        (_count_best_kernel, groups, {"TILE": _COUNT_TILE}, _NUM_WARPS),
    ]


def select_reference(
    scores: torch.Tensor,
    num_kept: torch.Tensor,
    num_sink: int,
    num_recent: int,
    kv_lens: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition of ``select`` in plain torch: same arguments and result."""
    index = torch.arange(scores.shape[-1], device=scores.device)
    lens = torch.full_like(num_kept, scores.shape[-1]) if kv_lens is None else kv_lens
    is_token = index < lens[..., None]
    is_protected = is_token & ((index < num_sink) | (index >= lens[..., None] - num_recent))
    # descending would put NaN first; two stable sorts put protected tokens before a score of +inf, and last what is
    # none of the head's tokens
    order = (-scores).masked_fill(is_protected, float("-inf")).argsort(dim=-1, stable=True)
    rank = is_protected.int() + is_token.int()
    order = order.gather(-1, rank.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    is_kept = index < num_kept.to(scores.device)[..., None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, is_kept)


def count_best_reference(scores: torch.Tensor, totals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of ``count_best`` in plain torch: same arguments and result."""
    # negated: descending would put NaN first
    threshold = -(-scores).flatten(1).sort(dim=1).values.gather(1, totals[:, None] - 1)[..., None]
    is_above = (scores > threshold) | (threshold.isnan() & ~scores.isnan())
    is_tie = (scores == threshold) | (threshold.isnan() & scores.isnan())
    above, ties = is_above.sum(dim=2), is_tie.sum(dim=2)
    are_split = above.sum(dim=1, keepdim=True) + ties.sum(dim=1, keepdim=True) > totals[:, None]
    return torch.where(are_split, above, above + ties), ties * are_split
