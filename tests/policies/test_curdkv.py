"""CurDKV: the released score against kvpress, the paper's leverage scores against an SVD in float64."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.llama_layer import make_llama_layer
from vllm_kvevict.eviction.selection import protect, select
from vllm_kvevict.policies.curdkv import CurDKV
from vllm_kvevict.policies.inputs import ScoreInputs

PAPER = {"measure": "leverage", "projection_rank": 20, "local_window": 0}
KVPRESS_NAMES = {"product": "kv_product", "mean": "kv_avg", "key": "key", "value": "value"}
FULL_BLOCKS = slice(0, 320)  # of a prompt of 333 tokens


def score(policy, layer):
    return policy.score(layer.inputs(policy))


def shares_of_keys(policy, layer):
    batch = ScoreInputs.together([layer.inputs(policy)])
    return policy._shares(batch, batch.gather_keys, slice(None))(0, layer.num_tokens)


def kept_by(policy, layer, num_kept):
    """[num_kv_heads, num_kept] positions that selection keeps."""
    scores = protect(score(policy, layer)[None], policy.num_sink, policy.num_recent)
    kept = select(scores, torch.full((1, len(layer.keys)), num_kept))[0]
    return kept.nonzero()[:, 1].view(len(layer.keys), num_kept)


def gaussian(head_size, rank, seed=0):
    """The matrix that ``torch.randn`` makes after ``torch.manual_seed(seed)``, as kvpress makes it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.randn(head_size, rank) / rank**0.5


def leverage(x):
    """Leverage scores [num_kv_heads, num_tokens] float64 of ``x`` [num_kv_heads, num_tokens, columns], by SVD."""
    rows = []
    for matrix in x.double():
        left, singular, _ = torch.linalg.svd(matrix, full_matrices=False)
        rows.append(left[:, singular > 1e-5 * singular[0]].square().sum(dim=1))
    return torch.stack(rows)


def shares_of_blocks(x, size):
    """Squared norms of ``x`` over their sums in blocks of ``size``, float64, block by block."""
    norms = x.double().square().sum(dim=-1)
    return torch.cat([block / block.sum(dim=1, keepdim=True) for block in norms.split(size, dim=1)], dim=1)


def combined(kappa, nu, combine):
    scores = {"product": kappa * nu, "mean": (kappa + nu) / 2, "key": kappa, "value": nu}[combine]
    return (scores / scores.sum(dim=1, keepdim=True)).float()


@pytest.mark.parametrize("combine", KVPRESS_NAMES)
@pytest.mark.parametrize("num_tokens", [1, 16, 17, 1030, 2100])
@pytest.mark.parametrize("window", [1, 16, 100, 1500])
def test_released_form_equals_the_formula(num_tokens, window, combine):
    """Whatever tiles the prompt is read in."""
    layer = make_llama_layer(num_tokens, 0)
    expected = combined(shares_of_blocks(layer.keys, window), shares_of_blocks(layer.values, window), combine)
    scores = score(CurDKV(local_window=window, combine=combine), layer)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=0)  # float32: sums of positive numbers


