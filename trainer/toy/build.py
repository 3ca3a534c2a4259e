"""Trains the tiny VLMs of the toy world and writes them as Hugging Face folders with a model card.

    python -m trainer toy build --models A,B,C,D

A starts from nothing; B and C go on from A with other data orders; D (another family, another width) starts
from nothing. Every image is read with its questions, one full-caption branch, and now and then without the
image, so that a model asked without an image answers from its prior instead of at random.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from torch import Tensor

from shared.errors import ConfigError
from shared.messages import Question
from shared.packing import Media
from shared.reading import pack_questions, score_answers
from shared.vlm import ImageTokens, VisionLanguageModel, load_vlm
from trainer.data.clevr import load_clevr
from trainer.data.fields import FileOptions
from trainer.data.records import Record
from trainer.losses import lr_share
from trainer.toy.dataset import ensure_toy_data
from trainer.toy.tiny_vlms import new_model, save_folder
from trainer.toy.world import GRID

PRETRAINING_SIZES = {"train": 10_000, "test": 500}
PRETRAINING_SEED = 7
PRETRAINING_QUESTIONS_PER_KIND = 4
CAPTION_QUESTION = "what is where?"
_NO_IMAGE_SHARE = 0.08
_BATCH_IMAGES = 64
_QUESTIONS_PER_IMAGE = 7
_WARMUP_STEPS = 100
_CLIP_NORM = 1.0
_FINAL_LR_SHARE = 0.02
_PIXEL_CHUNK = 256
_PLAIN_EVERY_STEPS = 100


@dataclass(frozen=True, slots=True)
class Stage:
    """One learning-rate cycle. hard_questions: how many of an image's questions are of HARD_KINDS."""

    steps: int
    lr: float
    hard_questions: int = 0


@dataclass(frozen=True, slots=True)
class ToyModel:
    """How one tiny VLM is made. parent: the model it goes on from, None for a fresh one."""

    name: str
    family: str
    parent: str | None
    seed: int
    stages: tuple[Stage, ...]


HARD_KINDS = ("relate", "count_complex")
_LEARN_TO_SEE, _LEARN_TO_RELATE = Stage(2400, 3e-3), Stage(1600, 2e-3, hard_questions=5)
TOY_MODELS = (
    ToyModel("A", "qwen2_5_vl", None, 1, (_LEARN_TO_SEE, _LEARN_TO_RELATE)),
    ToyModel("B", "qwen2_5_vl", "A", 2, (Stage(600, 1.5e-3, hard_questions=3),)),
    ToyModel("C", "qwen2_5_vl", "A", 3, (Stage(600, 1.5e-3, hard_questions=3),)),
    ToyModel("D", "llava", None, 4, (Stage(2200, 3e-3), _LEARN_TO_RELATE)),
)


