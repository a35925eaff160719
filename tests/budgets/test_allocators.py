"""What every registered allocator must do, and what each of them says it does."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from vllm_kvevict.budgets import ALLOCATORS, round_to_pages
from vllm_kvevict.budgets.adakv import AdaKV
from vllm_kvevict.budgets.fixed import Fixed
from vllm_kvevict.budgets.global_ import Global
from vllm_kvevict.budgets.lava import Lava, layer_entropies
from vllm_kvevict.budgets.pyramid import Pyramid
from vllm_kvevict.budgets.uniform import Uniform

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


@pytest.mark.parametrize("seed", SEEDS)
def test_wishes_are_amounts_for_every_layer_and_head(allocator, seed):
    scores = random_scores(seed)
    before = scores.clone()
    wish = allocator.wish(scores, 100)
    assert wish.shape == (LAYERS, HEADS)
    assert wish.dtype == torch.float64
    assert torch.isfinite(wish).all() and (wish >= 0).all()
    assert scores.equal(before)


@pytest.mark.parametrize("seed", SEEDS)
def test_wishes_round_to_pages_that_sum_and_keep_the_minimum(allocator, seed):
    pages = round_to_pages(allocator.wish(random_scores(seed), 100), 6 * LAYERS * HEADS, 1, TOKENS // 16)
    assert int(pages.sum()) == 6 * LAYERS * HEADS
    assert int(pages.min()) >= 1 and int(pages.max()) <= TOKENS // 16


@pytest.mark.parametrize("seed", SEEDS)
def test_permuting_heads_and_layers_permutes_the_wish(allocator, seed):
    scores = random_scores(seed)
    generator = torch.Generator().manual_seed(seed)
    heads, layers = torch.randperm(HEADS, generator=generator), torch.randperm(LAYERS, generator=generator)
    wish = allocator.wish(scores, 100)
    torch.testing.assert_close(allocator.wish(scores[:, heads], 100), wish[:, heads], rtol=1e-12, atol=1e-9)
    if not isinstance(allocator, Pyramid | Fixed):
        torch.testing.assert_close(allocator.wish(scores[layers], 100), wish[layers], rtol=1e-12, atol=1e-9)


def test_equal_scores_share_equally(allocator):
    if isinstance(allocator, Pyramid | Fixed):
        pytest.skip("ignores scores by definition")
    scores = torch.full((LAYERS, HEADS, TOKENS), 0.25)
    scores[..., -RECENT:] = INF
    wish = allocator.wish(scores, 100)
    torch.testing.assert_close(wish, torch.full_like(wish, 100), rtol=1e-12, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [name for name in ALLOCATORS.names() if name not in STATIC])
def test_the_budget_is_spent_and_no_head_exceeds_the_prompt(name, seed):
    wish = ALLOCATORS.get(name)().wish(random_scores(seed), 100)
    # lava rounds each layer's budget to whole tokens
    assert float(wish.sum()) == pytest.approx(100 * LAYERS * HEADS, abs=LAYERS)
    assert float(wish.max()) <= TOKENS and float(wish.min()) >= SINK + RECENT - 1e-9
    assert float(wish.max() / wish.min()) > 1.5, "nothing ragged about it"


def test_uniform():
    assert (Uniform().wish(random_scores(0), 36) == 36).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_adakv_keeps_layers_equal_and_alpha_one_is_uniform(seed):
    scores = random_scores(seed)
    assert AdaKV().wish(scores, 100).sum(1).tolist() == [400.0] * LAYERS
    assert (AdaKV(alpha=1).wish(scores, 100) == 100).all()
    assert float(AdaKV(alpha=0.5).wish(scores, 100).min()) >= 50


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
    assert AdaKV(alpha).wish(scores, num_kept)[0].tolist() == theirs.tolist()


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
    wish = Pyramid(beta=beta).wish(scores, num_tokens)
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
    assert Global().wish(scores, 100).equal(expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_global_floors(seed):
    scores = random_scores(seed)
    assert float(Global(head_floor=0.5).wish(scores, 100).min()) >= 50
    assert float(Global(layer_floor=0.5).wish(scores, 100).sum(1).min()) >= 50 * HEADS
    assert (Global(head_floor=1).wish(scores, 100) == 100).all()


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
    torch.testing.assert_close(Lava().wish(scores, num_tokens), lava_formula(scores, num_tokens), rtol=0, atol=1e-6)


def test_lava_with_equal_entropies_has_equal_layers_and_alpha_one_equal_heads():
    one = random_scores(0, layers=1)
    layers = one[:, torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]])][0]
    wish = Lava().wish(layers, 100)
    torch.testing.assert_close(wish.sum(1), torch.full((3,), 400.0, dtype=torch.float64), rtol=0, atol=1e-6)
    floored = Lava(floor_alpha=1).wish(random_scores(1), 100)
    torch.testing.assert_close(floored, floored[:, :1].expand_as(floored), rtol=1e-12, atol=0)


def test_entropy_of_flat_and_of_single_scores():
    flat, single = torch.full((1, 2, 8), 0.5), torch.zeros(1, 2, 8)
    single[0, 1, 3] = 7.0
    entropies = layer_entropies(torch.cat([flat, single]).double())
    assert entropies.tolist() == pytest.approx([math.log(16), 0.0])


def test_fixed_takes_layers_or_heads(tmp_path):
    file = tmp_path / "weights.json"
    scores = random_scores(0)
    file.write_text(json.dumps([3, 2, 1]))
    assert Fixed(str(file)).wish(scores, 100).tolist() == [[3.0] * HEADS, [2.0] * HEADS, [1.0] * HEADS]
    rows = [[1, 2, 3, 4], [0, 0, 1, 0], [5, 5, 5, 5]]
    file.write_text(json.dumps(rows))
    assert Fixed(str(file)).wish(scores, 100).tolist() == rows


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
    with pytest.raises(ValueError, match=r"fixed\.file: expected 2 layers of 1 or 4 heads, got \(3, 1\)"):
        Fixed(weights).wish(random_scores(0, layers=2), 100)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaKV(alpha=1.5), "adakv.alpha: expected a number from 0 to 1, got 1.5"),
        (lambda: AdaKV(alpha="a"), "adakv.alpha: expected a number from 0 to 1, got 'a'"),
        (lambda: Lava(floor_alpha=-1), "lava.floor_alpha: expected a number from 0 to 1, got -1"),
        (lambda: Global(head_floor=2), "global.head_floor"),
        (lambda: Global(layer_floor=True), "global.layer_floor"),
        (lambda: Pyramid(beta=0.5), "pyramid.beta: expected a number of at least 1, got 0.5"),
    ],
)
def test_wrong_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()
