"""Scores that wait until all layers have theirs: on the device while there is room, else on the host."""

from __future__ import annotations

from math import prod

import torch

from vllm_kvevict.cache.staging import on_host
from vllm_kvevict.policies import scratch


class _Whole:
    """Counts as what is held."""


class HeldScores:
    """[num_reqs, num_layers, num_kv_heads, max_tokens] float32, of which a tile at a time is on the device.

    What of several requests does not fit into the scratch waits in memory of the host, which scores are copied to and
    from while nobody waits.
    """

    def __init__(self, scores: torch.Tensor, device: torch.device, is_on_host: bool, whole: object = None) -> None:
        """whole: what these are a part of, and what counts as held while there is a part of it"""
        self._all, self.device, self.is_on_host, self._whole = scores, device, is_on_host, whole

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], device: torch.device) -> HeldScores:
        """Return scores that are to be ``put``."""
        whole = _Whole()
        is_on_host = not scratch.holds(whole, 4 * prod(shape))
        scores = on_host(shape, device) if is_on_host else torch.empty(shape, device=device)
        return cls(scores, device, is_on_host, whole)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """num_reqs, num_layers, num_kv_heads, max_tokens"""
        num_reqs, num_layers, num_kv_heads, max_tokens = self._all.shape
        return num_reqs, num_layers, num_kv_heads, max_tokens

    def only(self, req: int, num_tokens: int) -> HeldScores:
        """Return those of one request, which are not copied."""
        return HeldScores(self._all[req : req + 1, :, :, :num_tokens], self.device, self.is_on_host, self._whole)

    def put(
        self, layer: int, scores: torch.Tensor, req: int | slice = slice(None), heads: torch.Tensor | None = None
    ) -> None:
        """Set the first scores of one layer: [num_kv_heads, num_tokens] of one request; or of several.

        heads: [num_heads] int64 that they are of; None: all
        """
        part = self._all[req, layer, :, : scores.shape[-1]]
        if heads is None:
            self._copy(part, scores)
        elif self.is_on_host:
            for head, of_head in zip(heads.tolist(), scores, strict=True):
                self._copy(part[head], of_head)
        else:
            part[heads] = scores

    def put_layers(self, first: int, scores: torch.Tensor) -> None:
        """Set those of some layers from ``first`` on: [num_reqs, num_layers, num_kv_heads, max_tokens]."""
        self._copy(self._all[:, first : first + scores.shape[1]], scores)

    def take(self, req: int, scores: HeldScores) -> None:
        """Set the scores of one request to those of another one, which are on the device."""
        self._copy(self._all[req, :, :, : scores.shape[3]], scores._all[0])

    def of_layers(self, first: int, end: int) -> torch.Tensor:
        """Return [num_reqs, end - first, num_kv_heads, max_tokens] on the device, to be read only."""
        return self._brought(self._all[:, first:end])

    def of_heads(self, first: int, end: int) -> torch.Tensor:
        """Return [num_reqs, end - first, max_tokens] of heads counted through all layers, likewise."""
        return self._brought(self._all.flatten(1, 2)[:, first:end])

    def _brought(self, part: torch.Tensor) -> torch.Tensor:
        if not self.is_on_host:
            return part
        on_device = torch.empty(part.shape, device=self.device)
        self._copy(on_device, part)
        return on_device

    def _copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Copy in the order of the device's work. With the host that is done in pieces without gaps: else torch would
        read or write memory of the host at once, without regard to copies that are still under way.
        """
        if to.is_contiguous():  # a policy's scores may be a transposed view
            source = source.contiguous()
        if not self.is_on_host or (to.is_contiguous() and source.is_contiguous()):
            to.copy_(source, non_blocking=True)
        else:
            for one, other in zip(to, source, strict=True):
                self._copy(one, other)
