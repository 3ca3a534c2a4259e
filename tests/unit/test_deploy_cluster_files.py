"""Files for clusters: each against the schema of its kind or Ray's own parser, and what they promise about ports."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.dashboard.modules.metrics.dashboards import default_dashboard_panels, serve_dashboard_panels
from ray.serve._private import replica
from ray.serve.schema import ServeDeploySchema

from shared.config import load_config
from tests.unit.test_deploy_files import pins
from trainer.metrics import PROMETHEUS_NAME

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SERVE_FILES = sorted((DEPLOY / "serve").glob("*.yaml"))
PORTS_TO_HIDE = {8265, 10001, 6379}
"""Dashboard, Ray client, control store."""


def load(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text(encoding="utf-8"))


def closed(schema: Any) -> Any:
    """The schema with unknown fields refused, as `kubectl apply` refuses them."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if isinstance(made.get("properties"), dict) and made.get("type") == "object":
        made.setdefault("additionalProperties", False)
    return made


def schema_of(kind: str) -> Any:
    path = ROOT / "tests/schemas" / f"{kind.lower()}s.v1.json.gz"
    schema = json.loads(gzip.decompress(path.read_bytes()))
    schema["properties"]["metadata"] = {"type": "object"}  # of Kubernetes itself
    return closed(schema)


def complaints(tree: Any, schema: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(tree)]


