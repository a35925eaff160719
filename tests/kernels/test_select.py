"""select and count_best do what a sort would, bit for bit, for every implementation that can run here."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from tests.gpu import HAS_GPU, on_gpu
from tests.kernels import cuda_emulation
from vllm_kvevict.kernels import select as module
from vllm_kvevict.kernels.native import cuda_library, library
from vllm_kvevict.kernels.optional_triton import tl
from vllm_kvevict.kernels.select import count_best, select

INF, NAN = float("inf"), float("nan")
LARGEST, TINY = torch.finfo(torch.float32).max, 1e-45
REFERENCE = SimpleNamespace(select=module.select_reference, count_best=module.count_best_reference)


@pytest.fixture(params=["reference", "native-16", "native-8", "native-4", "triton", "cuda"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """One way to select; native-16 is AVX-512, native-8 AVX2, native-4 SSE or NEON.

    Without a GPU Triton is interpreted and CUDA emulated.
    """
    if request.param == "reference":
        yield REFERENCE
        return
    if request.param == "triton":
        if tl is None:
            pytest.skip("Triton is not installed")
        monkeypatch.setattr(module, "_TILE", 256)  # several tiles, the last of them partly filled
        if HAS_GPU:
            yield SimpleNamespace(select=on_gpu(module.select_triton), count_best=on_gpu(module.count_best_triton))
        else:
            yield SimpleNamespace(select=module.select_triton, count_best=module.count_best_triton)
        return
    if request.param == "cuda":
        if HAS_GPU and cuda_library() is not None:
            yield SimpleNamespace(select=on_gpu(module.select_cuda), count_best=None)
            return
        if cuda_emulation.COMPILER is None:
            pytest.skip("needs a C++ compiler to emulate the CUDA kernel")
        yield SimpleNamespace(select=cuda_emulation.select, count_best=None)
        return
    kernels = library()
    if kernels is None:
        pytest.skip("the CPU kernels are not built: run `python setup.py build_ext --inplace`")
    lanes = int(request.param.removeprefix("native-"))
    try:
        if kernels.kvevict_limit_lanes(lanes) != lanes:
            pytest.skip(f"this machine has no vectors of {lanes} floats")
        yield SimpleNamespace(select=select, count_best=count_best)
    finally:
        kernels.kvevict_limit_lanes(16)


def make_scores(kind: str, num_heads: int, kv_len: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(kv_len)
    uniform = torch.rand(2, num_heads, kv_len, generator=generator)
    if kind == "attention":  # many orders of magnitude
        return uniform**20
    if kind == "signed":
        return uniform - 0.5
    if kind == "tied":
        return (uniform * 5).round() - 2
    odd = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0, TINY, -TINY, LARGEST, -LARGEST, 1.0, -1.0])
    return odd[(uniform * len(odd)).long()]


KINDS = ["attention", "signed", "tied", "odd"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "kv_len, num_sink, num_recent", [(1, 0, 0), (7, 2, 3), (64, 0, 64), (131, 4, 32), (389, 0, 0), (389, 1, 17)]
)
def test_equals_a_stable_sort(implementation, kind, kv_len, num_sink, num_recent):
    scores = make_scores(kind, 4, kv_len)
    num_kept = torch.tensor([[0, 1, kv_len, kv_len // 2], [kv_len - 1, min(num_sink + 1, kv_len), kv_len // 3, 1]])
    kept = implementation.select(scores, num_kept, num_sink, num_recent)
    assert kept.dtype == torch.bool
    for head in range(8):
        row, count = scores.flatten(0, 1)[head].tolist(), int(num_kept.flatten()[head])
        protected = {*range(num_sink), *range(kv_len - num_recent, kv_len)}
        # False sorts before True, and NaN compares with nothing
        order = sorted(range(kv_len), key=lambda at: (at not in protected, 0 if at in protected else _badness(row[at])))
        assert kept.flatten(0, 1)[head].nonzero()[:, 0].tolist() == sorted(order[:count])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_sink, num_recent", [(0, 0), (4, 17), (0, 64)])
def test_heads_of_different_lengths_are_as_each_alone(implementation, kind, num_sink, num_recent):
    scores = make_scores(kind, 4, 389)
    kv_lens = torch.tensor([[389, 388, 1, 0], [257, 256, 31, 300]])
    num_kept = torch.tensor([[100, 388, 1, 0], [0, 200, 31, 7]])
    for row, kv_len in zip(scores.flatten(0, 1), kv_lens.flatten().tolist(), strict=True):
        row[kv_len:] = torch.tensor([NAN, INF, 1.0])[torch.arange(389 - kv_len) % 3]  # nothing of it is read
    kept = implementation.select(scores, num_kept, num_sink, num_recent, kv_lens)
    for head, kv_len in enumerate(kv_lens.flatten().tolist()):
        alone = scores.flatten(0, 1)[head, :kv_len]
        expected = REFERENCE.select(alone[None], num_kept.flatten()[head : head + 1], num_sink, num_recent)[0]
        assert kept.flatten(0, 1)[head, :kv_len].equal(expected)
        assert not kept.flatten(0, 1)[head, kv_len:].any()


def _badness(score: float) -> tuple[bool, float]:
    return (True, 0.0) if score != score else (False, -score)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_what_a_joint_sort_would(implementation, kind):
    if implementation.count_best is None:
        pytest.skip("there is no CUDA C++ of it; CUDA tensors use the Triton kernel")
    scores = make_scores(kind, 3, 153)
    for totals in ([1, 459], [100, 458]):
        above, ties = implementation.count_best(scores, torch.tensor(totals))
        for group, total in enumerate(totals):
            rows = scores[group].tolist()
            worst = sorted(_badness(score) for row in rows for score in row)[total - 1]
            better = [sum(_badness(score) < worst for score in row) for row in rows]
            equal = [sum(_badness(score) == worst for score in row) for row in rows]
            if sum(better) + sum(equal) == total:
                better, equal = [b + e for b, e in zip(better, equal, strict=True)], [0] * 3
            assert above[group].tolist() == better
            assert ties[group].tolist() == equal


def test_a_long_row(implementation):
    if implementation.select is module.select_triton:
        pytest.skip("too long for the interpreter")
    scores = make_scores("attention", 3, 8001)
    num_kept = torch.tensor([[256, 1024, 8000], [33, 4000, 7999]])
    assert implementation.select(scores, num_kept, 4, 32).equal(REFERENCE.select(scores, num_kept, 4, 32))


@pytest.mark.parametrize("num_sink, num_recent", [(5, 0), (0, 5), (2, 2), (9, 9)])
def test_protection_may_exceed_the_tokens(implementation, num_sink, num_recent):
    scores = torch.tensor([[3.0, NAN, 1.0], [INF, 5.0, INF]])
    kept = implementation.select(scores, torch.tensor([2, 3]), num_sink, num_recent)
    assert kept.sum(-1).tolist() == [2, 3]
    if num_sink + num_recent >= 3:  # all are protected: the first ones stay
        assert kept[0].tolist() == [True, True, False]


def test_protection_is_better_than_any_score(implementation):
    scores = torch.tensor([[NAN, INF, INF, -INF]])
    assert implementation.select(scores, torch.tensor([2]), 1, 1).tolist() == [[True, False, False, True]]
    assert implementation.select(scores, torch.tensor([3]), 1, 1).tolist() == [[True, True, False, True]]
    assert implementation.select(scores, torch.tensor([1]), 1, 1).tolist() == [[True, False, False, False]]


def test_result_does_not_depend_on_threads_or_strides():
    scores = make_scores("tied", 5, 1001)
    num_kept = torch.arange(10).reshape(2, 5) * 100
    threads, expected = torch.get_num_threads(), select(scores, num_kept, 1, 2)
    try:
        torch.set_num_threads(1)
        assert select(scores, num_kept, 1, 2).equal(expected)
    finally:
        torch.set_num_threads(threads)
    strided = torch.full((2, 5, 2002), NAN)[..., ::2].copy_(scores)
    assert select(strided, num_kept, 1, 2).equal(expected)
    assert select(scores[:, :1].expand(2, 5, 1001), num_kept).equal(select(scores[:, :1].repeat(1, 5, 1), num_kept))


def test_reference_without_library(monkeypatch):
    monkeypatch.setattr(module, "function", lambda *_: None)
    scores = make_scores("odd", 2, 50)
    assert select(scores, torch.full((2, 2), 7)).sum(-1).eq(7).all()
    assert count_best(scores, torch.tensor([9, 100]))[0].sum() <= 109


def test_nothing_to_select_from():
    assert select(torch.empty(2, 0), torch.tensor([0, 0])).shape == (2, 0)


SCORES = torch.zeros(1, 2, 5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((SCORES.double(), torch.ones(1, 2).long()), "`scores`: expected float32 .*, got torch.float64"),
        ((SCORES, torch.ones(2).long()), r"`num_kept`: expected int64 \(1, 2\), got torch.int64 \(2,\)"),
        ((SCORES, torch.ones(1, 2)), "`num_kept`: expected int64"),
        ((SCORES, torch.tensor([[5, 6]])), "`num_kept`: expected 0 to 5 tokens, got 5 to 6"),
        ((SCORES, torch.tensor([[-1, 2]])), "`num_kept`: expected 0 to 5 tokens, got -1 to 2"),
        ((SCORES, torch.ones(1, 2).long(), 0, 0, torch.ones(2).long()), r"`kv_lens`: expected int64 \(1, 2\)"),
        ((SCORES, torch.ones(1, 2).long(), 0, 0, torch.tensor([[5, 6]])), "`kv_lens`: expected 0 to 5 tokens, got 5"),
        (
            (SCORES, torch.ones(1, 2).long() * 3, 0, 0, torch.tensor([[4, 1]])),
            "`num_kept`: .* of each head, got 2 more",
        ),
        ((SCORES, torch.ones(1, 2).long(), -1), "`num_sink`, `num_recent`: expected at least 0 tokens, got -1 and 0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        select(*arguments)


@pytest.mark.parametrize(
    "scores, totals, message",
    [
        (SCORES[0], torch.ones(1).long(), "`scores`: expected float32 .num_groups, num_rows, kv_len."),
        (SCORES, torch.ones(2).long(), "`totals`: expected int64"),
        (SCORES, torch.tensor([0]), "`totals`: expected 1 to 10 scores, got 0 to 0"),
        (SCORES, torch.tensor([11]), "`totals`: expected 1 to 10 scores, got 11 to 11"),
    ],
)
def test_wrong_groups(scores, totals, message):
    with pytest.raises(ValueError, match=message):
        count_best(scores, totals)
