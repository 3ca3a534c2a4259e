"""One local Ray for all tests that need no cluster of their own, and tiny models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ray
import torch

from tests.integration.helpers import REPOSITORY, anchor_pids, wait_until
from tests.tiny_models import build_tiny


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the anchors' processes, so that sums are taken in the same order everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Four logical CPUs, whatever the machine has; ended with everything in it."""
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        logging_level="WARNING",
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(REPOSITORY)}},
    )
    yield
    ray.shutdown()


@pytest.fixture
def clean_ray(local_ray: None) -> Iterator[None]:
    """The local Ray; the test must give back every CPU that it took and leave no anchor's process behind.

    Processes of an earlier pool that are still ending when the test begins may end during it: hence no more, not equal.
    """
    pids, cpus = anchor_pids(), ray.available_resources().get("CPU", 0.0)
    yield
    wait_until(lambda: anchor_pids() <= pids, 20, "the test left the process of an anchor")
    wait_until(lambda: ray.available_resources().get("CPU", 0.0) >= cpus, 20, "the test left a placement group")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random model of a family, built when it is first asked for."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(family: str) -> Path:
        return root / family if (root / family).is_dir() else build_tiny(family, root / family)

    return folder
