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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anchor_service.pool import AnchorPool
from shared.config import Config, load_config
from shared.messages import Gradient, Question
from shared.run_folder import trained_generator
from shared.vlm import VisionLanguageModel, load_vlm
from tests.benchmarks.baseline_loop import question_loss
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


def toy_rows(config: Config, records: list[Record]) -> list[Result]:
    """A split read in packed rows, against the same questions one at a time; the same toy anchor, the same numbers.

    One question at a time: a plain loop, one question of one image in each forward pass, the whole prompt before it,
    logits everywhere (`baseline_loop`). Beside it what packing alone saves: the project's own reading with a call for
    each question, and with as many images a call as the packed side takes, but a row for each question.
    """
    # Latents stand at text positions, which a plain call of the model gives them.
    local = load_config(
        config.run.dir / "config.yaml",
        ["anchors.0.placement=local", "evaluation.unseen=[]", "pool.latent_positions=text"],
    )
    one_a_call = local.model_copy(update={"evaluation": local.evaluation.model_copy(update={"batch_images": 1})})
    generator = trained_generator(config)
    model = load_vlm(local.anchors[0].model).freeze()
    shown = records[:_READ_IMAGES]
    latents_BKD = torch.randn(len(shown), generator.n_latents, generator.model.width)
    single = [
        Record(record.record_id, record.source, record.images, (question,))
        for record in shown
        for question in record.questions
    ]
    repeated_NKD = latents_BKD.repeat_interleave(torch.tensor([len(r.questions) for r in shown]), dim=0)
    questions_N = [record.questions[0].message for record in single]
    with AnchorPool.start(local, generator.handshake(), anchors=local.anchors[:1]) as pool:
        packed, in_rows, in_calls = (
            Reader(pool, shown, local),
            Reader(pool, single, local),
            Reader(pool, single, one_a_call),
        )
        nll_N = packed.latents(latents_BKD)["A"].nll_N
        others = [plain_nll(model, repeated_NKD, questions_N), in_calls.latents(repeated_NKD)["A"].nll_N]
        seconds = interleaved(
            {
                "packed": lambda: packed.latents(latents_BKD),
                "in rows": lambda: in_rows.latents(repeated_NKD),
                "in calls": lambda: in_calls.latents(repeated_NKD),
                "alone": lambda: plain_nll(model, repeated_NKD, questions_N),
            },
            _REPETITIONS,
        )
    difference = max(float(abs(nll_N - other_N).max()) for other_N in others)
    return _reading_rows(
        "evaluation reading, packed against",
        seconds,
        {
            "alone": "one question at a time",
            "in calls": "a call for each question",
            "in rows": "a row for each question",
        },
        difference,
    )


def proportions_rows(root: Path) -> list[Result]:
    """The same at the proportions of the 7B, with ten questions an image, as many as CLEVR asks.

    Beside one question at a time: one question of each image of a batch at a time.
    """
    anchor = Bench(root, COMMAND, _REPETITIONS).anchor(PROPORTIONS_7B)
    request = replace(read_request(anchor, _CLEVR_QUESTIONS), gradient=Gradient.NONE)
    assert request.latents is not None
    latents_BKD = request.latents
    repeated_NKD = latents_BKD.repeat_interleave(_CLEVR_QUESTIONS, dim=0)
    questions_N = [question for row in request.questions for question in row]

    @torch.no_grad()
    def by_batch() -> np.ndarray:
        """(Q,) mean NLL over images of each question."""
        columns = zip(*request.questions, strict=True)
        return np.array([question_loss(anchor.model, latents_BKD, column).item() for column in columns])

    nll_BQ = np.array([[-np.mean(tokens) for tokens in row] for row in anchor.read(request).logprobs])
    alone_N = plain_nll(anchor.model, repeated_NKD, questions_N)
    difference = max(abs(nll_BQ.ravel() - alone_N).max(), abs(nll_BQ.mean(axis=0) - by_batch()).max())
    seconds = interleaved(
        {
            "packed": lambda: anchor.read(request),
            "by batch": by_batch,
            "alone": lambda: plain_nll(anchor.model, repeated_NKD, questions_N),
        },
        _REPETITIONS,
    )
    return _reading_rows(
        f"evaluation reading, 7B proportions, {_CLEVR_QUESTIONS} questions an image, packed against",
        seconds,
        {"alone": "one question at a time", "by batch": "a question of each image"},
        float(difference),
    )


@torch.no_grad()
def plain_nll(model: VisionLanguageModel, latents_NKD: Tensor, questions_N: Sequence[Question]) -> np.ndarray:
    """(N,) NLL of each question's answer as a plain evaluation loop finds it, one question in a forward pass."""
    losses = [
        question_loss(model, latents_KD.unsqueeze(0), [question]).item()
        for latents_KD, question in zip(latents_NKD, questions_N, strict=True)
    ]
    return np.array(losses)


def _reading_rows(
    name: str, seconds: Mapping[str, Sequence[float]], sides: Mapping[str, str], difference: float
) -> list[Result]:
    """How often each side takes the time of the packed one; the first side has the bar."""
    first = next(iter(sides))
    rows = [
        result(
            f"{name} {words}",
            ratios(seconds[side], seconds["packed"]),
            f"× faster; packed takes {1000 * statistics.median(seconds['packed']):.0f} ms",
            COMMAND,
            at_least=3.0 if side == first else None,
        )
        for side, words in sides.items()
    ]
    same = result(
        f"{name} {sides[first]}: largest difference of NLL",
        [difference],
        "nats, of any question and side",
        COMMAND,
        at_most=1e-4,
    )
    return [*rows, same]


def control_row(matched: Sequence[dict[str, Any]], shuffled: Sequence[dict[str, Any]]) -> Result:
    """What training on wrong images gains over no latents, against training on the right ones; anchor A.

    The design's bar is (floor − NLL of matched pairs)/(floor − NLL of shuffled pairs) ≥ 2. Here it stands upside
    down, because a control that gains nothing has no ratio: ½ at most, and below 0 where shuffled latents do harm.
    """
    gains = [[_gain_nats(evaluation) for evaluation in runs] for runs in (shuffled, matched)]
    shares = [wrong / right for wrong, right in zip(*gains, strict=True)]
    return Result(
        "shuffled pairs: gain in NLL over the floor, as a share of the gain of matched pairs",
        statistics.mean(shares),
        f"share; mean and range of {len(shares)} seeds",
        "≤ 0.5 in each seed",
        max(shares) <= 0.5,
        min(shares),
        max(shares),
        len(shares),
        COMMAND,
    )


def _gain_nats(evaluation: dict[str, Any]) -> float:
    """Floor − NLL of the latents."""
    floor = evaluation["causal"]["A"]["tests"]["markers_only"]
    return float(floor["delta_nll"]["value"])


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
        proportions = proportions_rows(Path(root))
    config = load_config(RUNS / f"matched-{seeds[0]}" / "config.yaml")
    record(
        [
            *verdict_rows("matched", "used", [evaluation for evaluation, _ in matched]),
            *verdict_rows("shuffled", "inert", shuffled),
            control_row([evaluation for evaluation, _ in matched], shuffled),
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
            *toy_rows(config, load_records(config.data, config.data.test_split)),
            *proportions,
        ]
    )


if __name__ == "__main__":
    main()
