"""What a run folder holds, checked when read: evaluation.json, metrics, config. Absent suites stay empty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from shared.config import Config
from shared.errors import DataError
from shared.run_folder import run_config
from trainer.evaluation.run import EVALUATION_FILE
from trainer.metrics import read_metrics
from trainer.report.states import States

_MAX_BYTES = 1 << 28


class Part(BaseModel):
    """Base of all parts of evaluation.json; what a newer suite adds is passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Figure(Part):
    """A value with its 95 % interval over images; None where it is undefined. n counts questions."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None


Figures = dict[str, Figure]
Condition = Literal["latents", "ceiling"]
"""What a benchmark is read from."""


class Reading(Part):
    """Exact match and NLL of one anchor under each condition."""

    ceiling: Figure
    latents: Figure
    swapped: Figure
    floor: Figure
    recovered_share: Figure
    nll: Figures = {}
    first_token_nll: Figures = {}


class TransferReading(Reading):
    """A reader of another family, through one projector; outside_span: what of the latents its fit never saw."""

    outside_span: float


class AnchorReading(Reading):
    """The reading suite of one anchor."""

    seen_in_training: bool
    kinds: dict[str, Reading] = {}
    held_out_kinds: Reading | None = None


class Causal(Part):
    """Causal tests of one anchor and what follows from them. lost_share: of each test that the verdict rests on."""

    verdict: str
    lost_share: Figures
    tests: dict[str, Figures]


class Slots(Part):
    """What slots are worth to one anchor, in nats."""

    utility: Figure
    utility_alone: list[Figure]
    helpful_slots: int


class Probes(Part):
    """Accuracy of linear probes for the answer to one question."""

    question: str
    latents: Figure
    answer_state: Figure
    gap: Figure


class Geometry(Part):
    """How the latents lie. norms: minimum, quartiles and maximum, by name."""

    figures: Figures
    slot_cosine: list[list[float]]
    norms: dict[str, tuple[float, float, float, float, float]]
    slots: dict[str, Slots]
    probes: Probes | None


class Chance(Part):
    """What guesses score, laid out as `Scores.scores`."""

    scores: dict[str, Any]


class Scores(Part):
    """Official figures of one anchor under one condition; `headline` names the one that stands for the benchmark.

    A value of `scores` is a number, None, or again figures by name.
    """

    n: int
    headline: str
    scores: dict[str, Any]
    chance: Chance | None
    unparsed: list[Any]


class Benchmark(Part):
    """A public benchmark: by anchor, from the latents and from the image. left_out: records not to be answered so."""

    left_out: int
    anchors: dict[str, dict[Condition, Scores]]


class Usage(Part):
    """A model that answers by itself, by condition: in all, and by kind of question."""

    conditions: dict[str, Figures]
    kinds: dict[str, dict[str, Figures]]
    attention_to_latents: Figure | None = None


class Against(Part):
    """How alike the latents of another run are: linear CKA."""

    cka: float


class Failure(Part):
    """One question of the gallery with every anchor's answer."""

    record: str
    images: list[Path]
    question: str
    kind: str
    gold: str
    answers: dict[str, str]
    wrong: list[str]


class Evaluation(Part):
    """RUN/evaluation.json."""

    checkpoint: str
    step: int
    split: str
    images: int
    seed: int
    norm_calibration: dict[str, Any] | None = None
    anchors: dict[str, AnchorReading] = {}
    causal: dict[str, Causal] = {}
    controls: dict[str, dict[str, Figures]] = {}
    geometry: Geometry | None = None
    transfer: dict[str, dict[str, TransferReading]] = {}
    benchmarks: dict[str, Benchmark] = {}
    usage: Usage | None = None
    against: dict[str, Against] = {}
    gallery: list[Failure] = []


@dataclass(frozen=True, slots=True)
class RunResults:
    """One run of a report. label: its name on the page, unique within the report. states: None until measured."""

    label: str
    config: Config
    evaluation: Evaluation
    metrics: list[dict[str, Any]]
    states: States | None = None


def load_results(run_dirs: Sequence[Path]) -> list[RunResults]:
    """Everything about each run. Raises ConfigError or DataError naming file, field and remedy."""
    names = [run_dir.resolve().name for run_dir in run_dirs]
    labels = [name if names.count(name) == 1 else str(run_dir) for name, run_dir in zip(names, run_dirs, strict=True)]
    if len(set(labels)) < len(labels):
        raise DataError(f"{', '.join(labels)}: a run is given twice; give each run folder once")
    return [
        RunResults(label, run_config(run_dir), _evaluation(run_dir), read_metrics(run_dir))
        for label, run_dir in zip(labels, run_dirs, strict=True)
    ]


def _evaluation(run_dir: Path) -> Evaluation:
    path = run_dir / EVALUATION_FILE
    remedy = f"measure with: python -m trainer evaluate {run_dir}"
    if not path.is_file():
        raise DataError(f"{path}: absent; {remedy}")
    if path.stat().st_size > _MAX_BYTES:
        raise DataError(f"{path}: larger than {_MAX_BYTES >> 20} MiB, which no evaluation writes; {remedy}")
    try:
        return Evaluation.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"{path}: {field}: {first['msg']}; {remedy}") from error
