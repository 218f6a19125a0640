"""The compose file and the Dockerfile: valid, hardened, and about knobs that exist."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from bitwatt.settings import ServeSettings
from packaging.requirements import Requirement

from tests.deploy.queries import DEPLOY

ROOT = DEPLOY.parent
COMPOSE = DEPLOY / "compose.yaml"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SERVICES = yaml.safe_load(COMPOSE.read_text())["services"]
SERVERS = [name for name in SERVICES if name.startswith(("ternary", "baseline"))]
LOCKED = DEPLOY / "locked"
SECRETS = {"BITWATT_API_KEY_FILE": "/keys", "GRAFANA_PASSWORD_FILE": "/password"}


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
def test_alertmanager_comes_where_it_is_asked_for_and_is_where_prometheus_looks():
    services = json.loads(compose_config("alerts", **SECRETS).stdout)["services"]
    assert services.keys() == {"alertmanager"}
    [port] = services["alertmanager"]["ports"]
    assert port["host_ip"] == "127.0.0.1"
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    [found] = config["alerting"]["alertmanagers"]
    [by_name] = found["dns_sd_configs"]
    assert by_name == {"names": [*services], "type": "A", "port": port["target"]}


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
    assert service["pids_limit"] > 0
    assert service["mem_limit"]
    assert "privileged" not in service
    assert "network_mode" not in service


def test_keys_and_passwords_are_mounted_as_files_and_in_no_variable():
    for name in SERVERS:
        assert SERVICES[name]["secrets"] == ["api_key"]
        assert SERVICES[name]["environment"]["BITWATT_API_KEY_FILE"] == "/run/secrets/api_key"
        assert "BITWATT_API_KEY" not in SERVICES[name]["environment"]
    grafana = SERVICES["grafana"]
    assert grafana["secrets"] == ["grafana_password"]
    password = grafana["environment"]["GF_SECURITY_ADMIN_PASSWORD__FILE"]
    assert password == "/run/secrets/grafana_password"
    assert "GF_SECURITY_ADMIN_PASSWORD" not in grafana["environment"]


@pytest.mark.parametrize("name", ["prometheus", "alertmanager", "grafana"])
def test_an_image_of_others_is_taken_by_its_digest(name):
    assert re.fullmatch(r"[\w./-]+:[\w.]+@sha256:[0-9a-f]{64}", SERVICES[name]["image"])


def test_the_image_installs_what_is_locked_and_nothing_else():
    installs = re.findall(r"pip (?:install|wheel)(?:[^\\\n]|\\\n)*", DOCKERFILE)
    assert len(installs) == 6
    for install in installs:
        assert ("--require-hashes" in install) is not ("--no-deps" in install), install
        assert "-r " in install or "--no-deps" in install


def locked(name):
    """Return the requirements of a lock file."""
    joined = (LOCKED / name).read_text().replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if not line.startswith("#")]
    for line in lines:
        assert re.search(r" --hash=sha256:[0-9a-f]{64}( |$)", line), line
    return [Requirement(line.partition(" --hash")[0]) for line in lines]


@pytest.mark.parametrize(
    ("name", "extras"), [("cpu.txt", ["otel"]), ("cuda.txt", ["otel", "nvidia"])]
)
def test_a_lock_file_has_every_dependency_in_a_version_that_will_do(name, extras):
    """`deploy/lock.sh` writes it anew."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"]]
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    versions = {}
    for requirement in locked(name):
        [pinned] = requirement.specifier
        assert pinned.operator == "=="
        versions.setdefault(requirement.name, []).append(pinned.version)
    for requirement in map(Requirement, wanted):
        assert versions[requirement.name], requirement
        assert all(version in requirement.specifier for version in versions[requirement.name])


def test_the_two_lock_files_agree_but_for_the_build_of_pytorch():
    cpu = {r.name: str(r.specifier) for r in locked("cpu.txt")}
    cuda = {(r.name, str(r.specifier)) for r in locked("cuda.txt")}
    assert cpu["torch"].endswith("+cpu")
    assert {(name, version.removesuffix("+cpu")) for name, version in cpu.items()} <= cuda


def test_what_builds_the_wheel_is_locked_too():
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    versions = {r.name: r.specifier for r in locked("build.txt")}
    for requirement in map(Requirement, needs):
        [pinned] = versions[requirement.name]
        assert pinned.version in requirement.specifier


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


@pytest.mark.parametrize("name", SERVERS)
def test_compose_passes_on_every_knob_that_it_does_not_set_itself(name):
    """It once passed on eight, and dropped the others in silence."""
    environment = SERVICES[name]["environment"]
    passed_on = {knob for knob, value in environment.items() if value is None}
    here = {"path", "served_model_name", "weights", "host", "port", "api_key"}
    here |= {"compare", "twin"}  # the other service is the twin
    knobs = {f"BITWATT_{knob.upper()}" for knob in ServeSettings.model_fields.keys() - here}
    expected = knobs - {knob for knob, value in environment.items() if value is not None}
    assert passed_on == expected, "x-environment of deploy/compose.yaml has a line a knob"


@pytest.mark.parametrize(
    ("name", "twin"), [("ternary", "baseline"), ("baseline", "ternary")], ids=["ternary", "twin"]
)
@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_each_server_reads_the_other_as_its_twin(profile, name, twin):
    environment = SERVICES[f"{name}-{profile}"]["environment"]
    assert environment["BITWATT_TWIN_URL"] == f"http://{twin}:8000"
    assert environment["BITWATT_TWIN_KEY_FILE"] == "/run/secrets/api_key"
    [alias] = SERVICES[f"{twin}-{profile}"]["networks"]["default"]["aliases"]
    assert alias == twin


def test_the_readme_tells_of_every_variable():
    used = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text()))
    told = set(re.findall(r"`(\w+)`", (DEPLOY / "README.md").read_text()))
    assert used - told == set()


def test_the_image_runs_as_a_user_without_a_name():
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    for stage in stages:
        if re.match(r"\S+ AS (cpu|gpu)\b", stage):
            assert stage.rstrip().endswith("USER 10001:0")
    assert "-m 0775 -o 10001 -g 0 /models" in DOCKERFILE
    assert DOCKERFILE.splitlines()[3] == "ARG BASE=debian:bookworm-slim"
