"""Rotary position embeddings, forwards and backwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rotary:
    """How a model rotates its queries and keys: the table that it uses itself, whatever scaling made it.

    cos_sin:       [max_position, rotary_dim], cosines in the first half of a row, sines in the second; YaRN's and
                   LongRoPE's magnitude is in them
    is_neox_style: whether a pair is (i, i + rotary_dim / 2), as in Llama, or (2 i, 2 i + 1), as in GPT-J
    """

    cos_sin: torch.Tensor
    is_neox_style: bool

    @classmethod
    def none(cls, device: torch.device) -> Rotary:
        """Return the one of a layer that rotates nothing: at any position cosine 1 and sine 0."""
        return cls(torch.tensor([[1.0, 0.0]], device=device).expand(1 << 30, 2), True)

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return ``x`` [..., num_tokens, head_size] float32 as the model rotates it at ``positions`` [num_tokens].

        Dimensions past ``rotary_dim`` are left as they are.
        """
        cos, sin = self._cos_sin(positions)
        return self._turn(x, cos, sin)

    def unrotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return what ``rotate`` would make ``x`` of, magnitude included."""
        cos, sin = self._cos_sin(positions)
        squared_magnitude = cos.square() + sin.square()
        return self._turn(x, cos / squared_magnitude, -sin / squared_magnitude)

    def _cos_sin(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.cos_sin[positions].float().chunk(2, dim=-1)
        return cos, sin

    def _turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        dim = self.cos_sin.shape[-1]
        turned, rest = x[..., :dim], x[..., dim:]
        if self.is_neox_style:
            first, second = turned.chunk(2, dim=-1)
        else:
            first, second = turned[..., 0::2], turned[..., 1::2]
        pair = first * cos - second * sin, second * cos + first * sin
        joined = torch.cat(pair, dim=-1) if self.is_neox_style else torch.stack(pair, dim=-1).flatten(-2)
        return torch.cat([joined, rest], dim=-1)
