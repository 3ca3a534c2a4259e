"""From `--grid` options to the trials of a sweep: settings, seed, run folder, all checked before anything starts."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shared.config import Config, load_config
from shared.errors import ConfigError
from shared.run_folder import run_config
from trainer.methods import with_checked_method

_SHORT = {"K": "generator.latents"}
_MOST_TRIALS = 10_000


@dataclass(frozen=True, slots=True)
class Axis:
    """One `--grid`: its name as it was typed, the config field, the values."""

    name: str
    field: str
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Trial:
    """One run. point: its value on every axis, by the axis' name."""

    point: dict[str, Any]
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """Its point in words; seeds of one point share it."""
        return ", ".join(f"{axis}={_text(value)}" for axis, value in self.point.items()) or "all defaults"


def parse_axis(option: str) -> Axis:
    """`K=4,9,16` or `train.lr_lora=1e-4,1e-3`; values are YAML. Raises ConfigError."""
    name, equals, text = option.partition("=")
    try:
        values = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError as error:
        raise ConfigError(f"--grid {option}: the values are not valid YAML") from error
    if not equals or not name or not values:
        raise ConfigError(f"--grid {option}: write it as field=value,value, for example K=4,9,16 or method=livr,sft")
    if len({_text(value) for value in values}) < len(values):
        raise ConfigError(f"--grid {option}: a value stands there twice; remove one")
    return Axis(name, _SHORT.get(name, name), tuple(values))


def trials(config_file: Path, overrides: Sequence[str], axes: Sequence[Axis], n_seeds: int, to: Path) -> list[Trial]:
    """Every point of the grid with every seed, each with its own run folder. Raises ConfigError for a bad one."""
    for field in {axis.field for axis in axes}:
        if sum(axis.field == field for axis in axes) > 1 or field in ("run.dir", "train.seed"):
            raise ConfigError(f"--grid {field}: the sweep sets it itself, or it stands there twice; remove it")
    points = list(itertools.product(*(axis.values for axis in axes)))
    if len(points) * n_seeds > _MOST_TRIALS:
        raise ConfigError(
            f"--grid: {len(points)} points × {n_seeds} seeds are more than {_MOST_TRIALS} runs; ask for fewer"
        )
    found = []
    for values in points:
        point = {axis.name: value for axis, value in zip(axes, values, strict=True)}
        settings = [
            f"{axis.field}={yaml.safe_dump(v, default_flow_style=True).splitlines()[0]}"
            for axis, v in zip(axes, values, strict=True)
        ]
        for seed in range(n_seeds):
            folder = to / "trials" / f"{_slug(point)}-seed{seed}"
            own = [*overrides, *settings, f"run.dir={folder}", f"train.seed={seed}"]
            found.append(Trial(point, seed, with_checked_method(load_config(config_file, own))))
    _check_folders(found)
    return found


def _check_folders(found: Sequence[Trial]) -> None:
    """One folder for each trial, and nothing in it from a run of other settings."""
    folders = [trial.config.run.dir for trial in found]
    for trial, folder in zip(found, folders, strict=True):
        if folders.count(folder) > 1:
            raise ConfigError(f"--grid: two points would share the folder {folder}; sweep over them one by one")
        if (folder / "config.yaml").is_file() and run_config(folder) != trial.config:
            raise ConfigError(f"{folder}: a run with other settings lies there; choose another --to, or remove it")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).splitlines()[0]


def _slug(point: dict[str, Any]) -> str:
    words = "-".join(f"{axis}={_text(value)}" for axis, value in point.items()) or "default"
    return re.sub(r"[^A-Za-z0-9_.=+-]+", "_", words)
