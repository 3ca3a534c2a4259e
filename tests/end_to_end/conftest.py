"""One service for all tests that ask a real one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.integration.cluster import free_ports
from tests.integration.helpers import write_config
from tests.serving import make_run

ROOT = Path(__file__).parents[2]
_START_LIMIT_S = 120


@pytest.fixture(scope="session")
def serve_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """deploy/serve/toy.yaml with a run of two steps and a port of its own."""
    folder = tmp_path_factory.mktemp("served")
    tree = yaml.safe_load((ROOT / "deploy/serve/toy.yaml").read_text())
    tree["applications"][0]["args"]["run"] = str(make_run(folder))
    (tree["http_options"]["port"],) = free_ports(1)
    return write_config(tree, folder / "serve.yaml")


@pytest.fixture(scope="session")
def service_url(serve_config: Path) -> Iterator[str]:
    """`python -m anchor_service serve`, ready; the address ends with a slash."""
    address = f"http://127.0.0.1:{yaml.safe_load(serve_config.read_text())['http_options']['port']}/"
    log = serve_config.with_suffix(".log")
    command = [sys.executable, "-m", "anchor_service", "serve", "--config", str(serve_config)]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(address, process, log)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def _wait_until_ready(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_LIMIT_S
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            with urllib.request.urlopen(f"{address}readyz", timeout=5):
                return
        except OSError:  # not there yet, or 503
            time.sleep(0.2)
