"""What we rely on in vLLM is there: in the installed one, and in the newest one that we say we support.

The newest one's wheel is downloaded, once, into .cache/wheels, and only read (tools/upstream). Another one:
``KVEVICT_NEWEST=0.34.0 python -m pytest tests/engine/test_upstream.py``, or ``python -m tools.upstream 0.34.0``.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs

from tools import newest_vllm
from tools.upstream.checks import CHECKS, Finding, findings
from tools.upstream.ours import Upstream
from tools.upstream.program import parsed
from tools.upstream.sources import Source, Sources, installed_vllm, our_sources, vllm_sources
from tools.upstream.values import Class, Instance
from vllm_kvevict import kv_eviction_args
from vllm_kvevict.engine import versions
from vllm_kvevict.engine.frontend.install import install_flags
from vllm_kvevict.options.names import is_ours

pytestmark = pytest.mark.on_v1

NEWEST = os.environ.get("KVEVICT_NEWEST", newest_vllm.NEWEST)
VERSIONS = sorted({installed_vllm(), NEWEST})
# what we read of objects whose types no annotation tells, in our code or in vLLM's: class -> attributes
ATTRIBUTES = {
    "vllm.config.model_arch:ModelArchitectureConfig": ["head_size", "total_num_hidden_layers"],
    "vllm.logprobs:Logprob": ["logprob"],
    "vllm.outputs:CompletionOutput": ["text", "token_ids"],
    "vllm.model_executor.layers.attention:Attention": ["get_attn_backend", "impl", "layer_name"],
    "vllm.model_executor.layers.linear:RowParallelLinear": ["input_size_per_partition", "quant_method"],
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors:CompressedTensorsConfig": [
        "kv_cache_scheme"
    ],
    "vllm.model_executor.layers.rotary_embedding.base:RotaryEmbedding": ["cos_sin_cache", "is_neox_style"],
    "vllm.model_executor.models.llama:LlamaAttention": ["o_proj", "rotary_emb"],
    "vllm.model_executor.models.llama:LlamaForCausalLM": ["compute_logits"],
    # what ours set: vLLM has to go on asking for it by these names
    "vllm.v1.attention.backend:AttentionImpl": ["fused_output_quant_supported", "supports_quant_query_input"],
    "vllm.v1.attention.backend:AttentionMetadataBuilder": ["supports_draft_decode_metadata_update"],
    "vllm.v1.attention.backend:AttentionLayer": ["_k_scale", "_k_scale_float", "_v_scale", "_v_scale_float"],
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager": ["enable_caching", "kv_cache_group_id"],
    "vllm.v1.kv_cache_interface:SlidingWindowSpec": ["max_admission_blocks_per_request"],
    "vllm.v1.worker.gpu_input_batch:InputBatch": ["req_ids"],
    "vllm.v1.worker.gpu.model_runner:BatchReqState": ["req_ids"],
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": [
        "attn_groups",
        "cudagraph_manager",
        "execute_model_state",
        "get_model",
        "req_states",
        "speculator",
        "vllm_config",
    ],
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": [
        "attn_groups",
        "drafter",
        "execute_model_state",
        "get_model",
        "input_batch",
        "input_ids",
        "vllm_config",
    ],
    "vllm.v1.worker.utils:AttentionGroup": ["layer_names", "metadata_builders"],
}


@cache
def ours_on(version: str) -> Upstream:
    newest = None if version == NEWEST else ours_on(NEWEST)
    return Upstream(our_sources(), vllm_sources(version), newest)


@cache
def found_on(version: str) -> dict[str, list[Finding]]:
    return findings(ours_on(version))


@pytest.fixture(scope="module", autouse=True)
def trees() -> Iterator[None]:
    """Syntax trees are many objects: no collection goes through them, and none of them stays."""
    gc.disable()
    yield
    gc.enable()
    for cached in (ours_on, found_on, parsed):
        cached.cache_clear()


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    try:
        ours_on(request.param)
    except newest_vllm.NoWheelError as error:
        pytest.skip(str(error))
    return request.param


@pytest.mark.parametrize("found", ["0.31.2", "0.34.0", "1.0.0"])
def test_another_version_is_refused_in_one_sentence(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    install_flags()
    monkeypatch.setattr(versions, "version", lambda name: found)
    settings = kv_eviction_args("snapkv", 256)
    with pytest.raises(versions.UnsupportedVLLMError) as error:
        EngineArgs(model=str(tiny_llama), skip_tokenizer_init=True, **settings).create_engine_config()
    assert str(error.value) == f"vllm_kvevict supports vLLM {versions.SUPPORTED_VLLM}; found {found}"
    EngineArgs(model=str(tiny_llama), skip_tokenizer_init=True).create_engine_config()


@pytest.mark.compat
@pytest.mark.parametrize("name", CHECKS)
def test_nothing_of_ours_breaks(version: str, name: str) -> None:
    broken = found_on(version)[name]
    assert not broken, f"{CHECKS[name].__doc__} Not so on vLLM {version}:\n" + "\n".join(map(str, broken))


@pytest.mark.compat
@pytest.mark.parametrize("version", VERSIONS)
def test_vllm_reads_no_more_options_that_are_called_like_ours(version: str) -> None:
    """Others than these are refused as misspelt."""
    texts = [ours_on(version).program.source(module).text for module in ours_on(version).their_modules]
    reading = re.compile(r'(?:\bextra\[|extra_args(?:\.get\(|\[|=\{))\s*"(kv_\w+)"')
    found = {name for text in texts if "extra" in text for name in reading.findall(text)}
    assert found == {"kv_transfer_params", "kv_cache_report_mode"}
    assert not any(is_ours(name) for name in found)


@pytest.mark.parametrize("path", ATTRIBUTES)
def test_what_we_read_is_there(version: str, path: str) -> None:
    upstream = ours_on(version)
    cls = upstream.program.named(path)
    assert isinstance(cls, Class), f"{path} is gone"
    text = upstream.program.source(cls.module).text
    lost = [name for name in ATTRIBUTES[path] if not upstream.has(Instance(cls), name) and f'("{name}"' not in text]
    assert not lost


# Each of these is reached in another way; the check has to find them by itself.
@pytest.mark.compat
def test_a_borrowed_name_that_is_gone_is_found() -> None:
    borrowed = (
        "_cached_get_attn_backend",
        "_ensure_registered",
        "_remove_blocks_in_range",
        "execute_model_state",
        "kv_connector_stats",
    )
    pattern = re.compile(rf"\b(?:{'|'.join(borrowed)})\b")
    theirs = {
        name: Source(source.file, pattern.sub("renamed", source.text), source.package)
        for name, source in vllm_sources(installed_vllm()).items()
    }
    text = "\n".join(map(str, findings(Upstream(our_sources(), theirs), ["names"])["names"]))
    assert [name for name in borrowed if f"has no {name!r}" not in text] == []


THEIRS = """
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

