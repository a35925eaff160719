"""Eviction without a server: the same prompt with all of its KV cache, and with a part of it.

Run it from top to bottom, or cell by cell (``# %%``) in an editor that knows notebooks. MODEL, an environment variable,
names the model or its folder. On two CPU cores the small default takes about a minute.
"""

# %% A long text, and a question that one sentence of it answers
import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # before vLLM is imported: all of it in this process

from prometheus_client import REGISTRY
from vllm import LLM, SamplingParams

from vllm_kvevict import kv_eviction_args

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")
BUDGET = 256  # tokens that each head keeps of a prompt

noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
messages = [
    {
        "role": "user",
        "content": f"{noise * 40}The name of the ship is Aurora. {noise * 40}What is the name of the ship?",
    }
]

# %% An engine that evicts: what the flags of `vllm serve` say, as arguments
llm = LLM(
    MODEL, max_model_len=4096, enforce_eager=True, disable_log_stats=False, **kv_eviction_args("snapkv", budget=BUDGET)
)


def ask(**options: object) -> str:
    """Return the answer; options are those of one request."""
    params = SamplingParams(temperature=0.0, max_tokens=16, extra_args=options or None)
    (output,) = llm.chat(messages, params, use_tqdm=False)
    num_tokens = len(output.prompt_token_ids or [])
    print(f"{options or 'as the engine says'}: {num_tokens} tokens -> {output.outputs[0].text.strip()!r}")
    return output.outputs[0].text


# %% The whole prompt: one request may refuse what the engine does
whole = ask(kv_eviction="none")

# %% 256 tokens of it in each head, chosen by SnapKV
evicted = ask()

# %% What came back to vLLM's pool while the answer was written
labels = {"policy": "snapkv", "allocator": "uniform"}
freed = REGISTRY.get_sample_value("kvevict:freed_blocks_total", labels)
print(f"blocks given back: {freed:.0f}")

# %% Other policies and budgets, request by request
for policy in ("adakv", "global"):
    ask(kv_budget_allocator=policy)
for policy in ("keydiff", "compactor"):
    ask(kv_eviction=policy, kv_budget=512)

# %% Which tokens stay, in each layer and head, shows `kvevict inspect`: docs/policies.md
