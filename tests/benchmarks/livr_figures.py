"""LIVR beside its controls on toy tasks, at equal data and steps, and the usage test (`make livr-figures`).

Each run is the command line that a user would type. Runs are kept in runs/livr and not repeated if they are complete;
delete the folder to measure again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from shared.run_folder import run_config
from tests.benchmarks.results import Result, record
from trainer.evaluation.statistics import Figure, over_seeds

SEEDS = (0, 1, 2)
COMMAND = "make livr-figures"
RUNS = Path("runs/livr")
DATA, FEATURES = RUNS / "tasks", RUNS / "features"
TASKS = ("art_style", "counting", "object_localization", "relative_reflectance")
CONFIG = "deploy/configs/livr/toy.yaml"
METHODS = {"SFT": "sft", "latents only": "latents_only", "mask only": "mask_only", "LIVR": "livr"}
LONGER = {method: f"{method}, twice the steps" for method in ("SFT", "LIVR")}
"""What more training changes, of stage 1 above all: 4 + 6 epochs, as the paper trains single tasks."""
VARIANTS = {
    **{name: [f"method={method}"] for name, method in METHODS.items()},
    **{name: [f"method={METHODS[method]}", "train.steps=10000"] for method, name in LONGER.items()},
}
COSTS = {
    "latents_removed": "when latents are removed",
    "other_images": "with latents of other images",
    "bottleneck": "when the bottleneck is kept",
}
USAGE = ("normal", "latents_removed", "bottleneck", "both", "other_images", "floor")


def make_data(tasks: Sequence[str], train: int) -> None:
    """The toy tasks, unless they are there."""
    if not (DATA / "train.jsonl").is_file():
        arguments = ["--data", str(DATA), "--tasks", ",".join(tasks), "--train", str(train)]
        subprocess.run([sys.executable, "-m", "trainer", "toy", "tasks", *arguments], check=True)


def run(variant: str, seed: int, settings: Sequence[str]) -> dict[str, Any]:
    """evaluation.json of one run, with the decoder's operations over its training."""
    folder = RUNS / f"{variant.replace(',', '').replace(' ', '-').lower()}-{seed}"
    if not (folder / "evaluation.json").is_file():
        overrides = [*VARIANTS[variant], f"run.dir={folder}", f"train.seed={seed}", f"data.path={DATA}"]
        overrides += [f"data.feature_cache={{path: {FEATURES}, max_gib: 4}}", *settings]
        arguments = [part for override in overrides for part in ("--set", override)]
        resume = ["--resume", str(folder)] if (folder / "metrics.jsonl").is_file() else ["--config", CONFIG, *arguments]
        subprocess.run([sys.executable, "-m", "trainer", "train", *resume], check=True)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    flops = run_config(folder).train.batch_images * float(np.sum([step["flops_per_image"] for step in steps]))
    return {**json.loads((folder / "evaluation.json").read_text()), "flops": flops}


def accuracy(evaluation: dict[str, Any], condition: str, kind: str | None = None) -> float | None:
    """Exact match under a condition, of all kinds or one; None where the method lacks the condition."""
    usage = evaluation["usage"]
    conditions = usage["conditions"] if kind is None else usage["kinds"][kind]
    return conditions[condition]["accuracy"]["value"] if condition in conditions else None


def result(figure: str, seeds: Figure, n: int, bar: str = "–", met: bool | None = None) -> Result:
    """A mean over seeds with Student's interval."""
    unit = f"mean and 95 % interval over {seeds.n} seeds, {n} records each"
    return Result(figure, seeds.value, unit, bar, met, seeds.low, seeds.high, n, COMMAND)


def rows_of(method: str, evaluations: Sequence[dict[str, Any]]) -> list[Result]:
    """One method: accuracy by task and in all, the usage test, attention to latents, budget."""
    n = evaluations[0]["images"]
    rows = []
    for kind in sorted(evaluations[0]["usage"]["kinds"]):
        values = [accuracy(evaluation, "normal", kind) for evaluation in evaluations]
        rows.append(result(f"toy tasks, {method}: {kind}", over_seeds([v for v in values if v is not None]), n))
    for condition in USAGE:
        values = [accuracy(evaluation, condition) for evaluation in evaluations]
        if None not in values:
            label = "mean of tasks" if condition == "normal" else f"mean of tasks, {condition.replace('_', ' ')}"
            rows.append(result(f"toy tasks, {method}: {label}", over_seeds([v for v in values if v is not None]), n))
    shares = [e["usage"]["attention_to_latents"]["value"] for e in evaluations if "attention_to_latents" in e["usage"]]
    if shares:
        rows.append(result(f"toy tasks, {method}: attention of the answer to latents", over_seeds(shares), n))
    teraflops = [evaluation["flops"] / 1e12 for evaluation in evaluations]
    rows.append(result(f"toy tasks, {method}: decoder operations of training, 10¹²", over_seeds(teraflops), n))
    return rows


def cost(evaluation: dict[str, Any], condition: str) -> float:
    """Accuracy under `normal` minus that under a condition, both of one run."""
    of = evaluation["usage"]["conditions"]
    return float(of["normal"]["accuracy"]["value"] - of[condition]["accuracy"]["value"])


def cost_rows(
    ours: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]], condition: str, words: str
) -> list[Result]:
    """What a condition costs LIVR, what latents only, and the difference, paired by seed."""
    ours_lost, other_lost = ([cost(evaluation, condition) for evaluation in one] for one in (ours, other))
    more = [a - b for a, b in zip(ours_lost, other_lost, strict=True)]
    named = {"LIVR": ours_lost, "latents only": other_lost, "LIVR − latents only": more}
    n = ours[0]["images"]
    return [result(f"toy tasks, {name}: lost {words}", over_seeds(values), n) for name, values in named.items()]


def difference(label: str, ours: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> Result:
    """Accuracy of ours minus the other's, paired by seed."""
    pairs = [(accuracy(a, "normal"), accuracy(b, "normal")) for a, b in zip(ours, other, strict=True)]
    return result(label, over_seeds([a - b for a, b in pairs if a is not None and b is not None]), ours[0]["images"])


def main() -> None:
    """Run everything and record it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--train", type=int, default=4000, help="Records of each task.")
    parser.add_argument("--jobs", type=int, default=2, help="Runs at a time, a CPU core each.")
    parser.add_argument("--set", action="append", default=[], help="Override of the config, for trying it out.")
    options = parser.parse_args()
    make_data(options.tasks.split(","), options.train)
    todo = [(variant, seed) for variant in VARIANTS for seed in SEEDS]
    with ThreadPoolExecutor(options.jobs) as pool:
        done = dict(zip(todo, pool.map(lambda job: run(*job, options.set), todo), strict=True))
    runs_of = {variant: [done[variant, seed] for seed in SEEDS] for variant in VARIANTS}
    rows = [row for variant, evaluations in runs_of.items() for row in rows_of(variant, evaluations)]
    livr, alone = runs_of["LIVR"], runs_of["latents only"]
    rows += [difference(f"toy tasks, LIVR − {other}", livr, runs_of[other]) for other in METHODS if other != "LIVR"]
    longer = (runs_of[LONGER[method]] for method in ("LIVR", "SFT"))
    rows.append(difference("toy tasks, LIVR − SFT, twice the steps", *longer))
    rows += [row for condition, words in COSTS.items() for row in cost_rows(livr, alone, condition, words)]
    record(rows)


if __name__ == "__main__":
    main()
