"""What train left in a run folder, read and checked: its config, its checkpoints, the generator it trained.

    RUN/config.yaml                the resolved config
    RUN/checkpoints/step-000200/   a PEFT adapter folder with a manifest of every file's SHA-256
    RUN/checkpoints/best           name of the checkpoint with the lowest validation loss

Nothing here is unpickled: the adapter is safetensors.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.config import Config, load_config
from shared.errors import CheckpointError, ConfigError
from shared.vlm.generator import Generator

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk that passed its check."""

    folder: Path
    step: int
    validation_loss: float | None


class Checkpoints:
    """The checkpoints of one run, to be read."""

    def __init__(self, run_dir: Path):
        self._root = run_dir / "checkpoints"

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; damaged ones are named in a warning and passed over."""
        for folder in self._folders():
            try:
                return _checked(folder)
            except CheckpointError as error:
                log.warning("%s; trying the one before", error)
        return None

    def best(self) -> Checkpoint | None:
        """The checkpoint with the lowest validation loss; without validation, the newest."""
        pointer = self._root / "best"
        if pointer.is_file():
            try:
                return _checked(self._root / pointer.read_text().strip())
            except CheckpointError as error:
                log.warning("%s; using the newest", error)
        return self.newest()

    def _folders(self) -> list[Path]:
        """Newest first."""
        return sorted(self._root.glob("step-*"), reverse=True)


def run_config(run_dir: Path, overrides: Sequence[str] = ()) -> Config:
    """The resolved config of a run folder, with `run.dir` where the folder lies now."""
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir}: not a run folder (no config.yaml); give the folder that train wrote")
    return load_config(run_dir / "config.yaml", [f"run.dir={run_dir}", *overrides])


def best_checkpoint(config: Config) -> Checkpoint:
    """The best checkpoint of a run. Raises CheckpointError if there is none."""
    checkpoint = Checkpoints(config.run.dir).best()
    if checkpoint is None:
        raise CheckpointError(f"{config.run.dir}: no checkpoint; train first")
    return checkpoint


def trained_generator(config: Config) -> Generator:
    """The generator of a run with its best checkpoint. Raises CheckpointError."""
    generator = Generator(config.generator, config.train.seed)
    generator.load_adapter(best_checkpoint(config).folder)
    return generator


def digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _checked(folder: Path) -> Checkpoint:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest["files"].items():
            if digest(folder / name) != expected:
                raise CheckpointError(f"{folder}: {name} is damaged (its SHA-256 differs from the manifest)")
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: damaged checkpoint ({' '.join(str(error).split())})") from error
    return Checkpoint(folder, int(manifest["step"]), manifest["validation_loss"])
