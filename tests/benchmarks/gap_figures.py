"""GAP on the toy task with auxiliary images: heads, calibration, token budgets, where latents are taught
(`make gap-figures`).

All variants have the same data, steps and order of images. Runs are kept in runs/gap and not repeated if they are
complete; one that was interrupted goes on from its checkpoint. Delete the folder to measure again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

from shared.config import load_config
from shared.vlm import load_vlm
from tests.benchmarks.results import Result, record
from trainer.data.jsonl import load_jsonl
from trainer.difficulty import load_difficulty
from trainer.evaluation.run import evaluate_run, run_config
from trainer.evaluation.statistics import Figure, over_seeds
from trainer.gap.norms import FINAL, INPUT, measure_norms
from trainer.loop import train_run
from trainer.methods import with_checked_method

SEEDS = (0, 1, 2)
COMMAND = "make gap-figures"
RUNS = Path("runs/gap")
DATA, PCA, LABELS, FEATURES = RUNS / "data", RUNS / "pca.safetensors", RUNS / "difficulty", RUNS / "features"
CONFIG = Path("deploy/configs/gap/toy.yaml")
MODEL = "trainer/toy/models/A"
N_NORMS = 64
HEADS = {"PCA head": "pca", "full-width head": "mlp"}
BUDGETS = (4, 9, 16)
EASY, HARD = "named_shape", "two_steps"
CONDITIONS = ("normal", "calibrated", "latents_removed", "other_images")
OWN_BUDGET = 9
"""Of the variants that differ in something else."""
VARIANTS: dict[str, list[str]] = {
    **{name: [f"options.head={kind}"] for name, kind in HEADS.items()},
    **{f"K = {k}": [f"generator.latents={k}"] for k in BUDGETS if k != OWN_BUDGET},
    "latents where the base fails": ["options.supervise=failed", f"options.difficulty={LABELS}"],
    "words instead of latents": ["options.supervise=nowhere"],
    "SFT": ["method=sft", "options={}"],
}


def make_data(n_train: int) -> None:
    """Data, the PCA of its images and difficulty labels of the training split, unless they are there."""
    source = ["--data", str(DATA), "--source", "jsonl"]
    commands = {
        DATA / "train.jsonl": [
            "toy",
            "tasks",
            "--data",
            str(DATA),
            "--tasks",
            f"{EASY},{HARD}",
            "--train",
            str(n_train),
        ],
        PCA: ["pca", "--model", MODEL, *source, "--images", "300", "--to", str(PCA)],
        LABELS / "labels.json": ["difficulty", "--model", MODEL, *source, "--split", "train", "--to", str(LABELS)],
    }
    for made, arguments in commands.items():
        if not made.is_file():
            subprocess.run([sys.executable, "-m", "trainer", *arguments], check=True)


def run(variant: str, seed: int, settings: Sequence[str]) -> dict[str, Any]:
    """evaluation.json of one run."""
    folder = RUNS / f"{variant.replace(' = ', '').replace(' ', '-').lower()}-{seed}"
    if not (folder / "evaluation.json").is_file():
        resume = (folder / "config.yaml").is_file()
        overrides = [f"run.dir={folder}", f"train.seed={seed}", f"data.path={DATA}", f"options.pca={PCA}"]
        overrides.append(f"data.feature_cache={{path: {FEATURES}, max_gib: 4}}")
        config = run_config(folder) if resume else load_config(CONFIG, [*overrides, *VARIANTS[variant], *settings])
        config = with_checked_method(config)
        train_run(config, resume)
        evaluate_run(config, Console(), ["usage"])
    result: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return result


def accuracies(evaluations: Sequence[dict[str, Any]], condition: str, kind: str) -> list[float] | None:
    """Exact match on a kind under a condition, per seed; None where the method lacks the condition."""
    found = [e["usage"]["kinds"][kind].get(condition) for e in evaluations]
    return None if None in found else [one["accuracy"]["value"] for one in found]


def result(figure: str, seeds: Figure, n: int, unit: str = "exact match") -> Result:
    """A mean over seeds with Student's interval."""
    words = f"{unit}; mean and 95 % interval over {seeds.n} seeds, {n} records each"
    return Result(figure, seeds.value, words, "–", None, seeds.low, seeds.high, n, COMMAND)


