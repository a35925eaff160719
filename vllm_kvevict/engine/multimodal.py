"""Where a prompt has images, audio and video: vLLM's placeholders, which their embeddings take the places of."""

from __future__ import annotations

from collections.abc import Iterable

from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.eviction.protection import Spans


def spans_of(config: EvictionConfig, features: Iterable[MultiModalFeatureSpec] | None) -> Spans:
    """Return what a request protects between the ends of its prompt: as its config says, tokens of ``features``."""
    return protected_by(config, [feature.mm_position for feature in features or ()])


def protected_by(config: EvictionConfig, placeholders: Iterable[PlaceholderRange]) -> Spans:
    """Return the same, given where the placeholders are. Text inside of one, such as the time of a frame, is text."""
    if not config.protect_multimodal:
        return ()
    embedded = (stretch for place in placeholders for stretch in place.extract_embeds_range())
    return tuple((first, last + 1) for first, last in embedded)
