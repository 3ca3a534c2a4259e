"""A Ray cluster of real nodes on this machine, each with its own ports, ended by its own processes alone."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil

from tests.integration.helpers import REPOSITORY, wait_until

_RAY = str(Path(sys.executable).with_name("ray"))
_START_LIMIT_S = 90
HOST = "127.0.0.1"


class RayNode:
    """`ray start --block` and everything that it starts, in a process group of its own."""

    def __init__(self, log: Path, *arguments: str):
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [_RAY, "start", "--block", "--disable-usage-stats", *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def processes(self) -> list[psutil.Process]:
        """The node's processes: all of its session, and descendants that opened one of their own (job drivers)."""
        found = {}
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                if process.status() != psutil.STATUS_ZOMBIE and os.getsid(process.pid) == self._process.pid:
                    found |= {p.pid: p for p in (process, *process.children(recursive=True))}
        return list(found.values())

    def kill(self) -> None:
        """SIGKILL to every process of the node, as when its machine loses power; returns when all are gone."""

        def gone() -> bool:
            self._process.poll()
            for process in (left := self.processes()):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            return not left

        wait_until(gone, 30, "the node's processes outlive SIGKILL")


class RayCluster:
    """A head node with dashboard, and further nodes as they are asked for. Use as a context manager."""

    def __init__(self, logs: Path):
        self._logs = logs
        self._nodes: list[RayNode] = []
        # Unix sockets have names of at most 107 characters, too few for pytest's own temporary folders.
        self.temp_dir = Path(tempfile.mkdtemp(prefix="vl", dir="/tmp"))
        self._gcs_port, self.dashboard_port, agent_port, client_port = free_ports(4)
        self.head = self._start(
            "--head",
            f"--node-ip-address={HOST}",
            f"--port={self._gcs_port}",
            "--include-dashboard=true",
            f"--dashboard-host={HOST}",
            f"--dashboard-port={self.dashboard_port}",
            f"--dashboard-agent-listen-port={agent_port}",
            f"--ray-client-server-port={client_port}",
            f"--temp-dir={self.temp_dir}",
            "--num-cpus=2",
        )

    @property
    def address(self) -> str:
        """Where jobs are submitted."""
        return f"http://{HOST}:{self.dashboard_port}"

    @property
    def gcs_address(self) -> str:
        """What drivers connect to."""
        return f"{HOST}:{self._gcs_port}"

    def add_node(self, resources: dict[str, float]) -> RayNode:
        """A worker node with custom resources; returns when it belongs to the cluster."""
        (agent_port,) = free_ports(1)
        known = self._living_nodes()
        node = self._start(
            f"--address={HOST}:{self._gcs_port}",
            f"--node-ip-address={HOST}",
            f"--dashboard-agent-listen-port={agent_port}",
            f"--resources={json.dumps(resources)}",
            "--num-cpus=2",
        )
        wait_until(lambda: bool(self._living_nodes() - known), _START_LIMIT_S, f"no new node, see {self._logs}")
        return node

    def _start(self, *arguments: str) -> RayNode:
        node = RayNode(self._logs / f"node{len(self._nodes)}.log", *arguments)
        self._nodes.append(node)
        return node

    def _living_nodes(self) -> set[str]:
        """Ids of the nodes that the dashboard calls alive; empty until it answers."""
        try:
            with urllib.request.urlopen(f"{self.address}/nodes?view=summary", timeout=5) as response:
                nodes = json.load(response)["data"]["summary"]
        except (OSError, ValueError):
            return set()
        return {node["raylet"]["nodeId"] for node in nodes if node["raylet"].get("state") == "ALIVE"}

    def __enter__(self) -> RayCluster:
        try:
            wait_until(lambda: bool(self._living_nodes()), _START_LIMIT_S, f"no head node, see {self._logs}")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        for node in reversed(self._nodes):
            node.kill()
        shutil.rmtree(self.temp_dir, ignore_errors=True)


class SubmittedJob:
    """`ray job submit` that follows its job to the end."""

    def __init__(self, cluster: RayCluster, log: Path, *train_arguments: str):
        self._log = log
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": cluster.address}
        entrypoint = [sys.executable, "-m", "trainer", "train", *train_arguments]
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [_RAY, "job", "submit", "--working-dir", ".", "--", *entrypoint],
                cwd=REPOSITORY,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> SubmittedJob:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(10)

    def output(self) -> str:
        """What the job and its submission printed so far."""
        return self._log.read_text()

    def assert_running(self) -> bool:
        """True; AssertionError with the job's output when the job has ended."""
        assert self._process.poll() is None, self.output()
        return True

    def assert_succeeds(self, limit_s: float) -> str:
        """Wait for the end; the output of a job that reached SUCCEEDED."""
        try:
            code = self._process.wait(limit_s)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"the job did not end within {limit_s:g} s:\n{self.output()}") from error
        assert code == 0, self.output()
        output = self.output()
        assert re.search(r"Job '\S+' succeeded", output), output
        return output


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on, all different, below those that the system gives to who asks for any.

    Among the latter another process may get one before its user binds it; Ray's servers would then share it unnoticed.
    """
    free: list[int] = []
    for port in random.Random(os.urandom(8)).sample(range(20_000, 32_000), 200):
        with socket.socket() as one, suppress(OSError):
            one.bind(("", port))
            free.append(port)
        if len(free) == n:
            return free
    raise RuntimeError("no free ports from 20000 to 32000")
