"""The Kubernetes manifests: rendered by kubectl, valid by its schemas, hardened, and consistent.

The policies are the restricted Pod Security Standard's, and what linters of manifests ask for; one
of them, checkov, has its own say.
"""

import copy
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml
from bitwatt.settings import ServeSettings
from kubernetes_validate import validate
from prometheus_client.parser import text_string_to_metric_families

from tests.deploy.queries import DEPLOY
from tests.fakes import FakeEngine, make_app, make_client

KUBERNETES = DEPLOY / "kubernetes"
VARIANTS = ("cpu", "gpu")
BACKENDS = ("ternary", "twin")
# Of these no schema is published as a package; what is used of them is checked below by hand.
CUSTOM_KINDS = {"PodMonitor", "InferencePool", "HTTPRoute"}


@cache
def rendered(variant):
    """Return the variant's objects by (kind, name), as `kubectl apply -k` would send them."""
    kubectl = Path(sys.executable).parent / "kubectl"
    done = subprocess.run(
        [kubectl, "kustomize", str(KUBERNETES / variant)],
        capture_output=True,
        text=True,
        check=True,
    )
    objects = list(yaml.safe_load_all(done.stdout))
    found = {(one["kind"], one["metadata"]["name"]): one for one in objects}
    assert len(found) == len(objects)
    return found


def of_kind(variant, kind):
    found = [one for (its, _), one in rendered(variant).items() if its == kind]
    assert found
    return found


def deployments():
    return [
        pytest.param(variant, backend, id=f"{variant}-{backend}")
        for variant in VARIANTS
        for backend in BACKENDS
    ]


def deployment(variant, backend):
    return rendered(variant)["Deployment", f"bitwatt-{backend}"]


def pod(variant, backend):
    return deployment(variant, backend)["spec"]["template"]["spec"]


def container(variant, backend):
    [one] = pod(variant, backend)["containers"]
    return one