@dataclass
class Batch:
    num_tokens: int

    def replace(self, **fields):
        return replace(self, **fields)

class Output(ABC):
    @abstractmethod
    def get(self): ...

class Pool:
    def _take(self, num_blocks, *, at): ...

def make_pool() -> Pool: ...

class Scheduler:
    def __init__(self, config) -> None:
        self.errors: set[str] = set()
        self.pool = make_pool()

    def hit(self, request, num_tokens=0): ...

    def schedule(self, request):
        return self.hit(request, num_tokens=1)

    def count(self, batch: Batch): ...
"""
OURS = """
from vllm.v1.scheduler import Batch, Output, Scheduler
from vllm_kvevict.patches import Patch

class Mixin(Scheduler):
    def hit(self, request, num_tokens=0):
        self.errors.add(request)
        self.pool._take(2, at=request)
        return super().hit(request, num_tokens=num_tokens)

class Ours(Mixin):
    def count(self, batch):
        return super().count(batch.replace(num_tokens=1))

class OurOutput(Output):
    def get(self): ...

def with_more(schedule):
    def wrapper(self, request):
        return schedule(self, request)
    return wrapper

PATCHES = [Patch("vllm.v1.scheduler:Scheduler.schedule", with_more)]
"""


def found_in(theirs: str, ours: str = OURS, newest: Upstream | None = None) -> dict[str, list[str]]:
    upstream = toy(theirs, ours, newest)
    return {name: [finding.text for finding in found] for name, found in findings(upstream).items() if found}


def toy(theirs: str, ours: str = OURS, newest: Upstream | None = None) -> Upstream:
    """A vLLM with one module, and a package of ours with one, wherever it lies."""
    return Upstream(module("vllm_kvevict.any.where", ours), module("vllm.v1.scheduler", theirs), newest)


def module(name: str, text: str) -> Sources:
    return {name: Source(f"{name.replace('.', '/')}.py", text, name.rpartition(".")[0])}


def test_a_vllm_that_we_are_made_for_breaks_nothing() -> None:
    assert found_in(THEIRS) == {}


@pytest.mark.parametrize(
    ("before", "after", "name", "says"),
    [
        ("num_tokens=0)", "num_tokens=0, limit=None)", "overrides", "too many positional arguments"),
        ("num_tokens=0)", "tokens=0)", "overrides", "unexpected keyword argument 'tokens'"),
        ("request, num_tokens=0)", "num_tokens, request=0)", "overrides", "given by position, comes in as"),
        ("hit(self, request, num_tokens=0)", "hit(self, request)", "our_calls", "argument 'num_tokens'"),
        ("    def hit(self, ", "    @staticmethod\n    def hit(", "overrides", "theirs is a static method"),
        ("    def hit", "    async def hit", "overrides", "one of the two is async"),
        ("def hit", "def find", "overrides", "Mixin.hit replaces nothing"),
        ("def schedule(self, request)", "def schedule(self, request, step=0)", "overrides", "what wraps"),
        ("def schedule(self, request)", "def schedule(self)", "our_calls", "too many positional arguments"),
        ("class Scheduler:", "class Scheduler(Output):", "abstract", "Ours has no get, abstract in Output"),
        ("    def get(self): ...", "    def fetch(self): ...", "abstract", "OurOutput has no fetch"),
        ("*, at)", "*, where)", "our_calls", "Pool._take is called in vain"),
        ("num_blocks, *, at)", "num_blocks, stride, *, at)", "our_calls", "'stride'"),
        ("_take", "_grab", "names", "self.pool._take: Pool has no '_take'"),
        ("set[str] = set()", "dict[str, str] = {}", "names", "self.errors.add: dict has no 'add'"),
        ("num_tokens: int", "tokens: int", "our_calls", "Batch has no field num_tokens"),
        ("class Output", "class ModelOutput", "imports", "vllm.v1.scheduler.Output is gone"),
        ("def schedule", "def step", "imports", "vllm.v1.scheduler:Scheduler.schedule is gone"),
    ],
)
def test_what_another_vllm_breaks_is_named(before: str, after: str, name: str, says: str) -> None:
    assert before in THEIRS
    assert any(says in text for text in found_in(THEIRS.replace(before, after)).get(name, []))


def test_a_call_that_does_not_bind_to_ours_is_named() -> None:
    theirs = THEIRS.replace("hit(self, request, num_tokens=0)", "hit(self, request, num_tokens=0, **more)")
    found = found_in(theirs.replace("num_tokens=1", "num_tokens=1, limit=2"))
    assert any("for the call self.hit(request, num_tokens=1, limit=2)" in text for text in found["vllm_calls"])


def test_code_for_two_versions_is_read_as_such() -> None:
    newer = THEIRS.replace("set[str] = set()", "dict[str, str] = {}").replace("def get", "def fetch")
    newer = newer.replace("class Pool:", "class Error: ...\n\nclass Pool:")
    add = "errors: set[str] | dict[str, str] = self.errors\n        if isinstance(errors, dict):\n            "
    add += "errors[request] = ''\n        else:\n            errors.add(request)"
    ours = OURS.replace("self.errors.add(request)", add).replace("def get(self): ...", "def get(self): ...\n    FETCH")
    ours = ours.replace(
        "FETCH", "def fetch(self):\n        return self.inner().fetch()\n    def inner(self) -> Output: ..."
    )
    ours += "\ntry:\n    from vllm.v1.scheduler import Error\nexcept ImportError:\n    Error = None\n"
    assert found_in(THEIRS, ours, toy(newer, ours)) == {}
    assert found_in(newer, ours) == {"overrides": ["OurOutput.get replaces nothing of vLLM's, and is not called"]}
    neither = newer.replace("dict[str, str] = {}", "list[str] = []")
    assert found_in(neither, ours)["containers"] == ["self.errors is a list, and ours expects dict or set"]


def test_a_name_of_ours_that_a_newer_vllm_takes_is_named() -> None:
    ours = OURS.replace(
        "self.errors.add(request)", "self.errors.add(request)\n        self.counts = self._note(request)"
    )
    ours = ours.replace("class Ours(Mixin):", "class Ours(Mixin):\n    def _note(self, request): ...")
    newer = THEIRS.replace("self.pool = make_pool()", "self.pool = make_pool()\n        self.counts = {}")
    newer = newer.replace("    def schedule", "    def _note(self, request): ...\n\n    def schedule")
    assert found_in(newer, ours) == {}
    assert sorted(found_in(THEIRS, ours, toy(newer, ours))["collisions"]) == [
        "Mixin.counts is ours, and Scheduler.counts in the newest",
        "Ours._note is ours, and Scheduler._note in the newest",
    ]
