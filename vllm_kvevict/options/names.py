"""Names that users write: of options, and of what they may say in them."""

from __future__ import annotations

from vllm_kvevict.foreign.values import LONGEST_NAME, quoted

POLICY = "kv_eviction"
BUDGET = "kv_budget"
BUDGET_CALIBRATION = "kv_budget_calibration"
BUDGET_MIN = "kv_budget_min"
BUDGET_MAX = "kv_budget_max"
ALLOCATOR = "kv_budget_allocator"
DURING_DECODE = "kv_evict_during_decode"
DURING_PREFILL = "kv_evict_during_prefill"
PROTECT_MULTIMODAL = "kv_protect_multimodal"
INTERVAL = "kv_evict_interval"
MAX_NUM_SEQS = "kv_evict_max_num_seqs"
LOG_REQUESTS = "kv_eviction_log_requests"
LIMITS = "kv_request_options"

VLLM_FIELD = "vllm_xargs"  # where a request gives its options over HTTP
NONE = "none"
AUTO = "auto"
ALL = "all"

# vLLM itself reads these of a request's ``extra_args``, where ``vllm_xargs`` arrive (v1/request.py)
_VLLM_OPTIONS = ("kv_transfer_params", "kv_cache_report_mode")


def is_ours(name: object) -> bool:
    """Whether an option is meant for us: its name begins as ours do, and vLLM has none of that name."""
    return isinstance(name, str) and name[:3].lower() in ("kv_", "kv-") and name not in _VLLM_OPTIONS


def flag_of(name: str) -> str:
    """Return how an option is written on a command line."""
    return f"--{name.replace('_', '-')}"


def checked_name(option: str, name: object, expected: str) -> str:
    """Return the name that a request gave.

    Raises ValueError if it is no text, or longer than any name, before it is compared with others.
    """
    if not isinstance(name, str):
        raise ValueError(f"{option}: expected {expected}, got {quoted(name)}")
    if len(name) > LONGEST_NAME:
        raise ValueError(f"{option}: expected {expected}, got a text of {len(name)} characters")
    return name


def checked_switch(option: str, value: object) -> bool:
    """Return what a request said: over HTTP vLLM takes texts and numbers only, and JSON's true arrives as 1."""
    words = {"true": True, "false": False, 1: True, 0: False}
    if not isinstance(value, str | int | float) or value not in words:
        raise ValueError(f"{option}: expected true or false, got {quoted(value)}")
    return words[value]
