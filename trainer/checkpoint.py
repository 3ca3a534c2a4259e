"""Checkpoints: a PEFT adapter folder plus trainer state, written atomically, checked when read.

    RUN/checkpoints/step-000200/   adapter_config.json  adapter_model.safetensors  tokenizer files
                                   config.yaml  README.md  trainer_state.pt  manifest.json
    RUN/checkpoints/best           name of the checkpoint with the lowest validation loss

A folder is written under another name, synced and renamed, so a name `step-…` always means a whole checkpoint;
the manifest holds every file's SHA-256, so damage after that is noticed and the one before is used.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from shared.errors import CheckpointError
from shared.run_folder import MANIFEST, Checkpoint, Checkpoints, digest
from shared.vlm.generator import Generator

_STATE = "trainer_state.pt"


class CheckpointStore(Checkpoints):
    """The checkpoints of one run, to be written and read. Owned by the trainer's process."""

    def __init__(self, run_dir: Path, keep: int):
        super().__init__(run_dir)
        self._keep = keep

    def save(
        self,
        step: int,
        generator: Generator,
        trainer_state: dict[str, Any],
        config_yaml: str,
        model_card: str,
        validation_loss: float | None,
    ) -> Path:
        """Write a checkpoint, then drop those beyond the newest n and the best.

        Raises CheckpointError (disk full, no permission); earlier checkpoints are untouched then.
        """
        final = self._root / f"step-{step:06d}"
        partial = self._root / f".{final.name}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            generator.save_adapter(partial)
            torch.save(trainer_state, partial / _STATE)
            (partial / "config.yaml").write_text(config_yaml, encoding="utf-8")
            (partial / "README.md").write_text(model_card, encoding="utf-8")
            manifest = {
                "step": step,
                "validation_loss": validation_loss,
                "files": {file.name: digest(file) for file in sorted(partial.iterdir())},
            }
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            for path in (*partial.iterdir(), partial):
                _sync(path)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _sync(self._root)
            self._mark_best()
            self._drop_old()
        except Exception as error:  # a full disk is a bare Exception to tokenizers and its own to safetensors
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"{final}: checkpoint not written ({' '.join(str(error).split())[:200]}); free disk space and "
                "resume: earlier checkpoints are whole"
            ) from error
        return final

    def _whole(self) -> Iterator[Checkpoint]:
        for folder in self._folders():
            try:
                manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
                yield Checkpoint(folder, int(manifest["step"]), manifest["validation_loss"])
            except (OSError, ValueError, KeyError):
                continue

    def _mark_best(self) -> None:
        scored = [(c.validation_loss, c.folder.name) for c in self._whole() if c.validation_loss is not None]
        if scored:
            temporary = self._root / ".best.partial"
            temporary.write_text(min(scored)[1] + "\n")
            temporary.replace(self._root / "best")

    def _drop_old(self) -> None:
        pointer = self._root / "best"
        best = pointer.read_text().strip() if pointer.is_file() else None
        for folder in self._folders()[self._keep :]:
            if folder.name != best:
                shutil.rmtree(folder)


def load_trainer_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Optimizer, random state and the like. Only tensors and plain values are unpickled."""
    try:
        state: dict[str, Any] = torch.load(checkpoint.folder / _STATE, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{checkpoint.folder / _STATE}: cannot be read ({error})") from error
    return state


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
