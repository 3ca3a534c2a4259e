"""Connect to Ray: the cluster of the job that runs us, or a local one that ends with us; what anchors take of it."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from shared.config import AnchorConfig, Config
from shared.errors import ResourceError


@contextlib.contextmanager
def ray_if_needed(config: Config, anchors: Sequence[AnchorConfig]) -> Iterator[None]:
    """Ray for as long as the context lasts, if any anchor is a Ray actor; otherwise Ray is not even imported.

    A cluster named by RAY_ADDRESS (set in every Ray job) is used as it is. A local one gets as many logical CPUs
    as the anchors ask for, if the machine has fewer: CPUs there are bookkeeping. Raises ResourceError if the
    cluster cannot hold `anchors`, all that will be needed at one time: nothing has been loaded anywhere by then.
    """
    if all(anchor.placement != "ray" for anchor in anchors):
        yield
        return
    with ray_cluster(sum(a.cpus * a.replicas for a in anchors if a.placement == "ray")):
        check_resources(config, anchors)
        yield


@contextlib.contextmanager
def ray_cluster(cpus: float) -> Iterator[None]:
    """The Ray that is there, else the cluster named by RAY_ADDRESS, else a local one with at least `cpus` logical CPUs.

    What was started here is ended with the context.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=True)
    else:
        ray.init(num_cpus=max(os.cpu_count() or 1, math.ceil(cpus)), include_dashboard=False, logging_level="WARNING")
    try:
        yield
    finally:
        ray.shutdown()


def prometheus_gauge(name: str, description: str, labels: tuple[str, ...]) -> Any:
    """A `ray.util.metrics.Gauge`, which every node of the cluster shows Prometheus as ray_NAME; None without Ray."""
    ray = sys.modules.get("ray")  # asked of the run's own Ray: a run without one must not import it
    if ray is None or not ray.is_initialized():
        return None
    from ray.util.metrics import Gauge

    return Gauge(name, description, labels)


def bundle(config: Config, anchor: AnchorConfig) -> dict[str, float]:
    """What one replica of an anchor takes from a node."""
    wanted = {"CPU": anchor.cpus, "GPU": anchor.gpus, **config.pool.resources}
    return {name: amount for name, amount in wanted.items() if amount > 0} or {"CPU": 0.01}


def check_resources(config: Config, anchors: Sequence[AnchorConfig]) -> None:
    """Raises ResourceError if the cluster as it stands could never hold the Ray actors of these anchors."""
    if config.pool.wait_for_autoscaler:
        return
    import ray

    remote = [anchor for anchor in anchors if anchor.placement == "ray"]
    bundles = [bundle(config, anchor) for anchor in remote for _ in range(anchor.replicas)]
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name in sorted({name for one in bundles for name in one}):
        wanted = sum(one.get(name, 0.0) for one in bundles)
        there = sum(node.get(name, 0.0) for node in nodes)
        if wanted > there + 1e-9:
            raise ResourceError(
                f"the anchors need {wanted:g} {name} but the cluster has {there:g}; lower anchors[].replicas or "
                f"what one of them takes, add nodes, or set pool.wait_for_autoscaler: true"
            )
    for anchor in remote:
        replica = bundle(config, anchor)
        if not any(all(node.get(name, 0.0) >= amount for name, amount in replica.items()) for node in nodes):
            wanted_text = ", ".join(f"{amount:g} {name}" for name, amount in replica.items())
            raise ResourceError(
                f"anchor {anchor.name}: no single node of the cluster has the {wanted_text} that each replica "
                "needs; lower them, add a larger node, or set pool.wait_for_autoscaler: true"
            )
