"""Commands of deploy/README.md that one machine can run, run as they stand there, with other ports and folders."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from tests.integration.cluster import RayCluster, SubmittedJob
from tests.integration.helpers import write_config

ROOT = Path(__file__).parents[2]
LIMIT_S = 180


def commands(section: str) -> list[str]:
    """The indented lines of a section."""
    text = (ROOT / "deploy/README.md").read_text()
    (body,) = re.findall(rf"^## {section}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return [line.strip() for line in body.splitlines() if line.startswith("    ")]


def run(command: str, **environment: str) -> str:
    """What a command prints. Scripts are those of this environment."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        shlex.split(command),
        cwd=ROOT,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_service_on_one_machine(service_url: str) -> None:
    serve, *asked = commands("The service on one machine")
    assert serve == "python -m anchor_service serve --config deploy/serve/toy.yaml", "what the fixture has started"
    assert len(asked) == 3
    for command in asked:
        assert run(command.replace("http://127.0.0.1:8000/", service_url))


def test_a_cluster_of_one_machine(serve_config: Path, toy_folder: Path, tmp_path: Path) -> None:
    start, submit, deploy, status, shutdown = commands("A Ray cluster of one machine")
    assert start == "ray start --head --block --dashboard-host=127.0.0.1 --metrics-export-port=8080"
    tree = yaml.safe_load(serve_config.read_text())
    tree["http_options"]["port"] += 1
    file = write_config(tree, tmp_path / "serve.yaml")
    with RayCluster(tmp_path) as cluster:
        prefix, arguments = submit.split(" -- python -m trainer train ")
        assert prefix == "ray job submit --address=http://127.0.0.1:8265 --working-dir=."
        settings = {"run.dir": tmp_path / "job", "data.path": toy_folder / "data", "train.steps": 2}
        smaller = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        command = [*shlex.split(arguments), *smaller, "--no-evaluate"]
        with SubmittedJob(cluster, tmp_path / "job.log", *command) as job:
            job.assert_succeeds(LIMIT_S)
        address = {"RAY_DASHBOARD_ADDRESS": cluster.address, "RAY_ADDRESS": cluster.address}
        run(deploy.replace("deploy/serve/toy.yaml", str(file)), **address)
        wait_until_answered(f"http://127.0.0.1:{tree['http_options']['port']}/readyz")
        assert "visual-latents" in run(status, **address)
        run(shutdown, **address)


def wait_until_answered(url: str) -> None:
    """Until the service is ready."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            if time.monotonic() > deadline:
                pytest.fail(f"{url} does not answer")
            time.sleep(0.5)
