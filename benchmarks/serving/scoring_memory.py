"""What scoring holds in memory, by what policies say of themselves: computed, nothing is run.

python -m benchmarks.serving.scoring_memory [--tokens 32768 131072 1048576]

Of one prompt, in MiB. On top come a tile of a fixed size, at most ``MOST_BYTES`` of logits that would else be computed
twice, and what an allocator needs.

scratch:  what grows with the prompt beside the scores, of the layers that are scored together
state:    what is summed up of the tokens while the prompt passes, of all layers
scores:   of all layers, kept until pages are allocated
choosing: held beside them then: all layers in one piece, again with protected tokens marked, which tokens stay, and
          their places while they are compacted
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from vllm_kvevict.policies import POLICIES, EvictionPolicy
from vllm_kvevict.policies.scratch import MOST_BYTES


@dataclass(frozen=True)
class Shape:
    """What a worker has of a model: layers, query heads, KV heads, head size."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int


SHAPES = {"8B": Shape(32, 32, 8, 128), "70B at TP 8": Shape(80, 8, 1, 128)}
TOKENS = (2**15, 2**17, 2**20)


def megabytes(policy: EvictionPolicy, shape: Shape, num_tokens: int) -> dict[str, float]:
    """Return MiB by what they are for."""
    sizes = shape.num_heads, shape.num_kv_heads, shape.head_size
    scores = 4 * shape.num_kv_heads * num_tokens
    beside = max(policy.scratch_bytes(*sizes) * num_tokens - scores, 0)
    together = min(policy.layers_at_once, shape.num_layers)
    num_bytes = {
        "scratch": max(beside, min(together * beside, MOST_BYTES)),
        "state": policy.state_bytes(*sizes) * shape.num_layers * num_tokens,
        "scores": scores * shape.num_layers,
        "choosing": (3 * scores + shape.num_kv_heads * num_tokens) * shape.num_layers,
    }
    return {name: each / 2**20 for name, each in num_bytes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    arguments = parser.parse_args()
    columns = ("scratch", "state", "scores", "choosing")
    print(f"| model | tokens | policy | {' | '.join(columns)} |\n|{' --- |' * (3 + len(columns))}")
    for model, shape in SHAPES.items():
        for num_tokens in arguments.tokens:
            for name in POLICIES.names():
                found = megabytes(POLICIES.get(name)(), shape, num_tokens)
                print(f"| {model} | {num_tokens:,} | {name} | {' | '.join(f'{found[c]:,.1f}' for c in columns)} |")


if __name__ == "__main__":
    main()
