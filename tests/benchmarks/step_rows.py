"""The whole training step of one process with two anchors, ours against the baseline loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from shared.vlm.generator import Generator
from tests.benchmarks.bench import N_IMAGES, N_LATENTS, N_QUESTIONS, Bench
from tests.benchmarks.models import ModelSize
from tests.benchmarks.results import Result
from tests.benchmarks.runs import make_records, open_baseline, open_trainer, run_config
from tests.benchmarks.switches import STEP_SWITCHES
from tests.benchmarks.timing import interleaved, ratios, result

IMAGE_PX = (448, 420)
"""240 image tokens, close to the 239 of the baseline's data."""
TINY_IMAGE_PX = (56, 56)


def step_rows(bench: Bench, label: str, size: ModelSize) -> list[Result]:
    """Steps with and without gradient checkpointing on either side, and ours without each optimisation.

    By default the loop checkpoints its generator, and the project does not.
    """
    records = make_records(bench.root / "step", 2 * N_IMAGES, TINY_IMAGE_PX if bench.tiny else IMAGE_PX, N_QUESTIONS)
    generator = {
        "model": str(bench.folder(size)),
        "latents": N_LATENTS,
        "dtype": bench.dtype,
        "device": bench.device,
    }
    anchors = [
        {**bench.anchor_fields("base", size), "placement": "shared_base"},
        {**bench.anchor_fields("other", size, seed=1), "placement": "local"},
    ]
    data = {"path": "unused", "questions_per_image": N_QUESTIONS}
    config = run_config(generator, anchors, train={"batch_images": N_IMAGES}, data=data)
    baseline = open_baseline(config, records)
    with open_trainer(config, records) as trainer:
        ours, loop = _numbered(trainer.step), _numbered(baseline.step)
        sides = {
            "ours": _with_checkpointing(trainer.generator, False, ours),
            "ours, checkpointing": _with_checkpointing(trainer.generator, True, ours),
            "loop": _with_checkpointing(baseline.generator, False, loop),
            "loop, checkpointing": _with_checkpointing(baseline.generator, True, loop),
        }
        sides |= {name: _with_switch(trainer.generator, name, sides["ours"]) for name in STEP_SWITCHES}
        seconds = interleaved(sides, bench.repetitions)
    rows = [
        result(
            f"training step against the baseline loop, R=2, {label}, {what}",
            ratios(seconds[theirs], seconds[mine]),
            "× faster",
            bench.command,
            at_least=bar,
        )
        for what, theirs, mine, bar in (
            ("checkpointing on both sides", "loop, checkpointing", "ours, checkpointing", 1.5),
            ("checkpointing on neither side", "loop", "ours", 1.5),
            ("each side by its defaults", "loop, checkpointing", "ours", 1.8),
        )
    ]
    rows += [
        result(
            f"training step without {name}, R=2, {label}",
            ratios(seconds[name], seconds["ours"]),
            "× the time with all",
            bench.command,
        )
        for name in STEP_SWITCHES
    ]
    return rows


def _numbered(step: Callable[[int], object]) -> Callable[[], object]:
    numbers = itertools.count()
    return lambda: step(next(numbers))


def _with_checkpointing(generator: Generator, on: bool, step: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        if on:
            generator.model.decoder.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            generator.model.decoder.gradient_checkpointing_disable()
        return step()

    return call


def _with_switch(generator: Generator, name: str, step: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        with STEP_SWITCHES[name](generator):
            return step()

    return call
