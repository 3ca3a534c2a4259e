"""What tests of the service share: a small run, its config, the service in this process."""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from starlette.types import ASGIApp

from anchor_service.serving.api import make_api
from anchor_service.serving.engine import Event, Job
from anchor_service.serving.joint import load_vocabulary
from anchor_service.serving.reader import AnchorReader
from anchor_service.serving.service import Service
from anchor_service.serving.writer import LatentWriter
from shared.config import parse_config, parse_section
from shared.messages import Question
from shared.run_folder import run_config
from shared.serve_config import ServeConfig
from tests.integration.helpers import REPOSITORY, TOY_SIZES, training_tree
from trainer.loop import train_run
from trainer.toy.dataset import ensure_toy_data

MODELS = REPOSITORY / "trainer/toy/models"
EXAMPLE = (REPOSITORY / "anchor_service/serving/example.png").read_bytes()
QUESTION = "what color is the triangle?"


def make_run(root: Path, positions: str = "grid") -> Path:
    """Two training steps with the shipped toy models: a run like `runs/demo`, less well trained."""
    ensure_toy_data(root / "data", TOY_SIZES, seed=3)
    sections = {"data": {"path": str(root / "data")}, "train": {"steps": 2}, "pool": {"latent_positions": positions}}
    train_run(parse_config(training_tree(MODELS, root / "run", **sections), "test"), resume=False)
    return root / "run"


def serve_tree(run: Path, **sections: Any) -> dict[str, Any]:
    """Arguments of the application: toy anchors A and B."""
    anchors = [{"name": name, "model": str(MODELS / name), "cpus": 0.25} for name in "AB"]
    return {"run": str(run), "anchors": anchors, "generator": {"cpus": 0.25}, **sections}


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def picture(seed: int) -> bytes:
    """A PNG that differs with its seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()


def chat(image: bytes = EXAMPLE, question: str = QUESTION, model: str = "A", **more: Any) -> dict[str, Any]:
    """A chat request's body."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}}, {"type": "text", "text": question}]
    return {"model": model, "messages": [{"role": "user", "content": parts}], **more}


class LocalAnchor:
    """An anchor of this process."""

    def __init__(self, reader: AnchorReader):
        self.reader = reader

    async def generate(self, job: Job, replayable: bool) -> AsyncIterator[list[Event]]:
        if replayable:
            yield await self.reader.answer(job)
            return
        async for events in self.reader.generate(job):
            yield events

    async def next_logprobs(self, image: str, latents: Any, question: str, answers: Any) -> np.ndarray:
        return await self.reader.next_logprobs(image, latents, question, answers)

    async def score(self, latents_KD: np.ndarray, questions: Sequence[Question]) -> list[list[float]]:
        return await self.reader.score(latents_KD, questions)

    async def state(self) -> dict[str, float]:
        return await self.reader.state()


def local_service(tree: dict[str, Any]) -> Service:
    """Everything but Ray."""
    config = parse_section(ServeConfig, tree, "test")
    run = run_config(config.run)
    anchors = {
        anchor.name: LocalAnchor(AnchorReader(anchor, run, config.engine, config.batch_requests, "cpu"))
        for anchor in config.anchors
    }
    writer = LatentWriter(run, "cpu", config.batch_requests, config.limits.image_pixels)
    vocabularies = {anchor.name: load_vocabulary(anchor.model) for anchor in config.anchors}
    return Service(config, (run.generator.latents, 64), writer, anchors, vocabularies, EXAMPLE)


def local_app(service: Service) -> ASGIApp:
    return make_api(service)
