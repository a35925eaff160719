"""What every registered allocator must do, and what each of them says it does."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from tests.paged import make_pool, random_kv, scrambled_blocks
from vllm_kvevict.budgets import ALLOCATORS, round_to_pages
from vllm_kvevict.budgets.adakv import AdaKV
from vllm_kvevict.budgets.batch import measures_batches
from vllm_kvevict.budgets.cake import Cake
from vllm_kvevict.budgets.fixed import Fixed
from vllm_kvevict.budgets.global_ import Global
from vllm_kvevict.budgets.lava import Lava, layer_entropies
from vllm_kvevict.budgets.pyramid import Pyramid
from vllm_kvevict.budgets.uniform import Uniform
from vllm_kvevict.policies import ScoreInputs

LAYERS, HEADS, TOKENS = 3, 4, 400
SINK, RECENT = 2, 8
INF = float("inf")
SEEDS = range(5)
# what these give does not depend on the scores
STATIC = ("fixed", "pyramid", "uniform")


@pytest.fixture
def weights(tmp_path):
    file = tmp_path / "weights.json"
    file.write_text(json.dumps([3, 2, 1]))
    return str(file)


@pytest.fixture(params=ALLOCATORS.names())
def allocator(request, weights):
    return ALLOCATORS.get(request.param)(**({"file": weights} if request.param == "fixed" else {}))


def random_scores(seed, protected=True, layers=LAYERS):
    """[layers, HEADS, TOKENS], each (layer, head) with a sharpness of its own, both ends protected."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = 6 * torch.rand(layers, HEADS, 1, generator=generator)
    scores = (sharpness * torch.randn(layers, HEADS, TOKENS, generator=generator)).softmax(-1)
    if protected:
        scores[..., :SINK] = scores[..., TOKENS - RECENT :] = INF
    return scores


def wished(allocator, scores, num_tokens):
    return allocator.wish(scores, num_tokens, layer_measures(scores))


def layer_measures(scores):
    """[layers, 2], two numbers that depend on the scores of a layer and on nothing else."""
    free = scores.masked_fill(scores.isinf(), 0).double().flatten(1)
    return torch.stack([torch.special.entr(free).sum(1), free.square().sum(1)], dim=1)


def test_who_measures_several_prompts_together():
    class Changed(Cake):
        def measure(self, inputs):
            return super().measure(inputs)

    assert measures_batches(Cake)
    assert not measures_batches(Changed)
    assert not measures_batches(Uniform)


@pytest.mark.parametrize("seed", SEEDS)
def test_wishes_are_amounts_for_every_layer_and_head(allocator, seed):
    scores = random_scores(seed)
    before = scores.clone()
    wish = wished(allocator, scores, 100)
    assert wish.shape == (LAYERS, HEADS)
    assert wish.dtype == torch.float64
    assert torch.isfinite(wish).all() and (wish >= 0).all()
    assert scores.equal(before)


