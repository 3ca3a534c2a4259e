"""Where numbers go: metrics.jsonl (one object per step), TensorBoard, Weights & Biases, Prometheus where Ray runs."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

from anchor_service.cluster import prometheus_gauge
from shared.config import Config
from shared.errors import ConfigError

log = logging.getLogger(__name__)

PROMETHEUS_NAME = "visual_latents_training"
"""One gauge for all numbers of a run: their names, such as anchor_ms/A, are no names of Prometheus."""


class MetricsWriter:
    """Appends one flat mapping per step. Opened at a step: later entries of an interrupted run are cut off."""

    def __init__(self, run_dir: Path, config: Config, first_step: int):
        self._path = run_dir / "metrics.jsonl"
        _keep_before(self._path, first_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = _tensorboard(run_dir, first_step) if config.logging.tensorboard else None
        self._wandb = _wandb(run_dir, config) if config.logging.wandb else None
        self._gauge = prometheus_gauge(PROMETHEUS_NAME, "The newest step's metrics.", ("run", "metric"))
        self._run = run_dir.name

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write one step's values; numbers also go to TensorBoard, W&B and Prometheus."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        numbers = {name: v for name, v in values.items() if isinstance(v, int | float)}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)
        if self._gauge is not None:
            for name, value in {"step": step, **numbers}.items():
                self._gauge.set(value, {"run": self._run, "metric": name})

    def close(self) -> None:
        """Flush everything."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All entries of a run; a last line cut short by a crash is left out."""
    entries = []
    path = run_dir / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


def _keep_before(path: Path, first_step: int) -> None:
    """Drop what an interrupted run wrote from `first_step` on; it will be written again."""
    if not path.is_file():
        return
    kept = [entry for entry in read_metrics(path.parent) if entry["step"] < first_step]
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
    temporary.replace(path)


def _tensorboard(run_dir: Path, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)


def _wandb(run_dir: Path, config: Config) -> Any:
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("logging.wandb: true, but the package is absent; pip install wandb, or set it to false")
    import wandb

    return wandb.init(dir=str(run_dir), config=config.model_dump(mode="json"), resume="allow", id=run_dir.name)
