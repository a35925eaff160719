"""The engines of a GPU session, in the order of their importance: what each is told to do, and with how much work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACK = ROOT / ".cache" / "gpu" / "pack.tar.xz"
CANDIDATES = 3  # of every token, the best by log-probability: to tell a near tie from a fault


@dataclass(frozen=True)
class Run:
    """One engine in a process of its own.

    seconds:         after which it is ended
    policy:          None for stock vLLM, which does not load the plugin
    evicts:          False for stock vLLM, and for a budget that holds every prompt and its answer
    graphs:          CUDA graphs and torch.compile; False: --enforce-eager
    compile_backend: of torch.compile, vLLM's own if None
    attention:       --attention-backend; None leaves the choice to vLLM
    runner:          model runner, 1 or 2
    core_process:    the engine core in a process of its own, as in a server
    """

    name: str
    seconds: int
    policy: str | None = None
    evicts: bool = True
    during_decode: bool = False
    graphs: bool = False
    compile_backend: str | None = None
    attention: str | None = "FLASH_ATTN"
    runner: int = 2
    core_process: bool = False


@dataclass(frozen=True)
class Work:
    """The model and what it is asked, the same for every run. Head size 64, bfloat16, random weights.

    prompt:       tokens of the first request; each further one has ``longer_by`` more
    budget:       tokens per KV head and layer, where a run evicts
    batch_tokens: computed in a step at most, so that prompts come in chunks
    """

    num_requests: int
    prompt: int
    longer_by: int
    answer: int
    budget: int
    batch_tokens: int
    block_size: int
    num_blocks: int
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    vocab_size: int

    @property
    def longest(self) -> int:
        """Tokens of the longest request when it ends."""
        return self.prompt + self.longer_by * (self.num_requests - 1) + self.answer


# The pool holds every request whole, so that stock vLLM preempts none. Blocks of 32 tokens: the CPU takes no smaller
# ones, and its answers are the reference.
FULL = Work(16, 1536, 17, 128, 256, 2048, 32, 2048, layers=8, hidden_size=1024, heads=16, kv_heads=4, vocab_size=8192)
TINY = Work(3, 420, 17, 72, 96, 256, 32, 256, layers=2, hidden_size=256, heads=4, kv_heads=2, vocab_size=512)

EVICTED = Run("evicted_eager", 75, "snapkv")
DECODE = Run("evicted_decode_eager", 75, "tova", during_decode=True)
RUNS = (
    Run("stock_eager", 90, evicts=False),
    Run("nothing_evicted", 75, "snapkv", evicts=False),
    EVICTED,
    DECODE,
    Run("stock_graphs", 90, evicts=False, graphs=True),
    replace(EVICTED, name="evicted_graphs", seconds=90, graphs=True),
    replace(DECODE, name="evicted_decode_graphs", graphs=True),
    replace(EVICTED, name="evicted_triton", graphs=True, attention="TRITON_ATTN"),
    replace(EVICTED, name="evicted_v1", seconds=60, graphs=True, runner=1),
    replace(EVICTED, name="evicted_core_process", graphs=True, core_process=True),
)
REFERENCE = ("stock_eager", "evicted_eager", "evicted_decode_eager")  # which a CPU can run at full size


def on_cpu(run: Run) -> Run:
    """Return ``run`` as a CPU does it: model runner V1, eager, the CPU's attention, ample time."""
    return replace(run, seconds=900, graphs=False, compile_backend=None, attention=None, runner=1)