def pod_specs(tree: Any) -> Iterator[dict[str, Any]]:
    """Every pod of a RayJob or RayService."""
    cluster = tree["spec"].get("rayClusterSpec") or tree["spec"]["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        yield group["template"]["spec"]


@pytest.mark.parametrize("kind", ["RayJob", "RayService"])
def test_kuberay_files_fit_the_published_schema(kind: str) -> None:
    tree = load(f"kuberay/{kind.lower()}.yaml")
    assert (tree["apiVersion"], tree["kind"]) == ("ray.io/v1", kind)
    assert complaints(tree, schema_of(kind)) == []


def test_the_schema_would_notice() -> None:
    tree = load("kuberay/rayjob.yaml")
    tree["spec"]["backoffLimit"] = "twice"
    tree["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = 4
    assert len(complaints(tree, schema_of("RayJob"))) == 2


@pytest.mark.parametrize("kind", ["RayJob", "RayService"])
def test_kuberay_files_run_our_ray_as_nobody_in_particular_behind_a_token(kind: str) -> None:
    tree = load(f"kuberay/{kind.lower()}.yaml")
    cluster = tree["spec"].get("rayClusterSpec") or tree["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] == pins((ROOT / "constraints.txt").read_text().splitlines())["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not cluster["headGroupSpec"].get("enableIngress")
    for pod in pod_specs(tree):
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"]:
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert not PORTS_TO_HIDE & {port["containerPort"] for port in container.get("ports", [])}


def test_the_network_policy_opens_the_service_and_hides_the_dashboard() -> None:
    tree = load("kuberay/network_policy.yaml")
    cluster = schema_of("RayJob")["properties"]["spec"]["properties"]["rayClusterSpec"]["properties"]
    rules = cluster["networkPolicy"]["properties"]["head"]["properties"]["ingressRules"]
    assert complaints(tree["spec"]["ingress"], rules) == [], "KubeRay's own policies have the same rules"
    for rule in tree["spec"]["ingress"]:
        ports = {port["port"] for port in rule.get("ports", [])}
        assert ports or rule["from"] == [{"podSelector": tree["spec"]["podSelector"]}], "all ports: Ray's pods alone"
        assert rule.get("from") or ports == {8000}, "from everywhere: the service alone"
        assert 10001 not in ports


def test_the_job_trains_what_the_cluster_config_describes() -> None:
    spec = load("kuberay/rayjob.yaml")["spec"]
    config = load_config(DEPLOY / "configs/cluster.yaml")
    assert str(config.run.dir) in spec["entrypoint"]
    gpus = spec["entrypointNumGpus"] + sum(anchor.gpus * anchor.replicas for anchor in config.anchors)
    assert spec["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == gpus


@pytest.mark.parametrize("started", [False, True], ids=["new", "retried"])
def test_a_retried_job_resumes(started: bool, tmp_path: Path) -> None:
    """The entrypoint in a shell, with `echo` in front of what it would start."""
    entrypoint = load("kuberay/rayjob.yaml")["spec"]["entrypoint"].replace("exec ", "echo ")
    entrypoint = entrypoint.replace("/mnt/shared/visual-latents/cluster", str(tmp_path))
    if started:
        (tmp_path / "config.yaml").touch()
    shown = subprocess.run(["bash", "-c", entrypoint], capture_output=True, text=True, check=True).stdout.split()
    how = ["--resume", str(tmp_path)] if started else ["--config", "/app/deploy/configs/cluster.yaml"]
    assert shown == ["python", "-m", "trainer", "train", *how]


def test_the_file_for_ray_up_passes_rays_own_parser() -> None:
    config = prepare_config(load("ray-cluster.yaml"))
    validate_config(config)
    commands = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in commands
    assert "RAY_AUTH_MODE=token" in commands
    broken = prepare_config({**load("ray-cluster.yaml"), "max_worker": 4})
    with pytest.raises(Exception, match="max_worker"):
        validate_config(broken)


@pytest.mark.parametrize("path", SERVE_FILES, ids=lambda path: path.name)
def test_serve_files_pass_rays_own_parser(path: Path) -> None:
    ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("name", ["one_gpu", "cluster"])
def test_a_service_that_others_can_reach_asks_for_keys(name: str) -> None:
    tree = load(f"serve/{name}.yaml")
    assert tree["http_options"]["host"] == "0.0.0.0"
    assert tree["applications"][0]["args"]["access"]["keys_variable"]


def test_the_ray_service_is_the_application_of_the_cluster_file() -> None:
    tree = load("kuberay/rayservice.yaml")
    served = yaml.safe_load(tree["spec"]["serveConfigV2"])
    assert served == load("serve/cluster.yaml")
    args = served["applications"][0]["args"]
    gpus = [part["gpus"] * part.get("max_replicas", 1) for part in (args["generator"], *args["anchors"])]
    (workers,) = tree["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert workers["maxReplicas"] == sum(gpus)
    assert workers["minReplicas"] == 1 + len(args["anchors"])
    for pod in pod_specs(tree):
        assert pod["containers"][0]["env"][0]["name"] == args["access"]["keys_variable"]


def test_the_image_is_pinned_and_not_root() -> None:
    lines = (DEPLOY / "docker/Dockerfile").read_text().splitlines()
    (base,) = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000"]
    installs = [line for line in lines if "pip install" in line]
    assert installs
    assert all("--constraint constraints.txt" in line for line in installs)


def test_the_image_installs_what_the_project_needs() -> None:
    """The line of the Dockerfile that turns pyproject.toml into requirements, run as it stands."""
    text = (DEPLOY / "docker/Dockerfile").read_text()
    (code,) = re.findall(r'python -c "(import tomllib.*)"', text)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    names = {re.split(r"[>\[]", line)[0].lower() for line in done.stdout.split()}
    assert {"torch", "ray", "transformers", "typer"} <= names
    assert names <= set(pins((ROOT / "constraints.txt").read_text().splitlines()))


def test_the_image_holds_every_folder_of_the_code() -> None:
    text = (DEPLOY / "docker/Dockerfile").read_text()
    allowed = (DEPLOY / "docker/Dockerfile.dockerignore").read_text()
    for folder in ("anchor_service", "shared", "trainer", "deploy"):
        assert f"COPY {folder} {folder}" in text
        assert f"!{folder}\n" in allowed


def test_ray_has_every_metric_that_the_dashboard_takes_from_it() -> None:
    """Those of its own dashboards and of Serve's replicas. Ours are scraped in tests of training and of the service."""
    dashboard = (DEPLOY / "monitoring/dashboard.json").read_text()
    sources = [default_dashboard_panels.__file__, serve_dashboard_panels.__file__]
    of_ray = set(re.findall(r"\bray_\w+", " ".join(Path(source).read_text() for source in sources)))
    of_ray |= {f"ray_{name}" for name in re.findall(r'"(serve_\w+)"', Path(replica.__file__).read_text())}
    drawn = set(re.findall(r"\bray_\w+", dashboard))
    assert len(drawn) > 8
    assert drawn - of_ray == {f"ray_{PROMETHEUS_NAME}"}


def test_the_scrape_config_reads_what_ray_writes() -> None:
    ray_job, service_job = load("monitoring/prometheus.yml")["scrape_configs"]
    (place,) = ray_job["file_sd_configs"][0]["files"]
    assert place == f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"
    http = load("serve/toy.yaml")["http_options"]
    assert service_job["static_configs"] == [{"targets": [f"{http['host']}:{http['port']}"]}]
