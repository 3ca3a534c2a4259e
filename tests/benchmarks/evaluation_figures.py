"""What the evaluation suite says of trained and of shuffled runs, what it costs, and what packed reading saves.

    make evaluation-figures

Uses the runs of `make seeds` in runs/figures, and makes those that are absent.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from anchor_service.pool import AnchorPool
from shared.config import Config, load_config
from shared.messages import Gradient
from shared.reading import nll_per_image
from shared.run_folder import trained_generator
from tests.benchmarks import baseline_loop
from tests.benchmarks.bench import Bench, read_request
from tests.benchmarks.demo_figures import RUNS, SEEDS, run
from tests.benchmarks.models import PROPORTIONS_7B
from tests.benchmarks.results import Result, record
from tests.benchmarks.timing import interleaved, ratios, result
from trainer.data import load_records
from trainer.data.records import Record
from trainer.evaluation.reading import Reader
from trainer.evaluation.statistics import over_seeds

COMMAND = "make evaluation-figures"
_PROJECTORS = ("least_squares on latents", "procrustes on latents", "procrustes on visual_tokens")
_READ_IMAGES, _REPETITIONS = 100, 5
_CLEVR_QUESTIONS = 10


def evaluate(folder: Path, *arguments: str) -> tuple[dict[str, Any], float]:
    """evaluation.json of a run after `evaluate`, and the seconds that the command took."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "trainer", "evaluate", str(folder), *arguments], check=True)
    return json.loads((folder / "evaluation.json").read_text()), time.perf_counter() - started


def verdict_rows(pairing: str, expected: str, evaluations: Sequence[dict[str, Any]]) -> list[Result]:
    """Share of runs whose anchor A has the expected verdict, and what a swap of images takes away."""
    verdicts = [evaluation["causal"]["A"]["verdict"] for evaluation in evaluations]
    lost = [evaluation["causal"]["A"]["lost_share"]["swap_images"]["value"] for evaluation in evaluations]
    right = [float(verdict == expected) for verdict in verdicts]
    unit = f"of {len(evaluations)} seeds"
    return [
        Result(
            f"{pairing} pairs: verdict `{expected}`",
            statistics.mean(right),
            f"share {unit}",
            "1 (each seed)",
            min(right) == 1.0,
            min(right),
            max(right),
            len(right),
            COMMAND,
        ),
        Result(
            f"{pairing} pairs: share of the recovered share that another image's latents cost",
            statistics.mean(lost),
            f"mean and range {unit}",
            "–",
            None,
            min(lost),
            max(lost),
            len(lost),
            COMMAND,
        ),
    ]


def transfer_rows(evaluations: Sequence[dict[str, Any]]) -> list[Result]:
    """Recovered share of D, another family and width, with Student's interval over seeds."""
    rows = []
    for projector in _PROJECTORS:
        shares = [evaluation["transfer"]["D"][projector]["recovered_share"]["value"] for evaluation in evaluations]
        # One seed has no interval; JSON knows no NaN.
        figure = over_seeds(shares).to_json()
        aimed = projector == _PROJECTORS[0]
        rows.append(
            Result(
                f"D (another family, width 80), projector {projector.replace('_', ' ')}: recovered share",
                figure["value"],
                f"share; mean and 95 % interval over {len(shares)} seeds",
                "≥ 0.5 in each seed (aim)" if aimed else "–",
                min(shares) >= 0.5 if aimed else None,
                figure["low"],
                figure["high"],
                len(shares),
                COMMAND,
            )
        )
    return rows


