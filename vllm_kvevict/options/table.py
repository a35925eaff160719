"""The table of options: all that is said of a field of the configuration, said once, at the field.

A field is written ``budget: Annotated[TYPE, Option(...)] = DEFAULT``. Its flag, the option of requests, the sentences
of errors, ``--help`` and docs/configuration.md are read from there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vllm_kvevict.foreign.values import LONGEST_NAME, quoted, suggestion
from vllm_kvevict.options.names import VLLM_FIELD, flag_of, is_ours
from vllm_kvevict.registry import Registry


@dataclass(frozen=True)
class Option:
    """What users are told of a field, and where they may give it. Fields without a name are given in a file.

    meaning:    one or two sentences, of the server's option
    allowed:    the values that it takes, in the words that follow "expected"
    name:       what it is called on a command line and in requests; None: it stands in a file only
    is_flag:    whether the server takes it as a flag
    in_request: whether a request may give it
    metavar:    what stands behind the flag; a switch has nothing there
    default:    in words, if the default of the field does not say it
    page:       the page that has more on its values, relative to ``docs/``
    registry:   whose names it takes
    read:       returns the value that a flag's text means, raises ``argparse.ArgumentTypeError``
    """

    meaning: str
    allowed: str
    name: str | None = None
    is_flag: bool = False
    in_request: bool = False
    metavar: str | None = None
    default: str | None = None
    page: str | None = None
    registry: Registry[Any] | None = None
    read: Callable[[str], Any] | None = None

    @property
    def flag(self) -> str:
        """The option on a command line."""
        return flag_of(self.name or "")


@dataclass(frozen=True)
class Row:
    """A field of a configuration with its option."""

    field: str
    option: Option
    info: FieldInfo

    @property
    def is_switch(self) -> bool:
        """Whether it is true or false."""
        return bool in (self.info.annotation, *get_args(self.info.annotation))

    @property
    def named(self) -> str:
        """What errors call the field."""
        return self.option.name or f"kv_eviction.{self.field}"

    @property
    def default(self) -> str:
        """The default in words."""
        if self.info.is_required():
            return "required"
        if self.option.default is not None:
            return self.option.default
        value = self.info.default
        return "none" if value in (None, {}) else str(value).lower()


@cache
def table_of(config: type[BaseModel]) -> dict[str, Row]:
    """Return the rows of a configuration by field, in the order of its fields."""
    rows = {}
    for field, info in config.model_fields.items():
        (option,) = (said for said in info.metadata if isinstance(said, Option))
        rows[field] = Row(field, option, info)
    return rows


@cache
def options_of_requests(config: type[BaseModel]) -> dict[str, Row]:
    """Return the rows of a configuration that requests may give, by the names of their options."""
    return {str(row.option.name): row for row in table_of(config).values() if row.option.in_request}


def check_names(options: Mapping[str, Any], known: Mapping[str, Row], allowed: Collection[str]) -> None:
    """Raise ValueError, with the nearest name, for an option that looks like one of ours and is none.

    options: the request's ``vllm_xargs``, where vLLM puts names of its own as well
    known:   the options of requests, by name
    allowed: those that the operator lets requests give
    """
    for name in options:
        if is_ours(name) and name not in known:
            rows = {option: known[option] for option in known if option in allowed}
            raise ValueError(f"{VLLM_FIELD}: {unknown_option(name, rows)}")


def unknown_option(name: str, known: Mapping[str, Row]) -> str:
    """Return a sentence about a request's option that is none of ``known``, with the nearest of them."""
    fields = {f"kv_{row.field}": option for option, row in known.items()}
    # cut first: it may be of any length
    hint = suggestion(name[:LONGEST_NAME].lower().replace("-", "_"), dict.fromkeys([*known, *fields]), fields)
    return f"unknown option {quoted(name)}.{hint} Available: {', '.join(known) or 'none'}"
