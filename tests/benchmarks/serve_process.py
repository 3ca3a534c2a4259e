"""`python -m anchor_service serve` for a benchmark: started, found ready, its processes, ended."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import yaml

from tests.integration.cluster import free_ports

START_LIMIT_S = 240
_READY_S = 10
_TITLE = re.compile(r"ray::(?:.*:visual-latents:([\w-]+)|(ProxyActor|ServeController))")


@dataclass(frozen=True)
class Served:
    """A service that runs. process: the one that was started; Ray's are below it."""

    url: str
    process: psutil.Process

    def replica(self, deployment: str) -> psutil.Process:
        """The process of a deployment's replica, of this service alone."""
        (first, *_) = [process for name, process in self.parts() if name == deployment]
        return first

    def memory_mib(self, without: Sequence[str]) -> float:
        """Resident in the service's processes, those of deployments with these names left out."""
        total = 0
        for name, process in self.parts():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += 0 if name in without else process.memory_info().rss
        return total / 2**20

    def parts(self) -> list[tuple[str, psutil.Process]]:
        """Replicas with the names of their deployments, Serve's proxy and its controller."""
        return [(name, one) for one in self.process.children(recursive=True) if (name := _name_of(one))]

    def is_ready(self) -> bool:
        """Whether generator and anchors answer."""
        with contextlib.suppress(httpx2.HTTPError):
            return httpx2.get(f"{self.url}/readyz", timeout=_READY_S).status_code == 200
        return False


@contextlib.contextmanager
def serving(folder: Path, tree: dict[str, Any]) -> Iterator[Served]:
    """The service with these arguments of its application, on a port of its own."""
    (port,) = free_ports(1)
    file = folder / f"serve-{port}.yaml"
    http = {"host": "127.0.0.1", "port": port}
    file.write_text(yaml.safe_dump({"http_options": http, "applications": [{"args": tree}]}))
    with file.with_suffix(".log").open("w") as log:
        command = [sys.executable, "-m", "anchor_service", "serve", "--config", str(file)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        served = Served(f"http://127.0.0.1:{port}", psutil.Process(process.pid))
        deadline = time.monotonic() + START_LIMIT_S
        while not served.is_ready():
            problem = file.with_suffix(".log").read_text()[-3000:]
            assert process.poll() is None, problem
            assert time.monotonic() < deadline, problem
            time.sleep(0.2)
        yield served
    finally:
        process.terminate()
        process.wait(60)


def _name_of(process: psutil.Process) -> str | None:
    """Ray writes what a worker is, and the method that runs, into its command line."""
    with contextlib.suppress(psutil.NoSuchProcess):
        found = _TITLE.match(" ".join(process.cmdline()[:1]))
        return None if found is None else found[1] or found[2]
    return None
