"""The compose file and the Dockerfile: valid, hardened, and about knobs that exist."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from bitwatt.settings import ServeSettings

from tests.deploy.queries import DEPLOY

ROOT = DEPLOY.parent
COMPOSE = DEPLOY / "compose.yaml"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SERVICES = yaml.safe_load(COMPOSE.read_text())["services"]
SERVERS = [name for name in SERVICES if name.startswith(("ternary", "baseline"))]
SECRETS = {"BITWATT_API_KEY": "key", "GRAFANA_PASSWORD": "password"}


def run(*command, env=None):
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=ROOT)


def compose_config(profile, **variables):
    env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")} | variables
    program = shutil.which("docker-compose")
    command = ["-f", str(COMPOSE), "--profile", profile, "config", "--format", "json"]
    return run(program, *command, env=env)


def test_the_compose_file_meets_its_specification():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    result = run(*command, str(COMPOSE))
    assert result.returncode == 0, result.stdout


def test_hadolint_finds_nothing_in_the_dockerfile():
    result = run(str(Path(sys.executable).parent / "hadolint"), "Dockerfile")
    assert result.returncode == 0, result.stdout


@pytest.mark.needs_program("docker-compose")
@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_compose_resolves_a_profile_to_both_twins_and_their_observers(profile):
    result = compose_config(profile, **SECRETS)
    assert result.returncode == 0, result.stderr
    services = json.loads(result.stdout)["services"]
    twins = {f"ternary-{profile}", f"baseline-{profile}"}
    assert services.keys() == twins | {"prometheus", "grafana"}
    for service in services.values():
        assert service["ports"][0]["host_ip"] == "127.0.0.1"
    ternary, baseline = (services[f"{side}-{profile}"] for side in ("ternary", "baseline"))
    assert "--weights=ternary" in ternary["command"]
    assert "--weights=dense" in baseline["command"]
    assert ternary["command"][1] == baseline["command"][1]


@pytest.mark.needs_program("docker-compose")
@pytest.mark.parametrize("missing", SECRETS)
def test_compose_refuses_to_start_without_a_key_or_a_password(missing):
    result = compose_config("cpu", **{k: v for k, v in SECRETS.items() if k != missing})
    assert result.returncode != 0
    assert missing in result.stderr


@pytest.mark.needs_program("docker-compose")
def test_prices_reach_a_server_only_where_they_are_set():
    result = compose_config("cpu", **SECRETS, BITWATT_USD_PER_KWH="0.2")
    environment = json.loads(result.stdout)["services"]["ternary-cpu"]["environment"]
    assert environment["BITWATT_USD_PER_KWH"] == "0.2"
    assert environment["BITWATT_USD_PER_HOUR"] is None


@pytest.mark.needs_program("docker-compose")
def test_each_backend_has_a_gpu_of_its_own():
    services = json.loads(compose_config("gpu", **SECRETS).stdout)["services"]
    pinned = [
        services[name]["deploy"]["resources"]["reservations"]["devices"]
        for name in ("ternary-gpu", "baseline-gpu")
    ]
    assert [devices[0]["device_ids"] for devices in pinned] == [["0"], ["1"]]
    assert all("gpu" in devices[0]["capabilities"] for devices in pinned)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_may_do_little(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service["user"].startswith("0")
    assert service["healthcheck"]["start_period"]
    assert service["profiles"]
    assert "privileged" not in service
    assert "network_mode" not in service


def test_prometheus_scrapes_the_twins_by_the_names_they_have():
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    targets = {target for group in job["static_configs"] for target in group["targets"]}
    for profile in ("cpu", "gpu"):
        aliases = {
            alias
            for name in SERVERS
            if SERVICES[name]["profiles"] == [profile]
            for alias in SERVICES[name]["networks"]["default"]["aliases"]
        }
        assert targets == {f"{alias}:8000" for alias in aliases}


def test_every_knob_is_one_the_server_has():
    knobs = set(SERVICES["ternary-cpu"]["environment"])
    knobs |= set(re.findall(r"\b(BITWATT_\w+)=", DOCKERFILE))
    flags = {
        argument.split("=")[0].removeprefix("--").replace("-", "_")
        for name in SERVERS
        for argument in SERVICES[name]["command"]
        if argument.startswith("--")
    }
    assert flags
    assert {knob.removeprefix("BITWATT_").lower() for knob in knobs} | flags <= set(
        ServeSettings.model_fields
    )


def test_the_readme_tells_of_every_variable():
    used = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text()))
    used |= {
        name for name, value in SERVICES["ternary-cpu"]["environment"].items() if value is None
    }
    told = set(re.findall(r"`(\w+)`", (DEPLOY / "README.md").read_text()))
    assert used - told == set()


def test_the_image_runs_as_a_user_without_a_name():
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    for stage in stages:
        if re.match(r"\S+ AS (cpu|gpu)\b", stage):
            assert stage.rstrip().endswith("USER 10001:0")
    assert "-m 0775 -o 10001 -g 0 /models" in DOCKERFILE
    assert DOCKERFILE.splitlines()[3] == "ARG BASE=debian:bookworm-slim"