@pytest.mark.parametrize("seed", SEEDS)
def test_wishes_round_to_pages_that_sum_and_keep_the_minimum(allocator, seed):
    pages = round_to_pages(wished(allocator, random_scores(seed), 100), 6 * LAYERS * HEADS, 1, TOKENS // 16)
    assert int(pages.sum()) == 6 * LAYERS * HEADS
    assert int(pages.min()) >= 1 and int(pages.max()) <= TOKENS // 16


@pytest.mark.parametrize("seed", SEEDS)
def test_permuting_heads_and_layers_permutes_the_wish(allocator, seed):
    """Up to the rounding of float64, in which entropies and shares are summed up in another order then."""
    scores = random_scores(seed)
    generator = torch.Generator().manual_seed(seed)
    heads, layers = torch.randperm(HEADS, generator=generator), torch.randperm(LAYERS, generator=generator)
    wish = wished(allocator, scores, 100)
    torch.testing.assert_close(wished(allocator, scores[:, heads], 100), wish[:, heads], rtol=1e-12, atol=1e-9)
    if not isinstance(allocator, Pyramid | Fixed):
        torch.testing.assert_close(wished(allocator, scores[layers], 100), wish[layers], rtol=1e-12, atol=1e-9)


def test_equal_scores_share_equally(allocator):
    if isinstance(allocator, Pyramid | Fixed):
        pytest.skip("ignores scores by definition")
    scores = torch.full((LAYERS, HEADS, TOKENS), 0.25)
    scores[..., -RECENT:] = INF
    wish = wished(allocator, scores, 100)
    torch.testing.assert_close(wish, torch.full_like(wish, 100), rtol=1e-12, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [name for name in ALLOCATORS.names() if name not in STATIC])
def test_the_budget_is_spent_and_no_head_exceeds_the_prompt(name, seed):
    wish = wished(ALLOCATORS.get(name)(), random_scores(seed), 100)
    # lava rounds each layer's budget to whole tokens
    assert float(wish.sum()) == pytest.approx(100 * LAYERS * HEADS, abs=LAYERS)
    assert float(wish.max()) <= TOKENS and float(wish.min()) >= SINK + RECENT - 1e-9
    assert float(wish.max() / wish.min()) > 1.5, "nothing ragged about it"


def test_uniform():
    assert (wished(Uniform(), random_scores(0), 36) == 36).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_adakv_keeps_layers_equal_and_alpha_one_is_uniform(seed):
    scores = random_scores(seed)
    assert wished(AdaKV(), scores, 100).sum(1).tolist() == [400.0] * LAYERS
    assert (wished(AdaKV(alpha=1), scores, 100) == 100).all()
    assert float(wished(AdaKV(alpha=0.5), scores, 100).min()) >= 50


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("compression_ratio", [0.9, 0.75, 0.3])
def test_adakv_equals_kvpress(seed, alpha, compression_ratio):
    kvpress = pytest.importorskip("kvpress", reason="kvpress, or what it imports, is not installed")
    scores = random_scores(seed, protected=False, layers=1)

    class Given(kvpress.ScorerPress):
        def score(self, *args):
            return scores.clone()

    press = kvpress.AdaKVPress(Given(compression_ratio), alpha_safeguard=alpha)
    module = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"))
    press.compress(module, None, torch.empty(0), torch.empty(0), None, {})
    _, masked_heads, _ = module.masked_key_indices
    theirs = TOKENS - torch.bincount(masked_heads, minlength=HEADS)
    num_kept = int(theirs.sum()) // HEADS
    assert wished(AdaKV(alpha), scores, num_kept)[0].tolist() == theirs.tolist()


@pytest.mark.parametrize("beta", [1, 5, 20])
@pytest.mark.parametrize("num_layers", [1, 2, 30])
@pytest.mark.parametrize(("kv_len", "num_tokens"), [(4000, 400), (4000, 2000), (1000, 900), (1000, 64), (300, 90)])
def test_pyramid_equals_kvpress(beta, num_layers, kv_len, num_tokens):
    kvpress = pytest.importorskip("kvpress", reason="kvpress, or what it imports, is not installed")
    window = 32
    press = kvpress.PyramidKVPress(1 - num_tokens / kv_len, window_size=window, beta=beta)
    config = SimpleNamespace(num_hidden_layers=num_layers)
    theirs = [
        press.get_layer_budget(SimpleNamespace(config=config, layer_idx=layer), kv_len) for layer in range(num_layers)
    ]
    scores = torch.rand(num_layers, 2, kv_len)
    scores[..., -window:] = INF
    wish = wished(Pyramid(beta=beta), scores, num_tokens)
    # kvpress rounds to whole tokens
    assert (wish - torch.tensor(theirs, dtype=torch.float64)[:, None]).abs().max() <= 0.5 + 1e-6


@pytest.mark.parametrize("seed", SEEDS)
def test_global_equals_a_sort(seed):
    scores = random_scores(seed)
    ranked = sorted(
        ((float(scores[layer, head, token]), layer, head) for layer, head, token in torch.cartesian_prod(
            torch.arange(LAYERS), torch.arange(HEADS), torch.arange(TOKENS)
        ).tolist()),
        reverse=True,
    )  # fmt: skip
    expected = torch.zeros(LAYERS, HEADS, dtype=torch.float64)
    for _, layer, head in ranked[: 100 * LAYERS * HEADS]:
        expected[layer, head] += 1
    assert wished(Global(), scores, 100).equal(expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_global_floors(seed):
    scores = random_scores(seed)
    assert float(wished(Global(head_floor=0.5), scores, 100).min()) >= 50
    assert float(wished(Global(layer_floor=0.5), scores, 100).sum(1).min()) >= 50 * HEADS
    assert (wished(Global(head_floor=1), scores, 100) == 100).all()
    both = wished(Global(head_floor=0.3, layer_floor=0.8), scores, 100)
    assert float(both.min()) >= 30 and float(both.sum(1).min()) >= 80 * HEADS
    assert float(both.sum()) == 100 * LAYERS * HEADS


@pytest.mark.parametrize("seed", SEEDS)
def test_global_layer_floor_equals_a_sort(seed):
    scores = random_scores(seed)
    chosen = torch.zeros(LAYERS, HEADS * TOKENS, dtype=torch.bool)
    for layer, row in enumerate(scores.flatten(1)):
        chosen[layer, row.argsort(descending=True)[: 60 * HEADS]] = True
    rest = scores.flatten(1).masked_fill(chosen, -1).flatten().argsort(descending=True)
    chosen.view(-1)[rest[: 100 * LAYERS * HEADS - int(chosen.sum())]] = True
    expected = chosen.view(LAYERS, HEADS, TOKENS).sum(-1).double()
    assert wished(Global(layer_floor=0.6), scores, 100).equal(expected)


def test_global_floors_do_not_prefer_the_first_of_equals():
    allocator = Global(head_floor=0.2, layer_floor=0.5)
    equal = torch.full((LAYERS, HEADS, TOKENS), 0.25)
    torch.testing.assert_close(wished(allocator, equal, 100), torch.full((LAYERS, HEADS), 100.0).double())
    coarse = (10 * random_scores(0, protected=False) / random_scores(0, protected=False).amax()).round()
    wish = wished(allocator, coarse, 100)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(wished(allocator, coarse[:, order], 100), wish[:, order], rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(wished(allocator, coarse.flip(0), 100), wish.flip(0), rtol=1e-12, atol=1e-9)


def lava_formula(scores, num_tokens):
    """The paper's budgets, number by number: entropy of each layer, then the joint ranking inside it."""
    protected = SINK + RECENT
    free = scores[..., SINK : TOKENS - RECENT].double()
    entropies = []
    for layer in free:
        total = float(layer.sum())
        entropies.append(-sum(p * math.log(p) for p in (layer.flatten() / total).tolist() if p > 0))
    wish = torch.zeros(scores.shape[:2], dtype=torch.float64)
    for index, (layer, entropy) in enumerate(zip(free, entropies, strict=True)):
        budget = entropy / sum(entropies) * (num_tokens - protected) * len(free) * HEADS
        for place in layer.flatten().argsort(descending=True)[: round(budget)].tolist():
            wish[index, place // free.shape[2]] += 1
    return wish + protected


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_tokens", [20, 100, 250])
def test_lava_equals_the_formula(seed, num_tokens):
    scores = random_scores(seed)
    torch.testing.assert_close(wished(Lava(), scores, num_tokens), lava_formula(scores, num_tokens), rtol=0, atol=1e-6)


def test_lava_with_equal_entropies_has_equal_layers_and_alpha_one_equal_heads():
    one = random_scores(0, layers=1)
    layers = one[:, torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]])][0]
    wish = wished(Lava(), layers, 100)
    torch.testing.assert_close(wish.sum(1), torch.full((3,), 400.0, dtype=torch.float64), rtol=0, atol=1e-6)
    floored = wished(Lava(floor_alpha=1), random_scores(1), 100)
    torch.testing.assert_close(floored, floored[:, :1].expand_as(floored), rtol=1e-12, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_lava_shifts_scores_that_are_no_masses(seed):
    """Scores of another policy may be negative: what counts is how far they are above the lowest of their layer."""
    scores = (random_scores(seed) * 2**20).round() / 2**20  # so that the shift rounds nothing
    scores[..., 5] = 0.0
    shifted = scores - torch.tensor([3.0, 1.0, 2.0])[:, None, None]
    assert wished(Lava(), shifted, 100).equal(wished(Lava(), scores, 100))


def dense_attention(query, keys, scale):
    """[num_heads, window, kv_len] float64 softmax attention of the last queries, causal."""
    window, kv_len = len(query), keys.shape[1]
    repeated = keys.double().repeat_interleave(query.shape[1] // len(keys), 0)
    logits = torch.einsum("qhd,hkd->hqk", query.double(), repeated) * scale
    logits.masked_fill_(torch.ones(window, kv_len).triu(kv_len - window + 1).bool(), -INF)
    return logits.softmax(-1)


@pytest.mark.parametrize(("kv_len", "window"), [(70, 8), (1024, 32), (1500, 16), (2080, 32)])
def test_cake_measures_the_paper_s_entropy_and_variance(kv_len, window):
    generator = torch.Generator().manual_seed(kv_len)
    cache = make_pool(1, 2, -(-kv_len // 32) + 3, 32, 16, "transposed", "LBHNC")
    blocks = scrambled_blocks(cache, -(-kv_len // 32), generator)
    keys, values = random_kv(1, 2, kv_len, 16, generator)
    cache.write(keys, values, blocks)
    query = 3 * torch.randn(window, 6, 16, generator=generator)
    pages = cache.pool.layer_page_ids(0, blocks)
    inputs = ScoreInputs(query, cache.pool.keys, cache.pool.values, pages, kv_len, 0.25)
    attention = dense_attention(query, keys[0], 0.25)[..., : kv_len - window]
    entropy = -(attention * attention.log()).sum()
    # the public code's torch.var divides by window - 1
    variance = attention.var(dim=1).sum() * (window - 1) / window
    measured = Cake(window=window).measure(inputs)
    torch.testing.assert_close(measured, torch.stack([entropy, variance]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("tau1", "tau2"), [(1, 1), (1.6, 0.4), (1.6, 0.6)])
def test_cake_shares_by_preference(tau1, tau2):
    entropy, variance = [200.0, 500.0, 400.0], [3.0, 1.0, 2.0]
    measures = torch.tensor([entropy, variance], dtype=torch.float64).t()
    preference = [h ** (1 / tau1) * v ** (1 / tau2) for h, v in zip(entropy, variance, strict=True)]
    expected = [p / sum(preference) * (100 - SINK - RECENT) * LAYERS + SINK + RECENT for p in preference]
    wish = Cake(tau1=tau1, tau2=tau2).wish(random_scores(0), 100, measures)
    torch.testing.assert_close(wish, torch.tensor(expected).double()[:, None].expand(LAYERS, HEADS), rtol=1e-6, atol=0)


def test_cake_shares_what_a_layer_cannot_hold_equally():
    measures = torch.tensor([[1, 1], [9, 1], [2, 1], [0, 1]], dtype=torch.float64)
    wish = Cake().wish(random_scores(0, layers=4), 250, measures)[:, 0] - SINK - RECENT
    # 960 tokens to share, 390 at most: 80, 720, 160, 0; then 330 of the second go to the three others
    assert wish.tolist() == pytest.approx([190, 390, 270, 110])
    wish = Cake().wish(random_scores(0, layers=4), 350, measures)[:, 0] - SINK - RECENT
    # 1,360: 113.3, 1020, 226.7, 0, and 210 each; the third then is 46.7 too full, for the two that are left
    assert wish.tolist() == pytest.approx([1360 / 12 + 210 + 140 / 6, 390, 390, 210 + 140 / 6])
    assert Cake().wish(random_scores(0), TOKENS, measures[:3])[:, 0].tolist() == pytest.approx([TOKENS] * 3)


def test_entropy_of_flat_and_of_single_scores():
    flat, single = torch.full((1, 2, 8), 0.5), torch.zeros(1, 2, 8)
    single[0, 1, 3] = 7.0
    entropies = layer_entropies(torch.cat([flat, single]).double())
    assert entropies.tolist() == pytest.approx([math.log(16), 0.0])


def test_fixed_takes_layers_or_heads(tmp_path):
    file = tmp_path / "weights.json"
    scores = random_scores(0)
    file.write_text(json.dumps([3, 2, 1]))
    assert wished(Fixed(str(file)), scores, 100).tolist() == [[3.0] * HEADS, [2.0] * HEADS, [1.0] * HEADS]
    rows = [[1, 2, 3, 4], [0, 0, 1, 0], [5, 5, 5, 5]]
    file.write_text(json.dumps(rows))
    assert wished(Fixed(str(file)), scores, 100).tolist() == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, -1, 1]", "numbers of at least 0"),
        ("[0, 0, 0]", "numbers of at least 0"),
        ("3", "numbers of at least 0"),
        ('{"a": 1}', "a JSON file of weights"),
        ("[[1, 2], [3]]", "a JSON file of weights"),
        ("nonsense", "a JSON file of weights"),
    ],
)
def test_fixed_refuses(tmp_path, text, message):
    file = tmp_path / "weights.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"fixed\.file: expected {message}"):
        Fixed(str(file))


def test_fixed_refuses_another_model_s_weights(weights):
    with pytest.raises(
        ValueError, match=r"fixed\.file: expected weights of 2 layers of 1 or 4 heads in .*, got \(3,\)"
    ):
        wished(Fixed(weights), random_scores(0, layers=2), 100)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaKV(alpha=1.5), "adakv.alpha: expected a number from 0 to 1, got 1.5"),
        (lambda: AdaKV(alpha="a"), "adakv.alpha: expected a number from 0 to 1, got 'a'"),
        (lambda: Lava(floor_alpha=-1), "lava.floor_alpha: expected a number from 0 to 1, got -1"),
        (lambda: Global(head_floor=2), "global.head_floor"),
        (lambda: Global(layer_floor=True), "global.layer_floor"),
        (lambda: Cake(tau1=0), "cake.tau1: expected a number above 0, got 0"),
        (lambda: Cake(tau2=True), "cake.tau2: expected a number above 0, got True"),
        (lambda: Cake(window=1), "cake.window: expected a whole number of at least 2, got 1"),
        (lambda: Pyramid(beta=0.5), "pyramid.beta: expected a number of at least 1, got 0.5"),
    ],
)
def test_wrong_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()
