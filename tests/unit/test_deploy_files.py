"""The shipped deployment files: every config parses and says what it promises, pins agree."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import yaml
from ray.runtime_env import RuntimeEnv

from shared.config import load_config, parse_config
from trainer.methods import with_checked_method

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "deploy/configs").rglob("*.yaml"))


def pins(lines: list[str]) -> dict[str, str]:
    """Versions by package name in small letters."""
    pairs = [line.split("==") for line in lines if line.strip() and not line.startswith("#")]
    return {name.lower(): version.strip() for name, version in pairs}


def test_configs_are_found() -> None:
    assert {"toy.yaml", "a6000.yaml", "cluster.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_parses_and_survives_a_round_trip(path: Path) -> None:
    config = load_config(path)
    assert parse_config(config.model_dump(mode="json"), "round trip") == config
    assert with_checked_method(config).method == config.method


def test_the_single_card_config_needs_no_ray() -> None:
    config = load_config(ROOT / "deploy/configs/a6000.yaml")
    assert all(anchor.placement != "ray" for anchor in config.all_anchors)
    assert [anchor.placement for anchor in config.anchors] == ["shared_base"]
    assert (config.generator.latents, config.generator.lora.rank, config.generator.lora.alpha) == (16, 32, 64)


def test_the_cluster_config_gives_every_anchor_a_gpu_and_one_dtype() -> None:
    config = load_config(ROOT / "deploy/configs/cluster.yaml")
    assert all(anchor.placement == "ray" and anchor.gpus >= 1 for anchor in config.anchors)
    assert len(config.anchors) >= 2
    assert max(anchor.replicas for anchor in config.anchors) >= 2
    assert {anchor.dtype for anchor in config.anchors} == {config.generator.dtype}


@pytest.mark.parametrize("name", ["a6000.yaml", "cluster.yaml"])
def test_full_configs_spell_out_every_training_field(name: str) -> None:
    """Somebody who copies one of these files sees every dial of the optimization with its comment."""
    tree = yaml.safe_load((ROOT / "deploy/configs" / name).read_text())
    config = load_config(ROOT / "deploy/configs" / name).model_dump(mode="json")
    assert set(tree["train"]) == set(config["train"])


def test_the_runtime_env_is_valid_and_pins_what_constraints_pin() -> None:
    tree = yaml.safe_load((ROOT / "deploy/ray/runtime_env.yaml").read_text())
    RuntimeEnv(**tree)  # raises for an unknown field or a wrong type
    constraints = pins((ROOT / "constraints.txt").read_text().splitlines())
    packages = pins(tree["pip"])
    assert packages == {name: constraints[name] for name in packages}
    assert "ray" not in packages, "a job runs the Ray of its cluster"


def test_the_runtime_env_leaves_the_code_in() -> None:
    excludes = yaml.safe_load((ROOT / "deploy/ray/runtime_env.yaml").read_text())["excludes"]
    for needed in ("trainer", "anchor_service", "shared", "deploy"):
        assert all(pattern.strip("/").split("/")[0] != needed for pattern in excludes)
    assert all(pattern.startswith("/") for pattern in excludes), "data/ without a slash would hide trainer/data"


def test_constraints_cover_every_dependency_and_leave_torchvision_out() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {spec.split(">")[0].split("[")[0].strip().lower() for spec in wanted}
    constraints = pins((ROOT / "constraints.txt").read_text().splitlines())
    assert names <= set(constraints)
    assert constraints["torch"] == "2.13.0"
    assert "torchvision" not in constraints
