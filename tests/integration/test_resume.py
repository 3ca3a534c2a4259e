"""Runs that are killed, terminated, damaged and resumed lose nothing.

What gets a signal is `python -m trainer train` as a process of its own; what only reads its remains goes on in this
one. All runs have the same seed and local anchors; the losses of every interrupted run must equal those of one that
was left alone, bit for bit.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.config import load_config, parse_config
from shared.errors import ConfigError
from shared.run_folder import run_config
from tests.integration.helpers import REPOSITORY, training_tree, wait_until, write_config
from trainer.loop import train_run
from trainer.metrics import read_metrics

STEPS = 30
CLEVR_MINI = REPOSITORY.parent / "shared" / "clevr-mini"
LIMIT_S = 180


class TrainProcess:
    """One `python -m trainer train …`, ended in any case when the context ends."""

    def __init__(self, *arguments: str):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trainer", "train", *arguments, "--no-evaluate"],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self) -> TrainProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def signal_at(self, run_dir: Path, step: int, number: int) -> None:
        """Send a signal as soon as the metrics of `step` are on disk."""
        assert step < STEPS - 1, "the run would be over"
        reached = lambda: any(entry["step"] >= step for entry in read_metrics(run_dir))  # noqa: E731
        wait_until(lambda: reached() or self._process.poll() is not None, LIMIT_S, f"step {step} was not reached")
        self._process.send_signal(number)

    def end(self) -> tuple[int, str]:
        """Exit code and everything printed."""
        output, _ = self._process.communicate(timeout=LIMIT_S)
        return self._process.returncode, output


def config_file(toy: Path, run_dir: Path, **train: Any) -> Path:
    settings = {"steps": STEPS, "batch_images": 4, "lr_lora": 5e-3, "checkpoint_every": 10, "keep_checkpoints": 3}
    return write_config(training_tree(toy, run_dir, train={**settings, **train}), run_dir.with_suffix(".yaml"))


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in read_metrics(run_dir)]


def resume(run_dir: Path) -> None:
    """What `--resume` does, in this process."""
    assert train_run(run_config(run_dir), resume=True)


@pytest.fixture(scope="module")
def quiet(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("quiet") / "run"
    assert train_run(load_config(config_file(toy_folder, run_dir)), resume=False)
    assert [step for step, *_ in losses(run_dir)] == list(range(STEPS))
    return run_dir


@pytest.fixture
def interrupted(quiet: Path, tmp_path: Path) -> Path:
    """A copy of the undisturbed run as a SIGKILL before its last checkpoint would have left it."""
    run_dir = tmp_path / "run"
    shutil.copytree(quiet, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-000030")
    return run_dir


@pytest.mark.parametrize("step", [0, 14], ids=["before the first checkpoint", "after one"])
def test_sigkill_and_resume(quiet: Path, toy_folder: Path, tmp_path: Path, step: int) -> None:
    run_dir = tmp_path / "run"
    with TrainProcess("--config", str(config_file(toy_folder, run_dir))) as process:
        process.signal_at(run_dir, step, signal.SIGKILL)
        code, output = process.end()
    assert code == -signal.SIGKILL, output
    assert len(losses(run_dir)) < STEPS
    with TrainProcess("--resume", str(run_dir)) as process:
        code, output = process.end()
    assert code == 0, output
    assert losses(run_dir) == losses(quiet)


def test_sigkill_while_a_checkpoint_is_written(
    quiet: Path, interrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What such a kill leaves is a partial folder beside the whole ones; it is never read."""
    checkpoints = interrupted / "checkpoints"
    partial = shutil.copytree(checkpoints / "step-000020", checkpoints / ".step-000030.partial")
    (partial / "manifest.json").unlink()
    resume(interrupted)
    assert "damaged" not in caplog.text
    assert losses(interrupted) == losses(quiet)
    assert (checkpoints / "step-000030").is_dir()
    assert not partial.exists()


def test_sigterm_checkpoints_and_exits_with_zero(quiet: Path, toy_folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = config_file(toy_folder, run_dir, checkpoint_every=1000)
    with TrainProcess("--config", str(config)) as process:
        process.signal_at(run_dir, 2, signal.SIGTERM)
        code, output = process.end()
    assert code == 0, output
    done = len(losses(run_dir))
    assert 3 <= done < STEPS
    assert [folder.name for folder in (run_dir / "checkpoints").glob("step-*")] == [f"step-{done:06d}"]
    assert f"stopped on SIGTERM after step {done}" in output
    resume(run_dir)
    assert losses(run_dir) == losses(quiet)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "trainer_state.pt", "manifest.json"])
def test_damaged_checkpoint_is_named_and_the_one_before_used(
    quiet: Path, interrupted: Path, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    newest = interrupted / "checkpoints" / "step-000020"
    content = (newest / file).read_bytes()
    (newest / file).write_bytes(content[: len(content) // 2])
    resume(interrupted)
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "shared.run_folder"]
    assert warning.startswith(f"{newest}: ")
    assert "damaged" in warning
    assert warning.endswith("; trying the one before")
    assert losses(interrupted) == losses(quiet)


def test_run_folder_in_use_is_refused(quiet: Path) -> None:
    with pytest.raises(ConfigError, match=f"{quiet}: the run folder is in use; .* go on with --resume {quiet}$"):
        train_run(load_config(quiet.with_suffix(".yaml")), resume=False)
    assert len(losses(quiet)) == STEPS


@pytest.mark.skipif(not CLEVR_MINI.is_dir(), reason=f"real CLEVR images are optional; none at {CLEVR_MINI}")
def test_real_clevr_images_train(toy_folder: Path, tmp_path: Path) -> None:
    """Images and questions of the official generator, through the same loader."""
    tree = training_tree(
        toy_folder,
        tmp_path / "run",
        data={"path": str(CLEVR_MINI), "test_split": "val", "questions_per_image": 2},
        train={"steps": 20, "batch_images": 4, "validate_images": 4},
    )
    assert train_run(parse_config(tree, "test"), resume=False)
    entries = read_metrics(tmp_path / "run")
    assert len(entries) == 20
    # The term itself: the loss weighs it more from step to step.
    assert sum(entry["nll"] for entry in entries[-5:]) < sum(entry["nll"] for entry in entries[:5])
