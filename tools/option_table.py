"""The table of options for docs/configuration.md, from the fields of the configuration.

python -m tools.option_table --write docs/configuration.md
"""

from __future__ import annotations

import sys

from pydantic import BaseModel

from tools.feature_table import print_or_write
from vllm_kvevict.commands.policies import with_text_between
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.options.table import Row, table_of

START = "<!-- options: python -m tools.option_table --write docs/configuration.md -->"
END = "<!-- end of options -->"
NOWHERE = "-"


def table(config: type[BaseModel] = EvictionConfig) -> str:
    """Return the page's text: a row for every field, in the order of the fields, and one for the file of all."""
    rows = ["| field | flag | request option | values (default) | meaning |", "|---|---|---|---|---|"]
    rows += [_as_text(row) for row in table_of(config).values()]
    rows.append(
        "| all | `--kv-eviction-config FILE-or-JSON` | - | a mapping of fields (none) | Fields without a flag |"
    )
    return "\n".join(rows)


def with_table(document: str) -> str:
    """Return ``document`` with what stands between its two markers replaced by the table.

    Raises ValueError if the markers are not there, once each and in order.
    """
    return with_text_between(document, START, END, table())


def _as_text(row: Row) -> str:
    option = row.option
    values = f"[{option.allowed}]({option.page})" if option.page else option.allowed
    in_request = f"`{option.name}`" if option.in_request else NOWHERE
    return f"| `{row.field}` | {_flags(row)} | {in_request} | {values} ({row.default}) | {option.meaning} |"


def _flags(row: Row) -> str:
    if not row.option.is_flag:
        return NOWHERE
    flag = row.option.flag
    if not row.is_switch:
        metavar = (row.option.metavar or "").replace("|", "\\|")
        return f"`{flag} {metavar}`"
    return f"`{flag}`" if row.info.default is False else f"`{flag}`, `--no-{flag[2:]}`"


if __name__ == "__main__":
    sys.exit(print_or_write(__doc__, table, with_table))
