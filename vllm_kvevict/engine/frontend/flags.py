"""``--kv-eviction`` and its companions, on every entry point that uses vLLM's parser."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.settings import FIELD
from vllm_kvevict.options.reading import mapping, name_in
from vllm_kvevict.options.table import Row, table_of


def with_flags(add_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``EngineArgs.add_cli_args`` so that the parser knows our flags."""

    @functools.wraps(add_cli_args)
    def wrapper(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        add_group(parser)
        return add_cli_args(parser, *args, **kwargs)

    return wrapper


def with_config(from_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``EngineArgs.from_cli_args`` so that our flags travel in ``additional_config``.

    They move there inside the namespace: vLLM hands it on to further API server processes, which read it before they
    have loaded any plugin.
    """

    @functools.wraps(from_cli_args)
    def wrapper(cls: type, args: argparse.Namespace) -> Any:
        values = flag_values(args)
        if values:
            given = getattr(args, "additional_config", None) or {}
            if FIELD in given:
                raise ValueError(f"additional_config: {FIELD!r} and the --kv-eviction flags exclude each other")
            config = EvictionConfig.parse(values)
            args.additional_config = {**given, FIELD: config.model_dump(exclude_unset=True)}
            for destination in ("kv_eviction_config", *_flags(EvictionConfig)):
                setattr(args, destination, None)
        return from_cli_args(cls, args)

    return wrapper


def add_group(parser: argparse.ArgumentParser, config: type[EvictionConfig] = EvictionConfig) -> None:
    """Add our flags to ``parser``: those of the table of options, and the one for a file with all fields."""
    group = parser.add_argument_group(
        title="KVEviction",
        description="vllm_kvevict: keep a part of every prompt's KV cache and give the blocks of the rest back.",
    )
    for row in _flags(config).values():
        group.add_argument(row.option.flag, **_as_argument(row))
    others = ", ".join(field for field, row in table_of(config).items() if not row.option.is_flag)
    group.add_argument(
        "--kv-eviction-config",
        metavar="FILE-or-JSON",
        type=mapping,
        default=argparse.SUPPRESS,
        help=f"Everything else, as a YAML or JSON file or a JSON text: {others}. The flags win over it.",
    )


def flag_values(args: argparse.Namespace, config: type[EvictionConfig] = EvictionConfig) -> dict[str, Any]:
    """Return the fields of an EvictionConfig that the flags in ``args`` set."""
    values = dict(getattr(args, "kv_eviction_config", None) or {})
    for destination, row in _flags(config).items():
        value = getattr(args, destination, None)
        if value is not None:
            values[row.field] = value
    return values


def _flags(config: type[EvictionConfig]) -> dict[str, Row]:
    """Return the rows that have a flag, by its destination."""
    return {str(row.option.name): row for row in table_of(config).values() if row.option.is_flag}


def _as_argument(row: Row) -> dict[str, Any]:
    """Return what argparse is told of a flag."""
    option, text = row.option, row.option.meaning.replace("%", "%%")
    if row.is_switch:
        action = "store_true" if row.info.default is False else argparse.BooleanOptionalAction
        return {"action": action, "default": argparse.SUPPRESS, "help": f"{text} Default: {row.default}."}
    if option.registry is not None:
        text = f"{text} One of: {option.registry.listing()}."
    if not row.info.is_required() and row.default != "none":
        text = f"{text} Default: {row.default.replace('%', '%%')}."
    read = option.read if option.registry is None else name_in(option.registry)
    return {"metavar": option.metavar, "type": read, "default": argparse.SUPPRESS, "help": text}
