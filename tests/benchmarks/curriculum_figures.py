"""Curricula beside none at equal steps on the toy world, three seeds each (`make curriculum-figures`).

Each run is the command line that a user would type. Runs are kept in runs/curriculum and not repeated if they are
complete; delete the folder to measure again. Two run at a time, each on one CPU core without Ray: about 10 minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from shared.config import load_config
from shared.run_folder import run_config
from tests.benchmarks.results import Result, record
from trainer.data import prepare_data, training_records
from trainer.data.curriculum import Curriculum
from trainer.data.sampling import Sampler
from trainer.evaluation.statistics import Figure, over_seeds

SEEDS = (0, 1, 2)
COMMAND = "make curriculum-figures"
RUNS = Path("runs/curriculum")
CONFIG = "deploy/configs/toy.yaml"
SCHEDULES = ("none", "linear", "cosine", "steps")
SETTINGS = (
    "anchors.0.placement=local",
    "anchors.1.placement=local",
    "evaluation.unseen=[]",
    "evaluation.transfer=[]",
)
STEPS = 300
"""Half of the demo's, so that runs still differ; the curriculum is over after half of them."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one run reached, as means over all anchors, and on how many questions. n: questions of an evaluation."""

    recovered_share: float
    accuracy: dict[str, float]
    questions: int
    n: int


def run(schedule: str, seed: int, settings: Sequence[str]) -> Run:
    """Train and evaluate, unless that was done."""
    folder = RUNS / f"{schedule}-{seed}"
    if not (folder / "evaluation.json").is_file():
        curriculum = [f"data.curriculum.schedule={schedule}", f"data.curriculum.steps={STEPS // 2}"]
        own = [f"run.dir={folder}", f"train.seed={seed}", f"train.steps={STEPS}", *curriculum, *SETTINGS, *settings]
        arguments = ["--config", CONFIG, *(part for setting in own for part in ("--set", setting))]
        if (folder / "metrics.jsonl").is_file():
            arguments = ["--resume", str(folder)]
        subprocess.run([sys.executable, "-m", "trainer", "train", *arguments], check=True)
    anchors = json.loads((folder / "evaluation.json").read_text())["anchors"].values()
    shares = [anchor["recovered_share"]["value"] for anchor in anchors]
    kinds = next(iter(anchors))["kinds"]
    accuracy = {kind: statistics.mean(a["kinds"][kind]["latents"]["value"] for a in anchors) for kind in kinds}
    n = next(iter(anchors))["latents"]["n"]
    return Run(statistics.mean(shares), accuracy, questions_asked(folder), n)


def questions_asked(folder: Path) -> int:
    """How many questions a run was trained on: its batches, drawn once more."""
    config = run_config(folder)
    data, t = config.data, config.train
    records = training_records(data, t.seed)
    sampler = Sampler(records, t.batch_images, data.questions_per_image, t.seed, Curriculum(data.curriculum))
    return sum(len(asked) for step in range(t.steps) for asked in sampler.batch(step).questions)


def result(figure: str, seeds: Figure, n: int) -> Result:
    """A mean over seeds with Student's interval."""
    unit = f"mean and 95 % interval over {seeds.n} seeds, {n} questions each"
    return Result(f"toy, {figure}", seeds.value, unit, "–", None, seeds.low, seeds.high, n, COMMAND)


def rows_of(schedule: str, runs: Sequence[Run], without: Sequence[Run]) -> list[Result]:
    """One schedule, and its difference to no curriculum, paired by seed."""
    n = runs[0].n
    rows = [result(f"curriculum {schedule}: recovered share", over_seeds([r.recovered_share for r in runs]), n)]
    for kind in runs[0].accuracy:
        rows.append(result(f"curriculum {schedule}: accuracy, {kind}", over_seeds([r.accuracy[kind] for r in runs]), n))
    rows.append(result(f"curriculum {schedule}: questions trained on", over_seeds([r.questions for r in runs]), n))
    if runs is not without:
        gains = [a.recovered_share - b.recovered_share for a, b in zip(runs, without, strict=True)]
        rows.append(result(f"curriculum {schedule} − none: recovered share", over_seeds(gains), n))
    return rows


def main() -> None:
    """Run everything and record it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="Runs at a time; each takes one CPU core.")
    parser.add_argument("--set", action="append", default=[], help="Override of the config, for trying it out.")
    options = parser.parse_args()
    prepare_data(load_config(Path(CONFIG), []).data, Console())  # before two runs do it at once
    todo = [(schedule, seed) for schedule in SCHEDULES for seed in SEEDS]
    with ThreadPoolExecutor(options.jobs) as pool:
        done = dict(zip(todo, pool.map(lambda job: run(*job, options.set), todo), strict=True))
    by_schedule = {schedule: [done[schedule, seed] for seed in SEEDS] for schedule in SCHEDULES}
    record(row for schedule, runs in by_schedule.items() for row in rows_of(schedule, runs, by_schedule["none"]))


if __name__ == "__main__":
    main()
