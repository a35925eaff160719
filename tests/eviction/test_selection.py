"""Selection keeps exactly as many as it is told, the protected ones always, NaN last."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvevict.eviction.selection import protect, select

INF, NAN = float("inf"), float("nan")
properties = settings(max_examples=60, deadline=None, derandomize=True)


def random_heads(kind: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores, by kind without or with ties, or only NaN, infinities and 0, and how many tokens each head keeps."""
    generator = torch.Generator().manual_seed(seed)
    layers, heads = torch.randint(1, 4, (2,), generator=generator).tolist()
    kv_len = int(torch.randint(1, 70, (), generator=generator))
    order = torch.rand(layers, heads, kv_len, generator=generator).argsort(dim=-1)
    odd = torch.tensor([NAN, INF, -INF, 0.0])
    scores = {"distinct": order.float(), "tied": (order % 4).float(), "odd": odd[order % 4]}
    return scores[kind], torch.randint(0, kv_len + 1, (layers, heads), generator=generator)


def scored_heads(*kinds: str) -> st.SearchStrategy[tuple[torch.Tensor, torch.Tensor]]:
    return st.builds(random_heads, st.sampled_from(kinds or ("distinct", "tied", "odd")), st.integers(0, 2**32 - 1))


@properties
@given(scored_heads())
def test_keeps_exactly_as_many_as_told(case):
    scores, num_kept = case
    kept = select(protect(scores, 0, 0), num_kept)
    assert kept.shape == scores.shape
    assert kept.dtype == torch.bool
    assert kept.sum(-1).equal(num_kept)


@properties
@given(scored_heads())
def test_no_kept_token_ranks_below_an_evicted_one(case):
    scores, num_kept = case
    kept = select(protect(scores, 0, 0), num_kept)
    # as a person reads them: NaN below everything
    ranks = torch.where(scores.isnan(), torch.tensor(-9.0), scores.clamp(-8, 100))
    lowest_kept = torch.where(kept, ranks, torch.tensor(INF)).amin(-1)
    highest_evicted = torch.where(kept, torch.tensor(-INF), ranks).amax(-1)
    assert (lowest_kept >= highest_evicted).all()


@properties
@given(scored_heads("distinct"))
def test_equals_brute_force_on_distinct_scores(case):
    scores, num_kept = case
    kept = select(scores, num_kept)
    for layer in range(scores.shape[0]):
        for head in range(scores.shape[1]):
            best_first = sorted(enumerate(scores[layer, head].tolist()), key=lambda pair: -pair[1])
            best = {token for token, _ in best_first[: num_kept[layer, head]]}
            assert set(kept[layer, head].nonzero()[:, 0].tolist()) == best


@properties
@given(scored_heads(), st.floats(0, 1), st.floats(0, 1))
def test_protected_tokens_are_kept_whatever_their_scores(case, sink_share, recent_share):
    scores, num_kept = case
    kv_len = scores.shape[-1]
    num_sink = int(sink_share * kv_len)
    num_recent = int(recent_share * (kv_len - num_sink))
    kept = select(protect(scores, num_sink, num_recent), num_kept.clamp(min=num_sink + num_recent))
    assert kept[..., :num_sink].all()
    assert kept[..., kv_len - num_recent :].all()


def test_protect_changes_protected_scores_only():
    scores = torch.tensor([[[1.0, NAN, 3.0, INF, -INF, 6.0]]])
    before = scores.clone()
    protected = protect(scores, 1, 1)
    assert protected[0, 0, [0, 5]].tolist() == [INF, INF]
    assert protected[0, 0, 2] == 3.0
    # an infinite score is not as good as protection, and no number is as bad as NaN
    assert 3.0 < protected[0, 0, 3] < INF
    assert protected[0, 0, 1] < protected[0, 0, 4] < 1.0
    assert torch.equal(scores.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("num_sink, num_recent", [(5, 0), (0, 5), (2, 2), (9, 9)])
def test_protection_may_exceed_the_tokens(num_sink, num_recent):
    assert (protect(torch.zeros(1, 1, 3), num_sink, num_recent) == INF).all()


def test_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="`num_kept`: expected 0 to 5 tokens, got 5 to 6"):
        select(torch.zeros(1, 2, 5), torch.tensor([[5, 6]]))
