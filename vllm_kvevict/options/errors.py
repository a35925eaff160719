"""What users are told of a wrong configuration, in the words of the table of options."""

from __future__ import annotations

from pydantic import BaseModel, ValidationError

from vllm_kvevict.foreign.values import quoted, suggestion
from vllm_kvevict.options.table import table_of


def one_sentence(config: type[BaseModel], error: ValidationError) -> str:
    """Return what is wrong with the values of a configuration: the field, what was given, and what is allowed."""
    first, table = error.errors()[0], table_of(config)
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        return f"kv_eviction: unknown field {quoted(name)}.{suggestion(name, table)} Available: {', '.join(table)}"
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return f"kv_eviction: {name!r} is missing. Give --kv-eviction POLICY and --kv-budget N"
    row = table[name]
    if first["type"] == "value_error":
        return f"{row.named}: {first['ctx']['error']}"
    return f"{row.named}: expected {row.option.allowed}, got {quoted(first['input'])}"
