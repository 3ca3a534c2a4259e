"""Trains the tiny VLMs of the toy world and writes them as Hugging Face folders with a model card.

    python -m trainer toy build --models A,B,C,D,E

A starts from nothing; B and C go on from A with other data orders; D (another family, another width) starts
from nothing; E goes on from A to several images a prompt, the base of the toy tasks. Every image is read with its
questions, scenes of A to D also with one full-caption branch, and now and then without the image, so that a model
asked without an image answers from its prior instead of at random.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

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
from trainer.toy.perception import MemoryImage, perception_records
from trainer.toy.tiny_vlms import TASK_WORDS, new_model, save_folder
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
_PERCEPTION_SEEDS = {"train": 17, "test": 18}
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
    """How one tiny VLM is made.

    parent: the model it goes on from, None for a fresh one. sees: what it learns from, scenes with one image each or
    several pictures at once. more_words: what it reads and says beyond the words of scenes.
    """

    name: str
    family: str
    parent: str | None
    seed: int
    stages: tuple[Stage, ...]
    sees: Literal["scenes", "perception"] = "scenes"
    more_words: tuple[str, ...] = ()


HARD_KINDS = ("relate", "count_complex", "alike", "differ", "label", "match", "same")
_LEARN_TO_SEE, _LEARN_TO_RELATE = Stage(2400, 3e-3), Stage(1600, 2e-3, hard_questions=5)
_LEARN_SEVERAL_IMAGES = (
    Stage(900, 3e-3, hard_questions=3),
    Stage(1100, 3e-3, hard_questions=6),
    Stage(900, 3e-3, hard_questions=6),
    Stage(700, 3e-3, hard_questions=6),
)
TOY_MODELS = (
    ToyModel("A", "qwen2_5_vl", None, 1, (_LEARN_TO_SEE, _LEARN_TO_RELATE)),
    ToyModel("B", "qwen2_5_vl", "A", 2, (Stage(600, 1.5e-3, hard_questions=3),)),
    ToyModel("C", "qwen2_5_vl", "A", 3, (Stage(600, 1.5e-3, hard_questions=3),)),
    ToyModel("D", "llava", None, 4, (Stage(2200, 3e-3), _LEARN_TO_RELATE)),
    ToyModel("E", "qwen2_5_vl", "A", 5, _LEARN_SEVERAL_IMAGES, "perception", TASK_WORDS),
)


class PixelStore:
    """Image processor outputs of many records, made once and cut into batches."""

    def __init__(self, model: VisionLanguageModel, records: Sequence[Record]):
        self._image_inputs = model.family.image_inputs
        self._per_record = np.array([len(record.images) for record in records])
        self._starts = np.cumsum(self._per_record) - self._per_record
        parts: dict[str, list[Tensor]] = {name: [] for name in self._image_inputs}
        for start in range(0, len(records), _PIXEL_CHUNK):
            images = [image for record in records[start : start + _PIXEL_CHUNK] for image in record.load_images()]
            inputs = model.image_inputs(images)
            for name in self._image_inputs:
                # Qwen lays the patches of all images out in one dimension; here all images have as many.
                parts[name].append(inputs[name].reshape(len(images), -1, *inputs[name].shape[1:]))
        self._stacked = {name: torch.cat(values) for name, values in parts.items()}

    def tokens(self, model: VisionLanguageModel, indices: np.ndarray) -> ImageTokens:
        """Image tokens of these records, a row each."""
        n_images = self._per_record[indices]
        of_record = [np.arange(start, start + n) for start, n in zip(self._starts[indices], n_images, strict=True)]
        images = np.concatenate(of_record)
        inputs = {name: values[images].flatten(0, 1) for name, values in self._stacked.items()}
        return model.image_tokens_from(inputs).in_rows(n_images.tolist())


def caption(record: Record) -> Question:
    """The whole grid in reading order, as one question."""
    cells = {tuple(o["cell"]): f"{o['color']} {o['shape']}" for o in record.scene["objects"]}
    words = [cells.get((row, column), "nothing") for row in range(GRID) for column in range(GRID)]
    return Question(CAPTION_QUESTION, ", ".join(words))


def batches(
    records: Sequence[Record], seed: int, hard_questions: int
) -> Iterator[tuple[np.ndarray, list[list[Question]]]]:
    """Endless shuffled batches: record indices, and for each its caption, if it has a scene, and a few questions.

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
                captions = [caption(records[index])] if records[index].scene else []
                questions.append([*captions, *(q.message for q in (*hard, *others))])
            yield indices, questions


