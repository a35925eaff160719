"""Requests of a batch whose new tokens replace others, one by one."""

from __future__ import annotations

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvevict.cache.page_table import PageTable
from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.engine.worker.guard import Failures
from vllm_kvevict.engine.worker.model import ModelWeights
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.per_token import Peers, Replacement, TokenEvictor
from vllm_kvevict.eviction.protection import Spans
from vllm_kvevict.eviction.traits import traits_of
from vllm_kvevict.foreign.code import contained


class Replacing:
    """Finds them in each batch, by method, and runs the ``TokenEvictor`` over all that share one."""

    def __init__(self, tokens: TokenEvictor, page_table: PageTable, failures: Failures) -> None:
        self._tokens = tokens
        self._page_table = page_table
        self._failures = failures
        self._methods: dict[str, Method] = {}
        self._spans: dict[str, Spans] = {}
        self._known: tuple[list[str], int, list[tuple[Peers, torch.Tensor]]] = ([], -1, [])

    def add(self, req_ids: list[str], method: Method, spans: list[Spans], victims: torch.Tensor) -> None:
        """From their next tokens on requests replace what they hold, but not what ``spans`` of each protect.

        victims: as for ``TokenEvictor.open_holes``
        """
        shared = next((known for known in self._methods.values() if _are_equal(known, method)), method)
        self._methods |= dict.fromkeys(req_ids, shared)
        self._spans |= zip(req_ids, spans, strict=True)
        self._tokens.open_holes(req_ids, victims)

    def remove(self, req_id: str) -> None:
        """A request has ended, has failed, or starts again."""
        if self._methods.pop(req_id, None) is not None:
            del self._spans[req_id]
            self._known = ([], -1, [])

    def rows(self, req_ids: list[str], common: CommonAttentionMetadata) -> list[Replacement]:
        """Prepare such requests of a batch. Who they are is looked up only when something has changed."""
        known_ids, generation, groups = self._known
        if generation != self._page_table.generation or known_ids != req_ids:
            rows: dict[int, list[int]] = {}
            for row, req_id in enumerate(req_ids if self._methods else []):
                if req_id in self._methods:
                    # by identity: options of a third party's policy may be lists, which have no hash
                    rows.setdefault(id(self._methods[req_id]), []).append(row)
            groups = [
                (self._peers([req_ids[row] for row in those]), to_device(np.array(those), common.seq_lens.device))
                for those in rows.values()
            ]
            self._known = (req_ids, self._page_table.generation, groups)
        replacements = []
        for peers, those in groups:
            with self._failures.of(peers.req_ids, "the policy of a step"):
                replacements.append(self._replacement(peers, those, common))
        return replacements

    def _peers(self, req_ids: list[str]) -> Peers:
        return self._tokens.peers(self._methods[req_ids[0]], req_ids, [self._spans[req_id] for req_id in req_ids])

    def _replacement(self, peers: Peers, rows: torch.Tensor, common: CommonAttentionMetadata) -> Replacement:
        """rows: [num_reqs] of the batch."""
        num_tokens = common.seq_lens[rows].to(torch.int64)
        last = (num_tokens - 1) // self._tokens.block_size
        blocks = common.block_table_tensor[rows].gather(1, last[:, None])[:, 0]
        return self._tokens.prepare(peers, num_tokens, common.max_seq_len, blocks)

    def fill_holes(self, replacements: list[Replacement], layer: int) -> None:
        """Move the new tokens of one layer into their holes."""
        for replacement in replacements:
            self._tokens.fill_holes(layer, replacement)

    def choose_holes(self, replacements: list[Replacement], weights: ModelWeights) -> None:
        """Choose which tokens the next ones replace; a policy that fails ends its requests."""
        for replacement in replacements:
            req_ids = replacement.peers.req_ids
            if req_ids[0] in self._failures:  # all of them fail together
                continue
            with self._failures.of(req_ids, "choosing what the next tokens replace"):
                needs = traits_of(replacement.peers.method.policy).needs
                self._tokens.choose_holes(replacement, *weights.of_layers(needs))


def _are_equal(one: Method, other: Method) -> bool:
    with contained():  # a third party's options may be tensors, whose equality is no truth value
        return one is other or one == other
    return False