def norm_rows(evaluations: dict[str, list[dict[str, Any]]]) -> list[Result]:
    """Lengths of hidden states and of fed-back latents, in those of visual input embeddings."""
    states = measure_norms(load_vlm(MODEL).freeze(), load_jsonl(DATA, "test")[:N_NORMS])
    visual = states[INPUT]["image"]["mean"]
    rows = [
        Result(f"toy GAP, base model: norm of {what}", value, "× visual input", "–", None, None, None, N_NORMS, COMMAND)
        for what, value in {
            "text input embeddings": states[INPUT]["text"]["mean"] / visual,
            "final hidden states of text tokens": states[FINAL]["text"]["mean"] / visual,
            "final hidden states of image tokens": states[FINAL]["image"]["mean"] / visual,
        }.items()
    ]
    for name in HEADS:
        for condition in ("normal", "calibrated"):
            norms = [e["usage"]["norms"] for e in evaluations[name]]
            ratios = over_seeds([one[condition] / one["visual embeddings"] for one in norms])
            label = "as written" if condition == "normal" else condition
            n = evaluations[name][0]["images"]
            rows.append(result(f"toy GAP, {name}: norm of latents, {label}", ratios, n, "× visual input"))
    return rows


def accuracy_rows(evaluations: dict[str, list[dict[str, Any]]]) -> list[Result]:
    """Exact match of every variant on both kinds, and of the hard one under every condition."""
    rows = []
    for name, runs in evaluations.items():
        label = f"K = {OWN_BUDGET}, {name}" if name in HEADS else name
        for kind, condition in [(EASY, "normal"), *((HARD, one) for one in CONDITIONS)]:
            values = accuracies(runs, condition, kind)
            if values is not None:
                what = "" if condition == "normal" else f", {condition.replace('_', ' ')}"
                rows.append(result(f"toy GAP, {label}: {kind}{what}", over_seeds(values), runs[0]["images"] // 2))
    return rows


def difference(one: str, other: str, evaluations: dict[str, list[dict[str, Any]]], n: int) -> Result:
    """On the hard kind, paired by seed: same data, same order."""
    ours, theirs = (accuracies(evaluations[name], "normal", HARD) for name in (one, other))
    assert ours is not None and theirs is not None, "every method answers normally"  # noqa: PT018
    values = [a - b for a, b in zip(ours, theirs, strict=True)]
    return result(f"toy GAP, {one} − {other}: {HARD}", over_seeds(values), n)


def main() -> None:
    """Run everything and record it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=3000, help="Training records of each task.")
    parser.add_argument("--jobs", type=int, default=2, help="Runs at a time, a CPU core each.")
    parser.add_argument("--set", action="append", default=[], help="Override of the config, for trying it out.")
    options = parser.parse_args()
    make_data(options.train)
    todo = [(variant, seed) for seed in SEEDS for variant in VARIANTS]
    # Fresh processes: torch's threads do not survive a fork.
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run, *job, options.set) for job in todo]
        done = dict(zip(todo, [future.result() for future in futures], strict=True))
    by_variant = {variant: [done[variant, seed] for seed in SEEDS] for variant in VARIANTS}
    n = by_variant["PCA head"][0]["images"] // 2
    labels = load_difficulty(LABELS).values()
    failed = sum(label.right == 0 for label in labels) / len(labels)
    record(
        [
            *norm_rows(by_variant),
            *accuracy_rows(by_variant),
            *(
                difference("PCA head", other, by_variant, n)
                for other in ("full-width head", "latents where the base fails", "words instead of latents", "SFT")
            ),
            Result(
                "toy GAP, questions that the base model failed in 8 of 8 samples",
                failed,
                "share of training questions",
                "–",
                None,
                None,
                None,
                len(labels),
                COMMAND,
            ),
        ]
    )


if __name__ == "__main__":
    main()
