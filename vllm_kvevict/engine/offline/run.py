"""An engine in this process for a command: from vLLM's own flags, with the worker in reach."""

from __future__ import annotations

from vllm import LLM
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.frontend.install import install_flags
from vllm_kvevict.engine.settings import FIELD


def engine_args(model: str, skip_tokenizer: bool, config: EvictionConfig | None, engine_flags: list[str]) -> EngineArgs:
    """Return the arguments of an engine that evicts as ``config`` says; None: that is stock vLLM's.

    engine_flags: further command-line flags of vLLM's engine
    """
    install_flags()  # also where the package runs from a checkout, without its entry point
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="vLLM", exit_on_error=False))
    args = EngineArgs.from_cli_args(parser.parse_args(["--model", model, *engine_flags]))
    if config is not None:
        args.additional_config = {**(args.additional_config or {}), FIELD: config.model_dump(exclude_unset=True)}
    args.skip_tokenizer_init = skip_tokenizer
    return args


def check_in_process(llm: LLM) -> None:
    """Raise ValueError if the model runs in other processes."""
    size = llm.llm_engine.vllm_config.parallel_config.world_size
    if size != 1:
        raise ValueError(f"this command sees one worker, in its own process, got {size}; drop the parallel sizes")
