"""Which vLLM this release works with."""

from __future__ import annotations

from importlib.metadata import version

from packaging.specifiers import SpecifierSet

SUPPORTED_VLLM = SpecifierSet(">=0.32,<0.34")


class UnsupportedVLLMError(RuntimeError):
    """The installed vLLM lacks something we build on. Raised only when eviction was asked for."""


def check_version() -> None:
    """Raise UnsupportedVLLMError if the installed vLLM is outside the supported range."""
    found = version("vllm")
    if not SUPPORTED_VLLM.contains(found, prereleases=True):
        raise UnsupportedVLLMError(f"vllm_kvevict supports vLLM {SUPPORTED_VLLM}; found {found}")