class PixelStore:
    """Image processor outputs of many records, made once and cut into batches."""

    def __init__(self, model: VisionLanguageModel, records: Sequence[Record]):
        self._image_inputs = model.family.image_inputs
        parts: dict[str, list[Tensor]] = {name: [] for name in self._image_inputs}
        for start in range(0, len(records), _PIXEL_CHUNK):
            images = [image for record in records[start : start + _PIXEL_CHUNK] for image in record.load_images()]
            inputs = model.image_inputs(images)
            for name in self._image_inputs:
                # Qwen lays the patches of all images out in one dimension; here all images have as many.
                parts[name].append(inputs[name].reshape(len(images), -1, *inputs[name].shape[1:]))
        self._stacked = {name: torch.cat(values) for name, values in parts.items()}

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Inputs of `image_tokens_from` for these records."""
        return {name: values[indices].flatten(0, 1) for name, values in self._stacked.items()}


def caption(record: Record) -> Question:
    """The whole grid in reading order, as one question."""
    cells = {tuple(o["cell"]): f"{o['color']} {o['shape']}" for o in record.scene["objects"]}
    words = [cells.get((row, column), "nothing") for row in range(GRID) for column in range(GRID)]
    return Question(CAPTION_QUESTION, ", ".join(words))


def batches(
    records: Sequence[Record], seed: int, hard_questions: int
) -> Iterator[tuple[np.ndarray, list[list[Question]]]]:
    """Endless shuffled batches: record indices, and for each its caption and a few of its questions.

    hard_questions: so many of them are of HARD_KINDS, the kinds that take several steps of reasoning.
    """
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(records))
        for start in range(0, len(order) - _BATCH_IMAGES + 1, _BATCH_IMAGES):
            indices = order[start : start + _BATCH_IMAGES]
            questions = []
            for index in indices:
                asked = [records[index].questions[i] for i in rng.permutation(len(records[index].questions))]
                hard = [q for q in asked if q.kind in HARD_KINDS][:hard_questions]
                others = [q for q in asked if q not in hard][: _QUESTIONS_PER_IMAGE - len(hard)]
                questions.append([caption(records[index]), *(q.message for q in (*hard, *others))])
            yield indices, questions


def without_some_images(tokens: ImageTokens, rng: np.random.Generator) -> tuple[list[list[Media]], Tensor]:
    """Media with a share of the images left out, and the embeddings of the others."""
    kept = rng.random(len(tokens.tokens)) >= _NO_IMAGE_SHARE
    media = [row if keep else [] for row, keep in zip(tokens.media, kept, strict=True)]
    shown = [token for token, keep in zip(tokens.tokens, kept, strict=True) if keep]
    return media, torch.cat(shown)


def fit(
    model: VisionLanguageModel,
    records: Sequence[Record],
    stage: Stage,
    seed: int,
    progress: Callable[[float], None] | None = None,
) -> list[float]:
    """Train all weights by answer likelihood; returns the loss of every step (nats per answer token).

    `progress` is called with the loss after every step.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pixels = PixelStore(model, records)
    model.hf_model.requires_grad_(True)
    model.hf_model.train()
    optimizer = torch.optim.AdamW(model.hf_model.parameters(), lr=stage.lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_share(step, stage.steps, _WARMUP_STEPS, _FINAL_LR_SHARE)
    )
    losses = []
    for indices, questions in itertools.islice(batches(records, seed, stage.hard_questions), stage.steps):
        tokens = model.image_tokens_from(pixels.batch(indices))
        media, media_ID = without_some_images(tokens, rng)
        scores = score_answers(model, pack_questions(model, media, questions), media_ID)
        loss = -scores.logprobs_N.mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.hf_model.parameters(), _CLIP_NORM)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if progress is not None:
            progress(losses[-1])
    model.freeze()
    return losses


@torch.no_grad()
def accuracy(model: VisionLanguageModel, records: Sequence[Record], with_image: bool = True) -> dict[str, float]:
    """Exact match per question kind and in all, with the real image or without any."""
    hits: dict[str, list[bool]] = {}
    pixels = PixelStore(model, records) if with_image else None
    for start in range(0, len(records), _BATCH_IMAGES):
        chunk = records[start : start + _BATCH_IMAGES]
        questions = [[q.message for q in record.questions] for record in chunk]
        media: list[list[Media]] = [[]] * len(chunk)
        media_ID = None
        if pixels is not None:
            tokens = model.image_tokens_from(pixels.batch(np.arange(start, start + len(chunk))))
            media, media_ID = tokens.media, torch.cat(tokens.tokens)
        scores = score_answers(model, pack_questions(model, media, questions), media_ID)
        token_hits = iter(scores.matches_N.tolist())
        for record, row in zip(chunk, scores.counts, strict=True):
            for question, n in zip(record.questions, row, strict=True):
                hits.setdefault(question.kind, []).append(all(list(itertools.islice(token_hits, n))))  # takes all n
    result = {kind: float(np.mean(values)) for kind, values in sorted(hits.items())}
    result["all"] = float(np.mean([hit for values in hits.values() for hit in values]))
    return result


