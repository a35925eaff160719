"""The smallest budget of a method."""

from __future__ import annotations

from vllm_kvevict.cache.plan import min_kept_blocks
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.options.names import PROTECT_MULTIMODAL


def check_holds(budget: object, policy: str, method: Method, block_size: int, num_multimodal: int = 0) -> None:
    """Raise ValueError if a budget, in tokens, cannot hold those that must stay in blocks of ``block_size``.

    budget:         others than a number of tokens are raised to what they must hold
    policy:         its name
    num_multimodal: protected tokens of images, audio and video
    """
    needed, is_bounded = method.min_tokens_with(num_multimodal), method.schedule.is_bounded
    smallest = (min_kept_blocks(needed, block_size, is_bounded) - 1) * block_size + 1
    if not isinstance(budget, int) or budget >= smallest:
        return
    last = "beside the block that new tokens fill"
    if not is_bounded:
        last = "of which the prompt's last block may hold but one"
    protected = f"{method.num_protected} protected"
    remedy = "start the server with a lower num_sink, num_recent or policy_options window in --kv-eviction-config"
    if num_multimodal:
        protected = f"{method.num_protected + num_multimodal} protected, {num_multimodal} of images, audio and video"
        remedy = f"say {PROTECT_MULTIMODAL} false"
    raise ValueError(
        f"kv_budget: expected at least {smallest} tokens, got {budget}: blocks hold {block_size}, and {policy!r} needs "
        f"{needed} tokens in every head ({protected}, {method.query_window} observed), {last}. Raise the budget, or "
        f"{remedy}"
    )
