"""Runs the trials of a sweep on Ray Tune: each is `python -m trainer train` in a process of its own.

Tune decides when a trial starts and how many at a time; a trial's own anchors join the same cluster. A sweep that was
stopped goes on when it is called again: finished runs count as they are, others resume from their last checkpoint. On
several nodes, the sweep's folder must be one that all of them see.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from rich.console import Console

from anchor_service.cluster import bundle
from shared.config import dump_config
from shared.errors import ResourceError
from trainer.data import prepare_data
from trainer.evaluation.headline import headline
from trainer.evaluation.run import EVALUATION_FILE
from trainer.sweep.grid import Trial, parse_axis, trials
from trainer.sweep.results import Outcome, write_results

_TAIL_CHARACTERS = 400
_LOG_FILE = "sweep.log"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class SweepOptions:
    """What the command line asks for. cpus_per_trial: of the driver; None: `generator.cpus`, or 1."""

    config_file: Path
    overrides: Sequence[str]
    grid: Sequence[str]
    seeds: int
    to: Path
    cpus_per_trial: float | None


def run_sweep(options: SweepOptions, console: Console) -> list[Outcome]:
    """Run what is missing, print and write the table. Raises ConfigError, ResourceError before anything starts.

    A trial that fails is shown with its last words, and the others go on.
    """
    axes = [parse_axis(option) for option in options.grid]
    planned = trials(options.config_file, options.overrides, axes, options.seeds, options.to)
    todo = [trial for trial in planned if _outcome(trial).figures is None]
    console.print(f"{len(planned)} runs, {len(planned) - len(todo)} of them finished", highlight=False)
    errors: dict[Path, str] = {}
    for data in {str(trial.config.data): trial.config.data for trial in todo}.values():
        prepare_data(data, console)
    if todo:
        with _cluster(most([resources(trial, options.cpus_per_trial) for trial in todo])) as at_a_time:
            errors = _run(todo, options, at_a_time)
    outcomes = [_outcome(trial, errors.get(trial.config.run.dir, "")) for trial in planned]
    write_results(outcomes, axes, options.to, console)
    return outcomes


def _run(todo: Sequence[Trial], options: SweepOptions, at_a_time: int) -> dict[Path, str]:
    """Errors by run folder."""
    jobs = [_Job(Path.cwd(), trial.config.run.dir, dump_config(trial.config)) for trial in todo]
    driver = most([_driver(trial, options.cpus_per_trial) for trial in todo])
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_train, jobs=jobs), driver),
        param_space={"job": tune.grid_search(list(range(len(jobs))))},
        tune_config=tune.TuneConfig(max_concurrent_trials=at_a_time),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str((options.to / "tune").resolve()),
            verbose=0,
            callbacks=[_Progress(todo)],
        ),
    )
    tuner.fit()
    return {job.folder: text for job in jobs if (text := _last_words(job.folder)) is not None}


@dataclass(frozen=True, slots=True)
class _Job:
    """working_dir: what the relative paths of the config start from; Tune gives each trial another."""

    working_dir: Path
    folder: Path
    config: str


def _train(params: dict[str, Any], jobs: Sequence[_Job]) -> None:
    """One trial, in a process of Tune's: the command line a user would type, its output in the run folder."""
    job = jobs[params["job"]]
    folder = job.working_dir / job.folder
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "metrics.jsonl").exists():
        arguments = ["--resume", str(job.folder)]
    else:
        file = folder / "sweep.yaml"
        file.write_text(job.config, encoding="utf-8")
        arguments = ["--config", str(file)]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with (folder / _LOG_FILE).open("a", encoding="utf-8") as log:
        done = subprocess.run(
            [sys.executable, "-m", "trainer", "train", *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=job.working_dir,
            preexec_fn=_end_with_parent,
        )
    evaluation = folder / EVALUATION_FILE
    if done.returncode or not evaluation.is_file():
        raise RuntimeError(f"{folder}: exit status {done.returncode}; see {folder / _LOG_FILE}")
    tune.report(headline(json.loads(evaluation.read_text(encoding="utf-8"))))


def _end_with_parent() -> None:
    """A run whose sweep is killed gets SIGTERM, on which it writes a checkpoint (on Linux; elsewhere it runs on)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class _Progress(tune.Callback):
    """One line for each run that ends. Tune pickles it, which a console does not survive."""

    def __init__(self, todo: Sequence[Trial]):
        self._todo, self._done = todo, 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        figures = _outcome(self._todo[trial.config["job"]]).figures or {}
        self._line(trial, ", ".join(f"{name} {value:.3f}" for name, value in list(figures.items())[:2]))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._line(trial, "[red]failed[/red]")

    def _line(self, trial: Any, what: str) -> None:
        self._done += 1
        ours = self._todo[trial.config["job"]]
        Console().print(f"{self._done}/{len(self._todo)}  {ours.name}, seed {ours.seed}: {what}", highlight=False)


def most(needs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each resource what the hungriest trial takes: points of a grid may differ in anchors and devices."""
    most = {name: max(need.get(name, 0.0) for need in needs) for need in needs for name in need}
    return {name: amount for name, amount in most.items() if amount > 0}


def _driver(trial: Trial, cpus: float | None) -> dict[str, float]:
    """What the trainer's own process takes."""
    on_gpu = trial.config.generator.device != "cpu" and torch.cuda.is_available()
    return {"CPU": cpus if cpus is not None else float(trial.config.generator.cpus or 1), "GPU": float(on_gpu)}


def resources(trial: Trial, cpus: float | None) -> dict[str, float]:
    """What one trial takes in all: its driver and its anchors' actors."""
    total = _driver(trial, cpus)
    for anchor in trial.config.all_anchors:
        for name, amount in bundle(trial.config, anchor).items() if anchor.placement == "ray" else ():
            total[name] = total.get(name, 0.0) + amount * anchor.replicas
    return total


@contextlib.contextmanager
def _cluster(wanted: dict[str, float]) -> Iterator[int]:
    """Ray, and how many trials fit into it at a time. Raises ResourceError if none does."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # runs write their own metrics
    if not ray.is_initialized():
        if os.environ.get("RAY_ADDRESS"):
            ray.init()
        else:
            cpus = max(os.cpu_count() or 1, math.ceil(wanted["CPU"]))
            ray.init(num_cpus=cpus, include_dashboard=False, logging_level="WARNING", log_to_driver=False)
    try:
        there = ray.cluster_resources()
        fits = min(int(there.get(name, 0.0) / amount + 1e-9) for name, amount in wanted.items())
        if fits < 1:
            needs = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
            raise ResourceError(
                f"a trial needs {needs}, more than the cluster has; lower --cpus-per-trial, or add nodes"
            )
        yield fits
    finally:
        ray.shutdown()


def _outcome(trial: Trial, error: str = "") -> Outcome:
    """What a run's folder says."""
    file = trial.config.run.dir / EVALUATION_FILE
    figures = headline(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
    return Outcome(trial.point, trial.seed, trial.config.run.dir, figures, "" if figures is not None else error)


def _last_words(folder: Path) -> str | None:
    """The end of a failed run's output; None if it has its evaluation."""
    if (folder / EVALUATION_FILE).is_file():
        return None
    log = folder / _LOG_FILE
    text = log.read_text(encoding="utf-8", errors="replace").strip() if log.is_file() else ""
    return text[-_TAIL_CHARACTERS:] or "it did not start; see the folder tune/"
