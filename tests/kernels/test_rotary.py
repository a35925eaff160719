"""Rotary against transformers' Llama, against dense rotation matrices, and there and back."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from vllm_kvevict.kernels.rotary import Rotary

HEADS, HEAD_SIZE, MAX_POSITION = 3, 64, 131_072
POSITIONS = torch.tensor([0, 1, 2, 31, 4095, 8191, 65_537, MAX_POSITION - 1])

# A turned number is the sum of two products of float32 numbers of magnitude 1 to 4: a few units in the last place.
TOLERANCE = {"rtol": 0, "atol": 2e-6}

SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 500_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
    },
}


def llama_config(scaling):
    config = LlamaConfig(
        hidden_size=HEADS * HEAD_SIZE,
        num_attention_heads=HEADS,
        head_dim=HEAD_SIZE,
        max_position_embeddings=MAX_POSITION,
        rope_parameters=SCALINGS[scaling],
    )
    assert config.rope_parameters["rope_type"] == scaling
    return config


def angles_and_magnitude(scaling):
    """[MAX_POSITION, rotary_dim / 2] float32 angles as models compute them, and what cosines and sines are times."""
    if scaling == "default":
        frequencies, magnitude = LlamaRotaryEmbedding(llama_config(scaling)).inv_freq, 1.0
    else:
        frequencies, magnitude = ROPE_INIT_FUNCTIONS[scaling](llama_config(scaling), torch.device("cpu"))
    return torch.arange(MAX_POSITION).float()[:, None] * frequencies.float(), magnitude


def make_rotary(scaling="default", is_neox_style=True, rotary_dim=HEAD_SIZE):
    angles, magnitude = angles_and_magnitude(scaling)
    angles = angles[:, : rotary_dim // 2]
    return Rotary(torch.cat([angles.cos(), angles.sin()], dim=1) * magnitude, is_neox_style)


def dense(rotary, x, positions):
    """Each vector times a matrix [head_size, head_size] float64 with one 2 x 2 block for each pair."""
    dim = rotary.cos_sin.shape[1]
    half = dim // 2
    pairs = [(i, i + half) if rotary.is_neox_style else (2 * i, 2 * i + 1) for i in range(half)]
    turned = torch.empty_like(x, dtype=torch.float64)
    for index, position in enumerate(positions.tolist()):
        matrix = torch.eye(x.shape[-1], dtype=torch.float64)
        for i, (first, second) in enumerate(pairs):
            cos, sin = float(rotary.cos_sin[position, i]), float(rotary.cos_sin[position, half + i])
            matrix[first, first], matrix[first, second] = cos, -sin
            matrix[second, first], matrix[second, second] = sin, cos
        turned[..., index, :] = x[..., index, :].double() @ matrix.T
    return turned


@pytest.mark.parametrize("scaling", SCALINGS)
def test_rotates_as_transformers_does(scaling):
    x = torch.randn(1, HEADS, len(POSITIONS), HEAD_SIZE)
    cos, sin = LlamaRotaryEmbedding(llama_config(scaling))(x, POSITIONS[None])
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    torch.testing.assert_close(make_rotary(scaling).rotate(x[0], POSITIONS), expected[0], **TOLERANCE)


@pytest.mark.parametrize("scaling", ["default", "yarn"])
@pytest.mark.parametrize("rotary_dim", [HEAD_SIZE, 32, 2])
@pytest.mark.parametrize("is_neox_style", [True, False])
def test_rotates_by_the_matrix(scaling, rotary_dim, is_neox_style):
    rotary = make_rotary(scaling, is_neox_style, rotary_dim)
    x = torch.randn(HEADS, len(POSITIONS), HEAD_SIZE)
    turned = rotary.rotate(x, POSITIONS)
    torch.testing.assert_close(turned, dense(rotary, x, POSITIONS).float(), **TOLERANCE)
    assert turned[..., rotary_dim:].equal(x[..., rotary_dim:])


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("rotary_dim", [HEAD_SIZE, 32])
@pytest.mark.parametrize("is_neox_style", [True, False])
def test_there_and_back(scaling, rotary_dim, is_neox_style):
    """Also far from position 0: what was turned is turned back by the same table, so its own error cancels."""
    rotary = make_rotary(scaling, is_neox_style, rotary_dim)
    x = torch.randn(HEADS, len(POSITIONS), HEAD_SIZE)
    torch.testing.assert_close(rotary.unrotate(rotary.rotate(x, POSITIONS), POSITIONS), x, **TOLERANCE)
    torch.testing.assert_close(rotary.rotate(rotary.unrotate(x, POSITIONS), POSITIONS), x, **TOLERANCE)


def test_yarn_is_longer_by_its_magnitude():
    _, magnitude = angles_and_magnitude("yarn")
    assert magnitude > 1.3
    x = torch.randn(HEADS, len(POSITIONS), HEAD_SIZE)
    turned = make_rotary("yarn").rotate(x, POSITIONS)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1) * magnitude, rtol=1e-5, atol=0)
    back = make_rotary("yarn").unrotate(x, POSITIONS)
    torch.testing.assert_close(back.norm(dim=-1), x.norm(dim=-1) / magnitude, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_tables_of_half_precision_turn_back_what_they_turned(dtype, bound):
    """vLLM's tables have the model's dtype: their rows are not of length 1, and the inverse makes up for it."""
    exact = make_rotary()
    rotary = Rotary(exact.cos_sin.to(dtype), True)
    x = torch.randn(HEADS, len(POSITIONS), HEAD_SIZE)
    torch.testing.assert_close(rotary.unrotate(rotary.rotate(x, POSITIONS), POSITIONS), x, **TOLERANCE)
    off = (exact.unrotate(rotary.rotate(x, POSITIONS), POSITIONS) - x).abs().amax()
    assert bound / 10 < off < bound


def test_positions_of_any_order():
    rotary, x = make_rotary(), torch.randn(HEADS, len(POSITIONS), HEAD_SIZE)
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    assert rotary.rotate(x[:, order], POSITIONS[order]).equal(rotary.rotate(x, POSITIONS)[:, order])