def packed_rows(config: Config, records: list[Record]) -> list[Result]:
    """All questions of an image in one row, against one question at a time, the same anchor and numbers.

    One at a time: a call for each question, as evaluation loops are mostly written. In rows: as many images a call as
    the packed side takes, but a row for each question, which is what packing itself saves.
    """
    local = load_config(config.run.dir / "config.yaml", ["anchors.0.placement=local", "evaluation.unseen=[]"])
    one_a_call = local.model_copy(update={"evaluation": local.evaluation.model_copy(update={"batch_images": 1})})
    generator = trained_generator(config)
    shown = records[:_READ_IMAGES]
    latents_BKD = torch.randn(len(shown), generator.n_latents, generator.model.width)
    single = [
        Record(record.record_id, record.source, record.images, (question,))
        for record in shown
        for question in record.questions
    ]
    repeated_BKD = latents_BKD.repeat_interleave(torch.tensor([len(r.questions) for r in shown]), dim=0)
    with AnchorPool.start(local, generator.handshake(), anchors=local.anchors[:1]) as pool:
        packed, in_rows, alone = (
            Reader(pool, shown, local),
            Reader(pool, single, local),
            Reader(pool, single, one_a_call),
        )
        nll_N, alone_nll_N = packed.latents(latents_BKD)["A"].nll_N, alone.latents(repeated_BKD)["A"].nll_N
        seconds = interleaved(
            {
                "packed": lambda: packed.latents(latents_BKD),
                "in rows": lambda: in_rows.latents(repeated_BKD),
                "alone": lambda: alone.latents(repeated_BKD),
            },
            _REPETITIONS,
        )
    difference = float(abs(nll_N - alone_nll_N).max())
    name = "evaluation reading, toy anchor, packed against"
    return [
        result(f"{name} one question at a time", ratios(seconds["alone"], seconds["packed"]), "× faster", COMMAND, 3.0),
        result(f"{name} a row for each question", ratios(seconds["in rows"], seconds["packed"]), "× faster", COMMAND),
        result(
            f"{name} one question at a time: largest difference of NLL", [difference], "nats", COMMAND, at_most=1e-3
        ),
    ]


def plain_rows(root: Path) -> list[Result]:
    """Packed reading against plain loops, which put the whole prompt through the model and make logits everywhere.

    One question at a time, and one question of each image of a batch at a time (`baseline_loop`). Ten questions an
    image, as many as CLEVR asks; a model of the proportions of the 7B.
    """
    anchor = Bench(root, COMMAND, _REPETITIONS).anchor(PROPORTIONS_7B)
    request = replace(read_request(anchor, _CLEVR_QUESTIONS), gradient=Gradient.NONE)
    assert request.latents is not None
    latents_BKD = request.latents

    @torch.no_grad()
    def by_batch() -> list[float]:
        return [
            baseline_loop.question_loss(anchor.model, latents_BKD, [row[j] for row in request.questions]).item()
            for j in range(_CLEVR_QUESTIONS)
        ]

    @torch.no_grad()
    def alone() -> list[float]:
        return [
            baseline_loop.question_loss(anchor.model, latents_KD.unsqueeze(0), [question]).item()
            for latents_KD, row in zip(latents_BKD, request.questions, strict=True)
            for question in row
        ]

    mean_nll = statistics.mean(nll_per_image(anchor.read(request).logprobs, True))
    difference = max(abs(statistics.mean(side()) - mean_nll) for side in (by_batch, alone))
    seconds = interleaved({"packed": lambda: anchor.read(request), "by batch": by_batch, "alone": alone}, _REPETITIONS)
    name = "evaluation reading, 7B proportions, 10 questions an image, packed against"
    return [
        result(f"{name} one question at a time", ratios(seconds["alone"], seconds["packed"]), "× faster", COMMAND, 3.0),
        result(f"{name} a question of each image", ratios(seconds["by batch"], seconds["packed"]), "× faster", COMMAND),
        result(f"{name} both: largest difference of the mean NLL", [difference], "nats", COMMAND, at_most=1e-4),
    ]


def main() -> None:
    """Evaluate the runs and record what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="Comma-separated seeds of make seeds.")
    seeds = [int(seed) for seed in parser.parse_args().seeds.split(",")]
    for seed in seeds:
        run(seed, "matched")
        run(seed, "shuffled")
    matched = [evaluate(RUNS / f"matched-{seed}", "--suite", "all", "--anchors", "A,B") for seed in seeds]
    shuffled = [evaluate(RUNS / f"shuffled-{seed}", "--suite", "causal", "--anchors", "A")[0] for seed in seeds]
    seconds = [duration for _, duration in matched]
    with tempfile.TemporaryDirectory() as root:
        plain = plain_rows(Path(root))
    config = load_config(RUNS / f"matched-{seeds[0]}" / "config.yaml")
    record(
        [
            *verdict_rows("matched", "used", [evaluation for evaluation, _ in matched]),
            *verdict_rows("shuffled", "inert", shuffled),
            *transfer_rows([evaluation for evaluation, _ in matched]),
            Result(
                "evaluate --suite all, 500 images, anchors A and B",
                statistics.mean(seconds),
                f"s; mean and range of {len(seconds)} seeds",
                "≤ 180 s",
                max(seconds) <= 180,
                min(seconds),
                max(seconds),
                len(seconds),
                COMMAND,
            ),
            *packed_rows(config, load_records(config.data, config.data.test_split)),
            *plain,
        ]
    )


if __name__ == "__main__":
    main()
