"""The compose file: its schema, and that what it names of this repository and of its other services is there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import yaml
from pydantic import BaseModel, ConfigDict

from tests.monitoring import PROMETHEUS
from tools.prometheus import DASHBOARD
from vllm_kvevict.commands.main import main
from vllm_kvevict.config import EvictionConfig

DEPLOY = PROMETHEUS.parent
FILE = DEPLOY / "compose.yaml"
SERVERS = ("server-cuda", "server-cpu")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Datasource(Strict):
    name: str
    uid: str
    type: str
    access: str
    url: str
    isDefault: bool
    jsonData: dict[str, str]


class Datasources(Strict):
    apiVersion: int
    datasources: list[Datasource]


class Options(Strict):
    path: str


class Provider(Strict):
    name: str
    type: str
    disableDeletion: bool
    options: Options


class Providers(Strict):
    apiVersion: int
    providers: list[Provider]


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(FILE.read_text())["services"]
    return found


def mounts(service: dict[str, Any]) -> dict[Path, str]:
    """Files and folders of this repository -> where they stand in the container."""
    pairs = [volume.split(":") for volume in service["volumes"]]
    return {(DEPLOY / source).resolve(): target for source, target, *_ in pairs if source.startswith(".")}


def with_defaults(text: str) -> str:
    """Put the defaults of variables in, and their names where they have none."""
    return re.sub(r"\$\{(\w+)(?::([-?])([^}]*))?\}", lambda found: found[3] if found[2] == "-" else found[1], text)


def test_it_is_what_the_published_schema_allows() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(FILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("profile", ["cuda", "cpu"])
def test_compose_itself_reads_it(profile: str) -> None:
    compose = ["docker", "compose"]
    if shutil.which("docker") is None or subprocess.run([*compose, "version"], capture_output=True).returncode != 0:
        pytest.skip("this machine has no `docker compose`")
    environment = {"MODEL": "M", "GRAFANA_ADMIN_PASSWORD": "p", "PATH": str(Path(shutil.which("docker") or "").parent)}
    command = [*compose, "--file", str(FILE), "--profile", profile, "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_its_head_explains_every_variable() -> None:
    text = FILE.read_text()
    head = text.partition("\nname:")[0]
    used = set(re.findall(r"\$\{(\w+)", text))
    assert used == set(re.findall(r"[A-Z_]{5,}", head))


def test_every_file_that_it_names_is_there(services: dict[str, dict[str, Any]]) -> None:
    builds = [service["build"] for service in services.values() if "build" in service]
    files = [(DEPLOY / build["context"] / build["dockerfile"]).resolve() for build in builds]
    files += [source for service in services.values() for source in mounts(service)]
    assert len(files) == 6 and not [file for file in files if not file.exists()]


def test_images_of_others_are_pinned_and_no_port_is_open_to_others(services: dict[str, dict[str, Any]]) -> None:
    images = [service["image"] for service in services.values() if "build" not in service]
    assert len(images) == 2 and all(re.fullmatch(r"[\w/-]+:v?\d+\.\d+\.\d+", image) for image in images)
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service["ports"])


@pytest.mark.parametrize("name", SERVERS)
def test_the_server_gets_flags_that_there_are(
    services: dict[str, dict[str, Any]], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, *flags = shlex.split(with_defaults(services[name]["command"]))
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])  # which takes the flags of the server
    assert set(given) <= set(re.findall(r"--kv-[a-z-]+", capsys.readouterr().out))
    config = EvictionConfig.parse({"policy": given["--kv-eviction"], "budget": int(given["--kv-budget"])})
    assert model == "MODEL" and config.method().min_tokens < config.budget


def test_prometheus_asks_the_server_and_grafana_prometheus(services: dict[str, dict[str, Any]]) -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    for name in SERVERS:  # one of them is up
        assert services[name]["networks"]["default"]["aliases"] == [host]
        assert [published.split(":")[-1] for published in services[name]["ports"]] == [port]
    assert mounts(services["prometheus"]) == {PROMETHEUS: "/etc/prometheus"}  # the image reads prometheus.yml of it
    (source,) = Datasources.model_validate(
        yaml.safe_load((DEPLOY / "grafana" / "datasources.yaml").read_text())
    ).datasources
    url = urlparse(source.url)
    assert source.type == "prometheus" and source.isDefault and url.hostname in services
    assert [published.split(":")[-1] for published in services["prometheus"]["ports"]] == [str(url.port)]
    assert source.jsonData == {"timeInterval": config["global"]["scrape_interval"]}


def test_grafana_finds_what_it_is_to_provision(services: dict[str, dict[str, Any]]) -> None:
    grafana = services["grafana"]
    (provider,) = Providers.model_validate(
        yaml.safe_load((DEPLOY / "grafana" / "dashboards.yaml").read_text())
    ).providers
    targets = {source.name: Path(target) for source, target in mounts(grafana).items()}
    assert targets[DASHBOARD.name].parent == Path(provider.options.path) and targets[DASHBOARD.name].suffix == ".json"
    for kind in ("datasources", "dashboards"):
        assert targets[f"{kind}.yaml"].parent == Path("/etc/grafana/provisioning") / kind


def test_nobody_sees_a_dashboard_without_logging_in(services: dict[str, dict[str, Any]]) -> None:
    settings = services["grafana"]["environment"]
    assert settings["GF_AUTH_ANONYMOUS_ENABLED"] == settings["GF_USERS_ALLOW_SIGN_UP"] == "false"
    assert settings["GF_SECURITY_ADMIN_PASSWORD"].startswith("${GRAFANA_ADMIN_PASSWORD:?")  # no default
