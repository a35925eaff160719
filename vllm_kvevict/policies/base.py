"""What a policy may ask for, and the one method it must write."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, ClassVar

import torch

from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.inputs import ScoreInputs, StepInputs
from vllm_kvevict.policies.options import check_options
from vllm_kvevict.policies.prompt_chunks import PromptChunks
from vllm_kvevict.registry import Registry


class Need(Enum):
    """What a policy may ask for beside the cache and the last queries. The engine gathers what is asked for only."""

    ALL_QUERIES = "the queries of every token of the prompt"
    OUTPUTS = "the attention outputs of the last queries"
    ROTARY = "the rotary embedding of the model"
    OUTPUT_PROJECTION = "the output projection of the attention (W_O)"


class EvictionPolicy(ABC):
    """Ranks cached tokens. It does not decide how many stay, and it moves nothing.

    Subclasses are frozen dataclasses: their fields are the options that a user may set, and the annotation of a field
    says which values it may have (``vllm_kvevict.policies.options``). The engine reads their properties once, when they
    are built (``vllm_kvevict.eviction.traits``).

    name:      the policy's in messages about its options; one that has none is called by the name of its class
    paper:     what to cite, for the table of policies
    old_names: options that had another name, old -> new: configurations may use it until 0.2
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    old_names: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        """Raise ValueError for an option that its annotation does not allow; subclasses may check more."""
        check_options(self)

    @property
    def query_window(self) -> int:
        """Last queries of the prompt that the engine must hold for ``score``."""
        return 0

    @property
    def needs(self) -> frozenset[Need]:
        """What else the engine must hand over. A model or a request that cannot provide it is refused by name."""
        return frozenset()

    @property
    def query_aware(self) -> bool:
        """Whether the end of the prompt, where a question stands, decides what is kept."""
        return self.query_window > 0

    @property
    def num_sink(self) -> int:
        """Tokens at the start of the prompt that the published method always keeps."""
        return 0

    @property
    def num_recent(self) -> int:
        """Tokens at the end of the prompt that the published method always keeps."""
        return 0

    @property
    def evicts_during_decode(self) -> bool:
        """Whether the published method goes on while the answer grows; a user may ask any policy to."""
        return False

    @property
    def num_deferred(self) -> int:
        """Tokens of the answer that a prompt waits for to be evicted, the last queries being theirs; 0: for none."""
        return 0

    @property
    def num_pseudo_tokens(self) -> int:
        """Greedy tokens that the engine generates behind the prompt, and forgets, for the sake of their queries.

        What they may see of the prompt is chosen by ``preselect``; ``score`` finds the queries as
        ``inputs.pseudo_query``.
        """
        return 0

    @property
    def supports_decode(self) -> bool:
        """Whether ``score`` means the same of what is left of a prompt and its answer, in the order of their positions.

        A policy that observes all queries also needs a state of [num_kv_heads, kv_len] float32, one number per token:
        the engine moves it with its tokens.
        """
        return self.needs <= {Need.OUTPUT_PROJECTION}

    @classmethod
    def supports_per_token(cls) -> bool:
        """Return whether it can evict token by token, by ``score_step``."""
        return cls.score_step is not EvictionPolicy.score_step

    @property
    def default_allocator(self) -> str:
        """Allocator of the published method."""
        return "uniform"

    @abstractmethod
    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        """Return the most bytes per token of the prompt that ``score`` or ``observe`` holds at once, results included.

        For one layer; ``layers_at_once`` of them are scored together. What does not grow with the prompt is left out.
        """

    def state_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        """Return the bytes per token and layer that ``observe`` keeps until the prompt ends; again what grows."""
        return 0

    def observed_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        """Return the bytes per prompt and layer that ``observe`` keeps beside those, at most: what does not grow."""
        return 0

    def observe(self, state: Any, inputs: ScoreInputs) -> Any:
        """Look at a chunk of the prompt; return what ``score`` shall find as ``inputs.state``.

        Called for every chunk of every layer, the last one included, if ``Need.ALL_QUERIES`` is among the needs;
        ``inputs.query`` then holds all queries of the chunk. The chunks follow each other without a gap: such a
        prompt takes nothing from the prefix cache. Chunks are cut anywhere.

        state: what the call for the chunk before returned, None for the first
        """
        raise NotImplementedError

    def observe_chunks(self, states: Sequence[Any], chunks: PromptChunks) -> list[Any]:
        """Look at the chunks of several prompts; return of each what ``observe`` would. ``states`` stay as they are.

        A policy that has it is asked for all prompts of a step together, in a number of launches that does not depend
        on how many they are, and without waiting for the device; the others prompt by prompt.

        states: of each prompt, what the call for the chunk before returned, None for the first
        """
        raise NotImplementedError

    def score_step(self, inputs: StepInputs) -> torch.Tensor:
        """Return [num_rows, num_kv_heads, num_slots] float32; of what a head holds the lowest unprotected one goes.

        Called for all layers in every step of a decode that evicts token by token. The scores of a policy that
        observes all queries are the sums that it will find as ``inputs.state`` in the next step.
        """
        raise NotImplementedError

    def preselect(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return [num_kv_heads, num_tokens] int64, in any order, the tokens of the prompt that pseudo tokens see.

        Called for every layer before ``score``, with the same inputs but for ``pseudo_query``, if there are to be
        pseudo tokens.
        """
        raise NotImplementedError

    def preselect_batch(self, batch: ScoreBatch) -> torch.Tensor:
        """Return [num_reqs, num_layers, num_kv_heads, num_tokens] int64: of each prompt what ``preselect`` would, and
        -1 behind it. As ``score_batch`` is to ``score``.
        """
        raise NotImplementedError

    @abstractmethod
    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return [num_kv_heads, kv_len] float32 scores; the highest stay. Protection is not the scorer's business."""

    @property
    def layers_at_once(self) -> int:
        """Layers that ``score_layers`` is given together, once the last of them has run."""
        return 1

    def score_layers(self, layers: Sequence[ScoreInputs]) -> list[torch.Tensor]:
        """Return what ``score`` would for each of several layers of one prompt."""
        return [self.score(inputs) for inputs in layers]

    def score_batch(self, batch: ScoreBatch) -> torch.Tensor:
        """Return [num_reqs, num_layers, num_kv_heads, max_kv_len] float32: in every row what ``score`` would return of
        that head, and anything behind its tokens.

        A policy that has it is asked for all requests that are evicted in a step together, in a number of launches that
        does not depend on how many they are, and without waiting for the device; the others request by request.
        """
        raise NotImplementedError

    def observe_batch(self, batch: ScoreBatch) -> torch.Tensor:
        """Return [num_reqs, num_layers, num_kv_heads, max_kv_len] float32, the next ``batch.state``: as ``observe``, of
        requests that are evicted again.

        For a policy that has ``score_batch`` and observes all queries.
        """
        raise NotImplementedError


POLICIES: Registry[EvictionPolicy] = Registry(
    "eviction policy",
    EvictionPolicy,  # type: ignore[type-abstract]
    "vllm_kvevict.policies",
)
