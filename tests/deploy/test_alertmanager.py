"""A real Alertmanager with the configuration that compose gives it."""

import shutil
import socket
import subprocess
import time

import httpx
import pytest

from tests.deploy.queries import DEPLOY, rules

CONFIG = DEPLOY / "alertmanager" / "alertmanager.yml"
ALERTS = {rule["alert"]: rule for rule in rules("alerts.yml")}
SERVER = {"job": "bitwatt", "instance": "a"}
MODEL = SERVER | {"model_name": "m"}


@pytest.fixture(scope="module")
def alertmanager(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alertmanager")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        shutil.which("prometheus-alertmanager") or "alertmanager",
        f"--config.file={CONFIG}",
        f"--storage.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20)
    try:
        deadline = time.monotonic() + 60
        while not is_ready(client):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield client
    finally:
        client.close()
        process.terminate()
        process.wait()


def is_ready(client):
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def assert_told(client, alerts, expected):
    """Send the alerts; these of them are told, once Alertmanager has weighed all."""
    body = [
        {"labels": {"alertname": name, "severity": ALERTS[name]["labels"]["severity"]} | labels}
        for name, labels in alerts.items()
    ]
    client.post("/api/v2/alerts", json=body).raise_for_status()
    [instance] = {labels["instance"] for labels in alerts.values()}
    deadline = time.monotonic() + 60
    while True:
        states = {
            alert["labels"]["alertname"]: alert["status"]["state"]
            for alert in client.get("/api/v2/alerts").json()
            if alert["labels"]["instance"] == instance
        }
        told = {name for name, state in states.items() if state != "suppressed"}
        if (states.keys() == alerts.keys() and told == expected) or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert states.keys() == alerts.keys()
    assert told == expected


@pytest.mark.needs_program("amtool")
def test_amtool_accepts_the_configuration():
    command = [shutil.which("amtool"), "check-config", str(CONFIG)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.needs_program("amtool")
def test_a_server_that_is_gone_is_told_once(alertmanager):
    alerts = {"BitwattTargetDown": SERVER, "BitwattQueueDeep": MODEL, "BitwattErrors": SERVER}
    assert_told(alertmanager, alerts, {"BitwattTargetDown"})


@pytest.mark.needs_program("amtool")
def test_the_graver_of_two_alerts_about_one_thing_is_told(alertmanager):
    other = {"instance": "b"}
    alerts = {
        "BitwattKvCacheFull": MODEL | other,
        "BitwattKvCacheNearlyFull": MODEL | other,
        "BitwattManyErrors": SERVER | other,
        "BitwattErrors": SERVER | other,
        "BitwattPreemptions": MODEL | other,
    }
    expected = {"BitwattKvCacheFull", "BitwattManyErrors", "BitwattPreemptions"}
    assert_told(alertmanager, alerts, expected)