def environment(variant, backend):
    return {one["name"]: one.get("value") for one in container(variant, backend)["env"]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_object_meets_its_schema(variant):
    kinds = set()
    for (kind, _), one in rendered(variant).items():
        kinds.add(kind)
        if kind not in CUSTOM_KINDS:
            validate(one, "1.37.0", strict=True)
    assert {"Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget"} < kinds
    assert {"HorizontalPodAutoscaler", "PodMonitor"} < kinds


def test_an_object_that_breaks_its_schema_would_be_found():
    broken = deployment("cpu", "ternary") | {"spec": {"replicas": "three"}}
    with pytest.raises(Exception, match=r"three|required|selector"):
        validate(broken, "1.37.0", strict=True)


@pytest.mark.parametrize(("variant", "backend"), deployments())
def test_pods_meet_the_restricted_pod_security_standard(variant, backend):
    spec, one = pod(variant, backend), container(variant, backend)
    for forbidden in ("hostNetwork", "hostPID", "hostIPC", "hostUsers"):
        assert forbidden not in spec
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    context = one["securityContext"]
    assert context["allowPrivilegeEscalation"] is False
    assert context["privileged"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert context["readOnlyRootFilesystem"] is True
    kinds = {kind for volume in spec["volumes"] for kind in volume if kind != "name"}
    assert kinds <= {"emptyDir", "secret", "persistentVolumeClaim", "configMap", "projected"}
    namespace = rendered(variant)["Namespace", "bitwatt"]["metadata"]["labels"]
    assert namespace["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize(("variant", "backend"), deployments())
def test_pods_keep_to_what_linters_ask_for(variant, backend):
    spec, one = pod(variant, backend), container(variant, backend)
    assert spec["automountServiceAccountToken"] is False
    assert ("ServiceAccount", spec["serviceAccountName"]) in rendered(variant)
    assert re.fullmatch(r"[\w./-]+:(?!latest$)[\w.-]+", one["image"])
    resources = one["resources"]
    assert {"cpu", "memory"} <= resources["requests"].keys() & resources["limits"].keys()
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    assert not [name for name in environment(variant, backend) if "KEY" in name[-4:]]
    mounted = {mount["name"] for mount in one["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["volumes"]}
    spread = spec["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"]
    assert spread["app.kubernetes.io/component"] == backend


# Of the image, which is the operator's: by a digest or not, pulled or built on the node.
ALLOWED_BY_CHECKOV = {"CKV_K8S_15", "CKV_K8S_43"}


@pytest.mark.slow
@pytest.mark.needs_program("checkov")
def test_checkov_finds_nothing_but_what_is_said_of_the_image(tmp_path):
    for variant in VARIANTS:
        text = yaml.safe_dump_all(rendered(variant).values())
        (tmp_path / f"{variant}.yaml").write_text(text)
    worse = copy.deepcopy(deployment("cpu", "ternary"))
    worse["spec"]["template"]["spec"]["containers"][0]["securityContext"]["privileged"] = True
    (tmp_path / "worse.yaml").write_text(yaml.safe_dump(worse))
    command = ["checkov", "--directory", tmp_path, "--framework", "kubernetes", "--output", "json"]
    done = subprocess.run(
        [*command, "--skip-download", "--quiet"], capture_output=True, text=True, cwd=tmp_path
    )
    found = {path.name: set() for path in tmp_path.iterdir()}
    for check in json.loads(done.stdout)["results"]["failed_checks"]:
        found[check["file_path"].lstrip("/")].add(check["check_id"])
    assert found["cpu.yaml"] == found["gpu.yaml"] == ALLOWED_BY_CHECKOV
    assert "CKV_K8S_16" in found["worse.yaml"], "a privileged container"


@pytest.mark.parametrize(("variant", "backend"), deployments())
def test_probes_ask_what_the_server_answers(variant, backend):
    one = container(variant, backend)
    assert one["startupProbe"]["httpGet"]["path"] == "/ready"
    assert one["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert one["livenessProbe"]["httpGet"]["path"] == "/health"
    startup = one["startupProbe"]
    seconds = startup["periodSeconds"] * startup["failureThreshold"]
    assert seconds >= ServeSettings.model_fields["load_timeout"].default
    ports = {port["name"]: port["containerPort"] for port in one["ports"]}
    assert ports == {"http": 8000}


@pytest.mark.parametrize(("variant", "backend"), deployments())
def test_a_pod_has_time_to_drain(variant, backend):
    slept = container(variant, backend)["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = ServeSettings.model_fields["drain_timeout"].default
    assert pod(variant, backend)["terminationGracePeriodSeconds"] > slept + drain


@pytest.mark.parametrize(("variant", "backend"), deployments())
def test_every_flag_and_variable_is_one_the_server_has(variant, backend):
    fields = set(ServeSettings.model_fields)
    flags = {
        arg.split("=")[0].removeprefix("--").replace("-", "_")
        for arg in container(variant, backend)["args"]
        if arg.startswith("--")
    }
    names = {
        name.removeprefix("BITWATT_").lower()
        for name in environment(variant, backend)
        if name.startswith("BITWATT_")
    }
    assert flags == {"served_model_name", "weights"}
    assert names
    assert flags | names <= fields


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_backend_serves_its_weights_under_its_name_and_reads_the_other(variant):
    for backend, weights, suffix in (("ternary", "ternary", ""), ("twin", "dense", "-fp16")):
        args = container(variant, backend)["args"]
        assert f"--weights={weights}" in args
        assert f"--served-model-name=$(MODEL_NAME){suffix}" in args
        [other] = set(BACKENDS) - {backend}
        url = environment(variant, backend)["BITWATT_TWIN_URL"]
        assert url == f"http://bitwatt-{other}:8000"
        assert ("Service", f"bitwatt-{other}") in rendered(variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["Service", "NetworkPolicy", "PodDisruptionBudget"])
def test_each_backend_is_selected_by_its_own_objects_alone(variant, kind):
    for backend in BACKENDS:
        spec = rendered(variant)[kind, f"bitwatt-{backend}"]["spec"]
        selector = spec.get("podSelector", spec.get("selector"))
        wanted = selector.get("matchLabels", selector)
        for other in BACKENDS:
            labels = deployment(variant, other)["spec"]["template"]["metadata"]["labels"]
            assert (wanted.items() <= labels.items()) is (other == backend)


@pytest.mark.parametrize("variant", VARIANTS)
def test_network_policies_let_in_one_port_and_out_to_names_and_the_twin(variant):
    for policy in of_kind(variant, "NetworkPolicy"):
        spec = policy["spec"]
        assert set(spec["policyTypes"]) == {"Ingress", "Egress"}
        assert [rule["ports"] for rule in spec["ingress"]] == [[{"protocol": "TCP", "port": 8000}]]
        assert {p["port"] for rule in spec["egress"] for p in rule["ports"]} == {53, 8000}
        assert all(rule.get("to") for rule in spec["egress"])
        [twin] = [rule["to"] for rule in spec["egress"] if rule["ports"][0]["port"] == 8000]
        assert twin == [
            {
                "podSelector": {
                    "matchExpressions": [
                        {"key": "bitwatt/backend", "operator": "In", "values": ["ternary", "twin"]}
                    ]
                }
            }
        ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_replicas_follow_the_queue_by_the_adapters_name_of_it(variant):
    adapter = yaml.safe_load((KUBERNETES / "components/monitoring/adapter-values.yaml").read_text())
    [rule] = adapter["rules"]["custom"]
    scaled = set()
    for autoscaler in of_kind(variant, "HorizontalPodAutoscaler"):
        spec = autoscaler["spec"]
        [metric] = spec["metrics"]
        assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
        target = spec["scaleTargetRef"]
        scaled.add(target["name"])
        assert "replicas" not in rendered(variant)[target["kind"], target["name"]]["spec"]
    assert scaled == {"bitwatt-ternary", "bitwatt-twin"}


@pytest.mark.anyio
async def test_the_metric_that_replicas_follow_is_one_the_server_has():
    adapter = yaml.safe_load((KUBERNETES / "components/monitoring/adapter-values.yaml").read_text())
    [rule] = adapter["rules"]["custom"]
    pattern = rule["name"]["matches"]
    async with make_client(make_app(FakeEngine(), metrics_public=True)) as client:
        text = (await client.get("/metrics")).text
    names = {family.name for family in text_string_to_metric_families(text)}
    assert [name for name in names if re.match(pattern, name)] == [
        rule["seriesQuery"].split("{")[0]
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_pods_are_scraped_each_for_itself(variant):
    [monitor] = of_kind(variant, "PodMonitor")
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")
    wanted = monitor["spec"]["selector"]["matchLabels"]
    for backend in BACKENDS:
        labels = deployment(variant, backend)["spec"]["template"]["metadata"]["labels"]
        assert wanted.items() <= labels.items()
        assert set(monitor["spec"]["podTargetLabels"]) <= labels.keys()


def test_each_inference_pool_selects_one_backends_pods():
    for pool in of_kind("gpu", "InferencePool"):
        assert pool["apiVersion"] == "inference.networking.k8s.io/v1"
        spec = pool["spec"]
        assert spec["targetPorts"] == [{"number": 8000}]
        assert spec["endpointPickerRef"]["port"] == {"number": 9002}
        selected = [
            backend
            for backend in BACKENDS
            if spec["selector"]["matchLabels"].items()
            <= deployment("gpu", backend)["spec"]["template"]["metadata"]["labels"].items()
        ]
        assert [f"bitwatt-{backend}" for backend in selected] == [pool["metadata"]["name"]]
    for backend in BACKENDS:
        labels = deployment("gpu", backend)["spec"]["template"]["metadata"]["labels"]
        assert labels["llm-d.ai/engine-type"] == "vllm"
        assert labels["llm-d.ai/role"] == "both"
    [route] = of_kind("gpu", "HTTPRoute")
    for rule in route["spec"]["rules"]:
        [backend] = rule["backendRefs"]
        assert (backend["kind"], backend["name"]) in rendered("gpu")


def test_gpus_are_one_a_backend_and_models_come_from_a_volume_nobody_writes():
    for backend in BACKENDS:
        one = container("gpu", backend)
        assert one["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert "utility" in environment("gpu", backend)["NVIDIA_DRIVER_CAPABILITIES"]
        [mount] = [m for m in one["volumeMounts"] if m["mountPath"] == "/models"]
        assert mount["readOnly"] is True
        [volume] = [v for v in pod("gpu", backend)["volumes"] if v["name"] == mount["name"]]
        claim = volume["persistentVolumeClaim"]["claimName"]
        assert ("PersistentVolumeClaim", claim) in rendered("gpu")
        assert "nvidia.com/gpu" not in container("cpu", backend)["resources"]["limits"]
