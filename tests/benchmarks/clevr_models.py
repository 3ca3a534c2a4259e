"""Trains the small VLMs of `make clevr-mini`: one learns to see, its two siblings go on from it to the questions.

Resumable: every hundred steps the state is written, and a step's batch depends on seed and step alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.reading import pack_questions, score_answers
from shared.vlm import VisionLanguageModel, load_vlm
from tests.benchmarks.clevr_lessons import IMAGE_PX, Lessons
from trainer.losses import lr_share
from trainer.toy.build import without_some_images
from trainer.toy.tiny_vlms import QwenSize, new_qwen, save_qwen, word_tokenizer

SIZE = QwenSize(width=64, layers=3, tower_layers=2, patch_px=10, image_px=IMAGE_PX, vocabulary=192)
_BATCH_IMAGES = 16
_WARMUP_STEPS = 100
_FINAL_LR_SHARE = 0.02
_STATE_EVERY = 100


@dataclass(frozen=True, slots=True)
class Course:
    """How one model is trained. parent: whose weights it goes on from, None for fresh ones.

    questions, places, captions: of each image at each step.
    """

    name: str
    parent: str | None
    seed: int
    steps: int
    lr: float
    questions: int
    places: int
    captions: int


COURSES = (
    Course("base", None, 1, 4000, 3e-3, questions=2, places=0, captions=1),
    Course("P", "base", 2, 1200, 2e-3, questions=6, places=1, captions=0),
    Course("Q", "base", 3, 1200, 2e-3, questions=6, places=1, captions=0),
)


def train_model(course: Course, lessons: Lessons, models: Path, progress: Callable[[int, float], None]) -> float:
    """Train one model into models/NAME, unless it is there; CPU seconds. progress: given every step and its loss."""
    state_file = models / f"{course.name}.state.pt"
    model = _initial(course, lessons, models)
    model.hf_model.requires_grad_(True)
    model.hf_model.train()
    optimizer = torch.optim.AdamW(model.hf_model.parameters(), lr=course.lr, betas=(0.9, 0.95), weight_decay=0.01)
    first, seconds = 0, 0.0
    if state_file.is_file():
        state: dict[str, Any] = torch.load(state_file, weights_only=True)
        model.hf_model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["next_step"], state["cpu_s"]
    started = time.process_time()
    for step in range(first, course.steps):
        for group in optimizer.param_groups:
            group["lr"] = course.lr * lr_share(step, course.steps, _WARMUP_STEPS, _FINAL_LR_SHARE)
        images, questions = lessons.batch(
            course.seed, step, _BATCH_IMAGES, course.questions, course.places, course.captions
        )
        tokens = model.image_tokens(images)
        media, media_ID = without_some_images(tokens, np.random.default_rng([course.seed, step]))
        loss = -score_answers(model, pack_questions(model, media, questions), media_ID).logprobs_N.mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.hf_model.parameters(), 1.0)
        optimizer.step()
        progress(step, loss.item())
        if (step + 1) % _STATE_EVERY == 0 or step + 1 == course.steps:
            state = {
                "model": model.hf_model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "next_step": step + 1,
                "cpu_s": seconds + time.process_time() - started,
            }
            torch.save(state, state_file.with_suffix(".partial"))
            state_file.with_suffix(".partial").replace(state_file)
    save_qwen(model.hf_model, models / course.name, word_tokenizer(lessons.words), IMAGE_PX)
    return seconds + time.process_time() - started


def _initial(course: Course, lessons: Lessons, models: Path) -> VisionLanguageModel:
    if course.parent is not None:
        return load_vlm(str(models / course.parent))
    tokenizer = word_tokenizer(lessons.words)
    folder = models / f".{course.name}.fresh"
    save_qwen(new_qwen(tokenizer, SIZE, course.seed), folder, tokenizer, IMAGE_PX)
    return load_vlm(str(folder))