def without_some_images(tokens: ImageTokens, rng: np.random.Generator) -> tuple[list[list[Media]], Tensor]:
    """Media with a share of the rows left without images, and the embeddings of the others."""
    kept = rng.random(len(tokens.rows)) >= _NO_IMAGE_SHARE
    media = [row if keep else [] for row, keep in zip(tokens.media, kept, strict=True)]
    shown = [token for row, keep in zip(tokens.rows, kept, strict=True) if keep for token in tokens.tokens[row]]
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
        tokens = pixels.tokens(model, indices)
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
            tokens = pixels.tokens(model, np.arange(start, start + len(chunk)))
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

    Their images are apart from every split of the toy data set. Returns accuracies by model.
    """
    specs = [spec for spec in TOY_MODELS if spec.name in names]
    if unknown := set(names) - {spec.name for spec in TOY_MODELS}:
        known = ", ".join(spec.name for spec in TOY_MODELS)
        raise ConfigError(f"--models: no toy model {sorted(unknown)[0]!r}; there are {known}")
    results = {}
    with Progress(console=console, disable=not console.is_terminal) as bar:
        data: dict[str, tuple[list[Record], list[Record]]] = {}
        for spec in specs:
            if spec.sees not in data:
                data[spec.sees] = _PRETRAINING_DATA[spec.sees](bar)
            records, unseen = data[spec.sees]
            stages = [replace(s, steps=min(s.steps, steps or s.steps)) for s in spec.stages]
            task = bar.add_task(f"model {spec.name}", total=sum(s.steps for s in stages))
            started = time.perf_counter()
            model = _initial_model(spec, to)
            losses = [
                fit(model, records, s, spec.seed + i, partial(_show_step, bar, task)) for i, s in enumerate(stages)
            ]
            with_image, without_image = accuracy(model, unseen), accuracy(model, unseen, with_image=False)
            save_folder(model.hf_model, to / spec.name, spec.more_words)
            minutes = (time.perf_counter() - started) / 60
            card = model_card(spec, stages, losses[-1][-1], minutes, with_image, without_image)
            (to / spec.name / "README.md").write_text(card, encoding="utf-8")
            console.print(f"{spec.name}: exact match {with_image['all']:.4f}, without image {without_image['all']:.4f}")
            results[spec.name] = with_image
    return results


def _scenes(bar: Progress) -> tuple[list[Record], list[Record]]:
    """Training and unseen scenes, read into memory."""
    task = bar.add_task("pre-training images", total=None)
    with tempfile.TemporaryDirectory() as folder:
        ensure_toy_data(
            Path(folder) / "data",
            PRETRAINING_SIZES,
            PRETRAINING_SEED,
            PRETRAINING_QUESTIONS_PER_KIND,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
        records, unseen = (
            [
                _in_memory(record)
                for record in load_clevr(Path(folder) / "data", split, options=FileOptions(check_images=False))
            ]
            for split in PRETRAINING_SIZES
        )
    return records, unseen


def _in_memory(record: Record) -> Record:
    return replace(record, images=tuple(MemoryImage(data) for data in record.image_bytes()))


def _perception(bar: Progress) -> tuple[list[Record], list[Record]]:
    """Training and unseen records of several pictures."""
    task = bar.add_task("pre-training images", total=sum(PRETRAINING_SIZES.values()))
    records, unseen = (
        perception_records(n, _PERCEPTION_SEEDS[split], lambda: bar.advance(task))
        for split, n in PRETRAINING_SIZES.items()
    )
    return records, unseen


_PRETRAINING_DATA = {"scenes": _scenes, "perception": _perception}


def _show_step(bar: Progress, task: TaskID, loss: float) -> None:
    """A bar in a terminal; a line now and then where output goes to a file."""
    bar.advance(task)
    state = bar.tasks[task]
    if bar.disable and state.completed % _PLAIN_EVERY_STEPS == 0:
        bar.console.print(f"{state.description}: step {state.completed:g}/{state.total:g}, loss {loss:.4f}")


def _initial_model(spec: ToyModel, to: Path) -> VisionLanguageModel:
    """The parent's weights or fresh ones, by way of a folder with this model's words."""
    parent = None if spec.parent is None else load_vlm(str(to / spec.parent)).hf_model
    with tempfile.TemporaryDirectory() as folder:
        save_folder(parent or new_model(spec.family, spec.seed), Path(folder), spec.more_words)
        return load_vlm(folder)


_WORDS_ABOUT = {
    "scenes": ("the toy world", "scenes"),
    "perception": ("one to three pictures of the toy world at once", "records of one to three pictures"),
}
"""For model cards: what a model answers questions about, and what it was measured on."""


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
    about, unseen = _WORDS_ABOUT[spec.sees]
    return f"""---
license: apache-2.0
tags: [visual-latents, toy]
---
# Toy model {spec.name}

A tiny `{spec.family}` model that answers questions about {about}. Trained {start}, seed {spec.seed}:
{steps}; {_BATCH_IMAGES} images a step, {minutes:.0f} minutes on 2 CPU cores, last loss {loss:.4f} nats per token.

    python -m trainer toy build --models {spec.name}

| kind | exact match, {PRETRAINING_SIZES["test"]} unseen {unseen} | the same without the image |
|---|---|---|
{rows}
"""
