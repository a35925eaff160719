"""Where the eviction config travels in vLLM's own, and what a request makes of it; each is parsed once per process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vllm.config import VllmConfig

from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.foreign.values import LONGEST_NAME
from vllm_kvevict.options.table import options_of_requests

FIELD = "kv_eviction"


def eviction_config(vllm_config: VllmConfig) -> EvictionConfig | None:
    """Return the eviction config that travels in ``vllm_config``, None if eviction is off."""
    additional = vllm_config.additional_config
    values = additional.get(FIELD) if isinstance(additional, dict) else None
    return None if values is None else _parsed(_Same(values))


def request_config(config: EvictionConfig, options: Mapping[str, Any], block_size: int) -> EvictionConfig | None:
    """Return how a request is evicted, None if it is not: the server's config with the request's options on top.

    Front ends check a request more than once; it is parsed the first time.

    Raises ValueError for a wrong option.
    """
    given = tuple((name, type(value), value) for name, value in options.items() if name in _REQUEST_OPTIONS)
    are_plain = all(kind in _NUMBERS or (kind is str and len(value) <= LONGEST_NAME) for _, kind, value in given)
    if are_plain and len(given) == len(options):
        return _chosen(_Same(config), given, block_size)
    return config.for_request(options, block_size)


@dataclass(frozen=True, eq=False)
class _Same:
    """A value that is one and the same as itself only; ``_parsed`` and ``_chosen`` know it by that."""

    value: Any

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value


@lru_cache(maxsize=8)
def _parsed(values: _Same) -> EvictionConfig:
    return EvictionConfig.parse(values.value)


@lru_cache(maxsize=256)
def _chosen(config: _Same, given: tuple[tuple[str, type, Any], ...], block_size: int) -> EvictionConfig | None:
    chosen: EvictionConfig | None = config.value.for_request({name: value for name, _, value in given}, block_size)
    return chosen


_NUMBERS = (int, float, bool)
_REQUEST_OPTIONS = options_of_requests(EvictionConfig)
