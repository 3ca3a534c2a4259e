"""A benchmark read by anchors: each candidate answer is scored by its likelihood, from latents and from the image.

No decoding and no parsing: the candidate with the highest log-probability is the answer. Records that this cannot
answer (no candidates) are left out and counted.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from anchor_service.pool import AnchorPool
from shared.messages import Question, ReadReply, ReadRequest
from shared.vlm.generator import Generator
from trainer.data.images import load_image
from trainer.evaluation.benchmarks import likelihood_answer, load_benchmark, score
from trainer.evaluation.benchmarks.records import BenchmarkRecord
from trainer.evaluation.reading import batched, latents_of_images
from trainer.norm_calibration import NormCalibration


def read_benchmark(
    name: str,
    folder: Path,
    generator: Generator,
    pool: AnchorPool,
    batch_images: int,
    calibration: NormCalibration | None = None,
) -> dict[str, Any]:
    """Official figures by anchor and condition (`latents`, `ceiling`), with the records left out.

    Raises DataError where no record can be answered by likelihood.
    """
    records = load_benchmark(name, folder)
    usable = [record for record in records if record.candidates]
    predictions: dict[str, dict[str, dict[str, str]]] = {
        anchor: {"latents": {}, "ceiling": {}} for anchor in pool.names
    }
    for chunk in batched(usable, batch_images):
        rows = [[load_image(image) for image in record.images] for record in chunk]
        questions = [[Question(record.prompt, candidate) for candidate in record.candidates] for record in chunk]
        latents_BKD = latents_of_images(generator, rows, batch_images, calibration)
        request = ReadRequest(pool.new_request_id(), questions, latents_BKD)
        replies = {
            "latents": pool.read(dict.fromkeys(pool.names, request)),
            "ceiling": pool.read_images(
                [[_encoded(image) for image in images] for images in rows], questions, pool.names
            ),
        }
        for condition, by_anchor in replies.items():
            for anchor, reply in by_anchor.items():
                predictions[anchor][condition] |= _answers(chunk, reply)
    figures = {
        anchor: {condition: score(name, usable, answers) for condition, answers in by_condition.items()}
        for anchor, by_condition in predictions.items()
    }
    return {"left_out": len(records) - len(usable), "anchors": figures}


def _answers(records: Sequence[BenchmarkRecord], reply: ReadReply) -> dict[str, str]:
    """By record id, the candidate with the highest log-probability, its end of turn included."""
    return {
        record.record_id: likelihood_answer(record, [sum(tokens) for tokens in candidates])
        for record, candidates in zip(records, reply.logprobs, strict=True)
    }


def _encoded(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
