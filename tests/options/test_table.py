"""An option is said once, at a field of the configuration, and found everywhere."""

import argparse
from types import SimpleNamespace
from typing import Annotated

import pytest
from pydantic import Field

from tools.option_table import table
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.frontend.flags import add_group, flag_values
from vllm_kvevict.engine.settings import FIELD, eviction_config, request_config
from vllm_kvevict.options.table import Option, table_of

SERVER = {"policy": "snapkv", "budget": 256}


class Longer(EvictionConfig):
    """The configuration with one more option."""

    stride: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Option(
            "Tokens from one look to the next.",
            "a whole number of at least 1",
            name="kv_stride",
            is_flag=True,
            in_request=True,
            metavar="N",
            default="the policy's own",
            read=int,
        ),
    ] = None
    loud: Annotated[bool, Option("Say more.", "true or false", name="kv_loud", is_flag=True, in_request=True)] = False


def arguments(*texts: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_group(parser, Longer)
    return flag_values(parser.parse_args(texts), Longer)


def refusal(**values: object) -> str:
    with pytest.raises(ValueError) as error:
        Longer.parse(SERVER | values)
    return str(error.value)


def request_refusal(**options: object) -> str:
    with pytest.raises(ValueError) as error:
        Longer.parse(SERVER).for_request(options, 16)
    return str(error.value)


def test_a_new_field_has_a_flag() -> None:
    given = arguments("--kv-stride", "3", "--kv-loud", "--kv-eviction", "lava")
    assert given == {"stride": 3, "loud": True, "policy": "lava"}
    parser = argparse.ArgumentParser()
    add_group(parser, Longer)
    assert "Tokens from one look to the next. Default: the policy's own." in " ".join(parser.format_help().split())


def test_a_new_field_is_an_option_of_requests() -> None:
    server = Longer.parse(SERVER | {"stride": 2})
    assert server.for_request({}, 16).stride == 2
    chosen = server.for_request({"kv_stride": 5, "kv_loud": "true"}, 16)
    assert (chosen.stride, chosen.loud) == (5, True)
    limited = Longer.parse(SERVER | {"request_options": {"options": ["kv_stride"]}})
    assert limited.for_request({"kv_stride": 5}, 16).stride == 5


def test_errors_about_a_new_field_name_it_and_what_it_allows() -> None:
    expected = "kv_stride: expected a whole number of at least 1, got 0"
    assert refusal(stride=0) == request_refusal(kv_stride=0) == expected
    assert request_refusal(kv_loud="loud") == "kv_loud: expected true or false, got 'loud'"
    message = request_refusal(kv_strid=3)
    assert "Did you mean 'kv_stride'?" in message
    assert "kv_stride" in message.partition("Available: ")[2]
    assert "stride" in refusal(other=1).partition("Available: ")[2]
    assert refusal(request_options={"options": ["kv_other"]}).endswith("kv_stride, kv_loud")


def test_a_new_field_is_on_the_page() -> None:
    row = "| `stride` | `--kv-stride N` | `kv_stride` | a whole number of at least 1 (the policy's own) | Tokens from"
    assert row in table(Longer)
    assert row not in table()


def test_every_field_is_in_the_table() -> None:
    assert list(table_of(EvictionConfig)) == list(EvictionConfig.model_fields)
    assert all(row.option.name for row in table_of(EvictionConfig).values() if row.option.is_flag)


def test_a_server_and_what_a_request_chooses_are_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SimpleNamespace(additional_config={FIELD: dict(SERVER)})
    parsed = []
    real = EvictionConfig.parse.__func__

    def counting(cls: type[EvictionConfig], values: dict[str, object]) -> EvictionConfig:
        parsed.append(values)
        return real(cls, values)

    monkeypatch.setattr(EvictionConfig, "parse", classmethod(counting))
    for _ in range(3):
        server = eviction_config(engine)
        assert request_config(server, {"kv_budget": 64}, 16).budget == 64
        assert type(request_config(server, {"kv_budget": 0.5}, 16).budget) is float
    assert len(parsed) == 3  # the server's, and those of two requests
    with pytest.raises(ValueError, match="kv_budget: expected"):
        request_config(server, {"kv_budget": 64.0}, 16)  # equal to what was chosen before, and of no unit
