"""`data.engine: ray` on two nodes gives the batches of `local`, bit for bit, from the start and where a run goes on."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import torch
from ray.util.state import list_actors

from shared.config import Config, load_config, parse_config
from shared.errors import ConfigError
from shared.vlm import load_prompt, load_vlm
from tests.integration.cluster import RayCluster
from tests.integration.helpers import REPOSITORY, training_tree, wait_until, write_config
from trainer.data import ErrorPolicy
from trainer.image_features import ImagePreparer
from trainer.loading import LocalLoader, Prepared, training_sampler
from trainer.methods import METHODS
from trainer.microbatches import Microbatches
from trainer.ray_loading import RayLoader

STEPS, BATCH = 150, 24
"""Work for some ten seconds: a worker that comes up when the others have done it all is sent home."""
RESUMED = 140
LIMIT_S = 240


def same(one: list[Prepared], other: list[Prepared]) -> bool:
    """Records, questions, and every bit of what the vision tower is given."""
    return len(one) == len(other) and all(
        a.batch == b.batch
        and a.images.per_row == b.images.per_row
        and a.images.inputs.keys() == b.images.inputs.keys()
        and all(torch.equal(a.images.inputs[name], b.images.inputs[name]) for name in a.images.inputs)
        for a, b in zip(one, other, strict=True)
    )


def local_loader(config: Config) -> LocalLoader:
    t = config.train
    _, sampler = training_sampler(config, load_prompt(config.generator.model))
    images = ImagePreparer(load_vlm(config.generator.model).image_inputs, None)
    return LocalLoader(
        sampler,
        images,
        METHODS[config.method].seen,
        ErrorPolicy("fail"),
        Microbatches(t.microbatches, t.batch_images, False),
        t.steps,
    )


def nodes_of_workers() -> set[str]:
    actors = list_actors(filters=[("state", "=", "ALIVE")])
    return {actor.node_id for actor in actors if "MapWorker" in actor.class_name}


def wait_for_free_cpus() -> None:
    """Of both nodes: the loader takes as many workers as there are free CPUs when it begins."""
    wait_until(lambda: ray.available_resources().get("CPU", 0.0) >= 4, 60, "not all CPUs of the two nodes are free")


def compare(file: Path) -> None:
    """In a process of its own, which may join another Ray than the tests'."""
    config = load_config(file)
    ray.init(logging_level="WARNING", log_to_driver=False)
    wait_for_free_cpus()
    with contextlib.closing(local_loader(config)) as local:
        expected = [local.parts(step) for step in range(STEPS)]
    assert not same(expected[0], expected[1])
    with contextlib.closing(RayLoader(config)) as remote:
        assert same(remote.parts(0), expected[0])
        wait_until(lambda: len(nodes_of_workers()) == 2, 60, "no worker on each of the two nodes")
        assert all(same(remote.parts(step), expected[step]) for step in range(1, STEPS))
    wait_for_free_cpus()
    with contextlib.closing(RayLoader(config)) as remote:
        assert all(same(remote.parts(step), expected[step]) for step in range(RESUMED, STEPS))
    ray.shutdown()


def test_two_nodes_give_the_batches_of_the_local_loader(toy_folder: Path, tmp_path: Path) -> None:
    tree = training_tree(toy_folder, tmp_path / "run", train={"steps": STEPS, "batch_images": BATCH, "microbatches": 2})
    file = write_config(tree, tmp_path / "config.yaml")
    script = f"import tests.integration.test_ray_loading as test; test.compare(test.Path({str(file)!r}))"
    with RayCluster(tmp_path) as cluster:
        cluster.add_node({})
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_ADDRESS": cluster.gcs_address}
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_ray_cannot_do_is_refused(toy_folder: Path, tmp_path: Path) -> None:
    data = {"path": "unused", "engine": "ray"}
    tree = training_tree(toy_folder, tmp_path, data=data, train={"microbatches": "auto"})
    with pytest.raises(ConfigError, match=r"train\.microbatches: auto .* data\.engine: ray; set a number"):
        parse_config(tree, "test")
    tree = training_tree(toy_folder, tmp_path, data={**data, "feature_cache": {"path": "cache", "max_gib": 1}})
    with pytest.raises(ConfigError, match=r"engine: ray .* feature_cache .* drop one"):
        parse_config(tree, "test")