def build_models(names: Sequence[str], to: Path, steps: int | None, console: Console) -> dict[str, dict[str, float]]:
    """Train the named models in the order of TOY_MODELS and write their folders with model cards.

    Their images come from a data set of its own, kept in a temporary folder. Returns accuracies by model.
    """
    specs = [spec for spec in TOY_MODELS if spec.name in names]
    if unknown := set(names) - {spec.name for spec in TOY_MODELS}:
        raise ConfigError(f"--models: no toy model {sorted(unknown)[0]!r}; there are A, B, C, D")
    results = {}
    with tempfile.TemporaryDirectory() as folder, Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("pre-training images", total=None)
        ensure_toy_data(
            Path(folder) / "data",
            PRETRAINING_SIZES,
            PRETRAINING_SEED,
            PRETRAINING_QUESTIONS_PER_KIND,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
        records = list(load_clevr(Path(folder) / "data", "train", options=FileOptions(check_images=False)))
        unseen = list(load_clevr(Path(folder) / "data", "test", options=FileOptions(check_images=False)))
        for spec in specs:
            stages = [replace(s, steps=min(s.steps, steps or s.steps)) for s in spec.stages]
            task = bar.add_task(f"model {spec.name}", total=sum(s.steps for s in stages))
            started = time.perf_counter()
            model = _initial_model(spec, to)
            losses = [
                fit(model, records, s, spec.seed + i, partial(_show_step, bar, task)) for i, s in enumerate(stages)
            ]
            with_image, without_image = accuracy(model, unseen), accuracy(model, unseen, with_image=False)
            save_folder(model.hf_model, to / spec.name)
            minutes = (time.perf_counter() - started) / 60
            card = model_card(spec, stages, losses[-1][-1], minutes, with_image, without_image)
            (to / spec.name / "README.md").write_text(card, encoding="utf-8")
            console.print(f"{spec.name}: exact match {with_image['all']:.4f}, without image {without_image['all']:.4f}")
            results[spec.name] = with_image
    return results


def _show_step(bar: Progress, task: TaskID, loss: float) -> None:
    """A bar in a terminal; a line now and then where output goes to a file."""
    bar.advance(task)
    state = bar.tasks[task]
    if bar.disable and state.completed % _PLAIN_EVERY_STEPS == 0:
        bar.console.print(f"{state.description}: step {state.completed:g}/{state.total:g}, loss {loss:.4f}")


def _initial_model(spec: ToyModel, to: Path) -> VisionLanguageModel:
    """The parent's folder, or fresh weights by way of a folder, so that both are loaded the same way."""
    if spec.parent is not None:
        return load_vlm(str(to / spec.parent))
    with tempfile.TemporaryDirectory() as folder:
        save_folder(new_model(spec.family, spec.seed), Path(folder))
        return load_vlm(folder)


def model_card(
    spec: ToyModel,
    stages: Sequence[Stage],
    loss: float,
    minutes: float,
    with_image: dict[str, float],
    without_image: dict[str, float],
) -> str:
    """The README.md of a toy model's folder."""
    rows = "\n".join(f"| {kind} | {with_image[kind]:.4f} | {without_image[kind]:.4f} |" for kind in with_image)
    start = f"from toy model {spec.parent}" if spec.parent else "from fan-in scaled random weights"
    steps = ", then ".join(
        f"{s.steps} steps at a peak learning rate of {s.lr:g}"
        + (f" with {s.hard_questions} of {_QUESTIONS_PER_IMAGE} questions hard" if s.hard_questions else "")
        for s in stages
    )
    return f"""---
license: apache-2.0
tags: [visual-latents, toy]
---
# Toy model {spec.name}

A tiny `{spec.family}` model that answers questions about the toy world. Trained {start}, seed {spec.seed}:
{steps}; {_BATCH_IMAGES} images a step, {minutes:.0f} minutes on 2 CPU cores, last loss {loss:.4f} nats per token.

    python -m trainer toy build --models {spec.name}

| kind | exact match, {PRETRAINING_SIZES["test"]} unseen scenes | the same without the image |
|---|---|---|
{rows}
"""
