"""Training set-ups for benchmarks: records with pictures on disk, configs, trainers of both sides."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anchor_service.frozen_anchor import load_frozen_anchor
from anchor_service.pool import AnchorPool
from shared.config import Config, parse_config
from shared.vlm.generator import Generator
from tests.benchmarks.baseline_loop import BaselineTrainer
from tests.benchmarks.models import QUESTION_TOKENS, make_questions
from trainer.data.records import ImageFile, KindQuestion, Record
from trainer.data.sampling import Sampler
from trainer.loop import Trainer

_STEPS = 10_000
"""More than a benchmark takes, so that the next batch is always prepared, as in the middle of a run."""


def make_records(
    folder: Path, n_images: int, image_px: tuple[int, int], n_questions: int, question_tokens: int = QUESTION_TOKENS
) -> list[Record]:
    """Noisy pictures of (width, height) pixels with questions of exact length."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    width, height = image_px
    records = []
    for i, questions in enumerate(make_questions(n_images, n_questions, question_tokens)):
        path = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
        asked = tuple(KindQuestion("any", question.text, question.answer) for question in questions)
        records.append(Record(str(i), "benchmark", (ImageFile(path),), asked))
    return records


def run_config(generator: dict[str, Any], anchors: Sequence[dict[str, Any]], **sections: Any) -> Config:
    """A config of a run that is never written anywhere; `sections` are merged over it."""
    tree: dict[str, Any] = {
        "run": {"dir": "unused"},
        "data": {"path": "unused"},
        "generator": {"latents": 16, "device": "cpu", "calibrate_norm": False, **generator},
        "anchors": list(anchors),
        "pool": {},
        "train": {},
    }
    tree["train"] = {"steps": _STEPS, **sections.pop("train", {})}
    return parse_config({**tree, **sections}, "benchmark")


@contextlib.contextmanager
def open_trainer(config: Config, records: Sequence[Record]) -> Iterator[Trainer]:
    """The project's trainer with its anchors, as `train_run` puts them together."""
    generator = Generator(config.generator, config.train.seed)
    generator.train()
    probe = records[0].image_bytes()
    shared_base = (generator.model, generator.adapter_off)
    with (
        AnchorPool.start(config, generator.handshake(), shared_base, probe_images=probe) as pool,
        contextlib.closing(Trainer(config, generator, pool, sampler_of(config, records))) as trainer,
    ):
        yield trainer


def open_baseline(config: Config, records: Sequence[Record]) -> BaselineTrainer:
    """The baseline loop with the same generator and the config's anchor of placement local."""
    (anchor,) = (anchor for anchor in config.anchors if anchor.placement == "local")
    generator = Generator(config.generator, config.train.seed)
    generator.train()
    device = "cuda" if anchor.gpus > 0 else "cpu"
    frozen = load_frozen_anchor(anchor, config.generator.latents, config.pool.latent_positions, device)
    return BaselineTrainer(generator, frozen.model, sampler_of(config, records), config.train.steps)


def sampler_of(config: Config, records: Sequence[Record]) -> Sampler:
    """What a step of the config sees."""
    return Sampler(records, config.train.batch_images, config.data.questions_per_image, config.train.seed)
