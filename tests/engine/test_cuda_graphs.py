"""The graphs that stand in for CUDA's: what a replay does, and what a capture refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.engine.cuda_graphs import CaptureError, Graph, graphs_on_cpu
from vllm_kvevict.kernels import select
from vllm_kvevict.kernels.optional_triton import tl, triton

CPU = torch.device("cpu")


@triton.jit
def _add_kernel(source_ptr, out_ptr, count, amount, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    tl.store(out_ptr + place, tl.load(source_ptr + place, mask=mask) + amount, mask=mask)


def add_by_triton(source: torch.Tensor, out: torch.Tensor, amount: float) -> None:
    _add_kernel[lambda meta: (triton.cdiv(len(out), meta["BLOCK"]),)](source, out, len(out), amount, BLOCK=2)


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    with graphs_on_cpu(), torch.inference_mode():
        yield


def captured(work: Callable[[], object]) -> Graph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=None):
        work()
    return graph


def test_operators_launches_and_kernels_run_again_on_the_same_memory() -> None:
    source, out, kept = torch.zeros(3), torch.zeros(3), torch.zeros(3, dtype=torch.bool)
    count = torch.ones(1, dtype=torch.int64)
    amounts = [1.0]

    def work() -> None:
        sums = torch.empty_like(source)
        add_by_triton(source, sums, amounts[0])
        out.copy_(sums.view(1, 3).mul(2)[0])
        kernel = select.function("kvevict_select", CPU)
        assert kernel is not None
        kernel(out.data_ptr(), count.data_ptr(), 0, kept.data_ptr(), 1, 3, 0, 0)

    graph = captured(work)
    assert out.tolist() == [2.0, 2.0, 2.0]
    source.copy_(torch.tensor([10.0, 30.0, 20.0]))
    amounts[0] = 100.0  # numbers are those of the capture
    graph.replay()
    assert out.tolist() == [22.0, 62.0, 42.0]
    assert kept.tolist() == [False, True, False]
    assert len(graph.work) == 4


def test_the_python_of_an_operator_does_not_run_again() -> None:
    library, calls = torch.library.Library("kvevict_tests", "FRAGMENT"), []
    library.define("double_into(Tensor source, Tensor(a!) out) -> ()")

    def double_into(source: torch.Tensor, out: torch.Tensor) -> None:
        calls.append(source)
        out.copy_(source * 2)

    library.impl("double_into", double_into, "CPU")
    source, out = torch.ones(2), torch.zeros(2)
    graph = captured(lambda: torch.ops.kvevict_tests.double_into(source, out))
    source.fill_(5.0)
    graph.replay()
    assert out.tolist() == [10.0, 10.0] and len(calls) == 1


def test_what_is_read_before_it_is_written_is_garbage() -> None:
    out = torch.zeros(2)
    graph = captured(lambda: out.copy_(torch.empty(2)))
    graph.replay()
    assert out.isnan().all()


def test_memory_that_is_gone_is_missed() -> None:
    out, sources = torch.zeros(2), [torch.ones(2)]
    graph = captured(lambda: out.copy_(sources[0]))
    graph.replay()
    sources.clear()
    with pytest.raises(RuntimeError, match="freed since the capture"):
        graph.replay()


@pytest.mark.parametrize(
    "work",
    [
        lambda flags: flags.sum().item(),
        lambda flags: flags[flags],
        lambda flags: flags.nonzero(),
        lambda flags: bool(flags[0]),
        lambda flags: torch.equal(flags, flags),
        lambda flags: flags.new_tensor([1, 0]),
        lambda flags: select.function("kvevict_select", CPU)(1, 2, 0, 3, 1, 3, 0, 0),
    ],
    ids=["item", "mask", "nonzero", "bool", "equal", "list", "address"],
)
def test_what_no_graph_can_hold_is_refused(work: Callable[[torch.Tensor], object]) -> None:
    flags = torch.ones(2, dtype=torch.bool)
    with pytest.raises(CaptureError):
        captured(lambda: work(flags))