@pytest.mark.parametrize(
    "num_tokens, rank, combine",  # ranks below, at and above the head size, which is 32
    [
        (130, 20, "product"),
        (333, 20, "mean"),
        (2100, 20, "product"),
        (333, 4, "key"),
        (333, 32, "value"),
        (130, 40, "mean"),
    ],
)
def test_leverage_form_equals_the_svd(num_tokens, rank, combine):
    layer = make_llama_layer(num_tokens, 0)
    sketch = gaussian(32, rank, seed=3)
    expected = combined(leverage(layer.keys @ sketch), leverage(layer.values @ sketch), combine)
    policy = CurDKV(**{**PAPER, "projection_rank": rank}, seed=3, combine=combine)
    torch.testing.assert_close(score(policy, layer), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("num_tokens", [130, 1000])
def test_exact_leverage_without_projection(num_tokens):
    layer = make_llama_layer(num_tokens, 0)
    expected = combined(leverage(layer.keys), leverage(layer.values), "product")
    policy = CurDKV(measure="leverage", local_window=0)
    torch.testing.assert_close(score(policy, layer), expected, rtol=1e-4, atol=0)


class TestLeverageScores:
    @pytest.mark.parametrize("rank", [4, 20, 0])
    def test_they_sum_to_the_rank(self, rank):
        layer = make_llama_layer(333, 0)
        policy = CurDKV(**{**PAPER, "projection_rank": rank})
        scores = shares_of_keys(policy, layer)
        torch.testing.assert_close(scores.sum(dim=1), torch.full((2,), float(rank or 32)), rtol=1e-5, atol=0)
        assert scores.amax() <= 1 + 1e-6

    def test_of_keys_of_low_rank_they_sum_to_it(self):
        """The Gram matrix has no inverse; rounding must not be taken for rank."""
        layer = make_llama_layer(333, 0)
        low_rank = torch.randn(2, 333, 5) @ torch.randn(2, 5, 32)
        layer = replace(layer, keys=low_rank + 1e-6 * torch.randn(2, 333, 32))
        for rank in (20, 0):
            policy = CurDKV(**{**PAPER, "projection_rank": rank})
            scores = shares_of_keys(policy, layer)
            torch.testing.assert_close(scores.sum(dim=1), torch.full((2,), 5.0), rtol=1e-5, atol=0)

    @pytest.mark.parametrize("num_tokens", [1, 2, 7, 20])
    def test_prompts_no_longer_than_the_rank_rank_all_tokens_alike(self, num_tokens):
        scores = score(CurDKV(**PAPER), make_llama_layer(num_tokens, 0))
        torch.testing.assert_close(scores, torch.full_like(scores, 1 / num_tokens), rtol=1e-4, atol=0)

    def test_an_invertible_map_of_all_keys_changes_nothing(self):
        """Not so for norms: that is what makes it leverage."""
        layer = make_llama_layer(333, 0)
        stretched = replace(layer, keys=layer.keys @ (torch.randn(32, 32) + 4 * torch.eye(32)))
        policy = CurDKV(measure="leverage", local_window=0, combine="key")
        torch.testing.assert_close(score(policy, stretched), score(policy, layer), rtol=1e-3, atol=1e-6)
        norms = replace(policy, measure="norm")
        assert (score(norms, stretched) / score(norms, layer) - 1).abs().max() > 0.1

    def test_a_token_alone_in_its_direction_ranks_first(self):
        layer = make_llama_layer(333, 0)
        keys = layer.keys.clone()
        keys[..., 7] = 0
        keys[:, 123] = 1e-2 * torch.eye(32)[7]  # short, but no other key can stand in for it
        scores = score(CurDKV(measure="leverage", local_window=0, combine="key"), replace(layer, keys=keys))
        assert scores.argmax(dim=1).tolist() == [123, 123]
        norms = score(CurDKV(local_window=0, combine="key"), replace(layer, keys=keys))
        assert norms.argmin(dim=1).tolist() == [123, 123]

    def test_zero_keys_count_nothing(self):
        layer = make_llama_layer(130, 0)
        scores = score(CurDKV(**PAPER), replace(layer, keys=torch.zeros_like(layer.keys)))
        assert scores.eq(0).all()


class TestReleasedForm:
    @pytest.mark.parametrize("combine", ["key", "value"])
    def test_every_full_block_of_16_contributes_the_same(self, combine):
        """One each to kappa and to nu, of which there are 20 and the short one."""
        scores = score(CurDKV(combine=combine), make_llama_layer(333, 0))
        sums = scores[:, FULL_BLOCKS].unflatten(1, (-1, 16)).sum(dim=2)
        torch.testing.assert_close(sums, torch.full_like(sums, 1 / 21), rtol=1e-5, atol=0)

    @pytest.mark.parametrize("which", ["keys", "values"])
    def test_scaling_a_whole_block_changes_nothing(self, which):
        layer = make_llama_layer(333, 0)
        scale = torch.logspace(-3, 3, 21).repeat_interleave(16)[:333, None]
        scaled = replace(layer, **{which: getattr(layer, which) * scale})
        torch.testing.assert_close(score(CurDKV(), scaled), score(CurDKV(), layer), rtol=1e-5, atol=0)
        without = CurDKV(local_window=0)
        assert (score(without, scaled) / score(without, layer) - 1).abs().max() > 1

    def test_rotating_keys_changes_nothing_unless_they_are_projected(self):
        layer = make_llama_layer(333, 0)
        turned = replace(layer, keys=layer.keys @ torch.linalg.qr(torch.randn(32, 32)).Q)
        torch.testing.assert_close(score(CurDKV(), turned), score(CurDKV(), layer), rtol=1e-5, atol=0)
        projected = CurDKV(projection_rank=20)
        assert (score(projected, turned) / score(projected, layer) - 1).abs().max() > 0.1

    def test_blocks_of_zeros_count_nothing(self):
        layer = make_llama_layer(333, 0)
        values = layer.values.clone()
        values[:, 32:48] = 0
        scores = score(CurDKV(), replace(layer, values=values))
        assert scores[:, 32:48].eq(0).all()
        torch.testing.assert_close(scores.sum(dim=1), torch.ones(2))


KVPRESS_OPTIONS = [
    {"combine": combine, "local_window": window, "projection_rank": rank}
    for combine, window, rank in product(KVPRESS_NAMES, [0, 16], [0, 20])
]


@pytest.mark.parametrize("options", KVPRESS_OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("num_tokens", [130, 333, 992, 1000])  # 992 is a multiple of 16
class TestAgainstKvpress:
    @torch.no_grad()
    def test_scores(self, kvpress, num_tokens, options):
        """Their first four are set to 1; ours are what the formula gives and are protected by selection."""
        layer = make_llama_layer(num_tokens, 0)
        torch.manual_seed(5)  # their projection comes from the global generator
        theirs = self.press(kvpress, options).score(*layer.press_arguments())[0]
        ours = score(CurDKV(**options, seed=5), layer)
        torch.testing.assert_close(ours[:, 4:], theirs[:, 4:], rtol=1e-4, atol=0)
        assert ours[:, :4].lt(1).all()

    @pytest.mark.parametrize("ratio", [0.3, 0.9])
    @torch.no_grad()
    def test_kept_tokens(self, kvpress, num_tokens, options, ratio):
        layer = make_llama_layer(num_tokens, 0)
        press = self.press(kvpress, options, ratio)
        torch.manual_seed(5)
        num_kept = press.compress(*layer.press_arguments())[0].shape[2]
        torch.manual_seed(5)
        theirs = press.score(*layer.press_arguments())[0].topk(num_kept).indices.sort().values
        assert kept_by(CurDKV(**options, seed=5), layer, num_kept).equal(theirs)

    def press(self, kvpress, options, ratio=0.5):
        window = options["local_window"]
        return kvpress.CURPress(
            ratio,
            leverage_type=KVPRESS_NAMES[options["combine"]],
            use_random_leverage=options["projection_rank"] > 0,
            use_local_approximation=window > 0,
            local_window_size=window,
        )


def test_seeds_draw_different_projections():
    layer = make_llama_layer(333, 0)
    one, other = (score(CurDKV(**PAPER, seed=seed), layer) for seed in (0, 1))
    assert not one.isclose(other, rtol=0.1).all()
    assert one.equal(score(CurDKV(**PAPER), layer))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"measure": "svd"}, r"curdkv\.measure: expected 'norm' or 'leverage', got 'svd'"),
        ({"measure": None}, r"curdkv\.measure: expected 'norm' or 'leverage', got None"),
        ({"combine": "kv_product"}, r"curdkv\.combine: expected 'product', .* got 'kv_product'"),
        ({"combine": []}, r"curdkv\.combine: expected 'product', .* got \[\]"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CurDKV(**options)


@pytest.mark.parametrize("option", ["local_window", "projection_rank", "seed", "num_sink"])
@pytest.mark.parametrize("value", [-1, 16.0, "16", True, None])
def test_wrong_numbers_are_refused(option, value):
    with pytest.raises(ValueError, match=rf"curdkv\.{option}: expected a whole number of at least 0, got {value!r}"):
        CurDKV(**{option: value})


def test_what_it_asks_the_engine_for():
    policy = CurDKV()
    assert (policy.query_window, policy.num_sink, policy.num_recent, policy.needs) == (0, 4, 0, frozenset())
    assert CurDKV(num_sink=9).num_sink == 9
    assert not policy.query_aware
