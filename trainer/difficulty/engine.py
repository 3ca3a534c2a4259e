"""Sampled answers of a base model, with transformers: every image is read once, every question once behind it.

An engine is any function from records to label lines, so another one (`trainer/difficulty/vllm_engine.py`, an API)
needs no change elsewhere.
What is sampled depends on seed, record, question and number of the sample, not on what shares the batch: only
rounding does, and it decides where a random number meets a probability in its last digits.

Legend: B rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from pydantic import Field

from shared.config import Dtype, Section
from shared.errors import DataError
from shared.packing import Branch
from shared.vlm import GrowingRows, VisionLanguageModel, load_vlm
from trainer.data.records import KindQuestion, Record
from trainer.gap.generation import Sampler, generate

Engine = Callable[[Sequence[Record]], list[dict[str, Any]]]
"""Records to label lines; a record whose image cannot be read becomes {record, error}."""
Shown = tuple[Record, list[Image.Image]]
"""A record with its images."""


class SamplingConfig(Section):
    """How answers are sampled."""

    samples: int = Field(8, ge=1, le=1024, description="Answers per question.")
    temperature: float = Field(1.0, gt=0, le=100, description="The method's source gives none.")
    max_tokens: int = Field(32, ge=1, le=8192, description="Longer answers count as wrong.")
    seed: int = 0
    rows: int = Field(64, ge=1, description="Answers sampled at a time; bounds the memory of keys and values.")


def transformers_engine(path: str, dtype: Dtype, device: str, sampling: SamplingConfig) -> Engine:
    """An engine with a model of its own. Raises ModelError."""
    model = load_vlm(path, dtype, device).freeze()
    return lambda records: sample_answers(model, records, sampling)


@torch.no_grad()
def sample_answers(
    model: VisionLanguageModel, records: Sequence[Record], sampling: SamplingConfig
) -> list[dict[str, Any]]:
    """Label lines of records: how many samples are exactly right, and what they were."""
    shown, lines = load_shown(records)
    n_questions = max(1, sampling.rows // sampling.samples)
    for group in _groups(shown, n_questions):
        tokens = model.image_tokens([image for _, images in group for image in images])
        read = GrowingRows.after_images(model, tokens.in_rows([len(images) for _, images in group]))
        asked = [(row, record, question) for row, (record, _) in enumerate(group) for question in distinct(record)]
        for start in range(0, len(asked), n_questions):
            lines += _answered(model, read, asked[start : start + n_questions], sampling)
    return lines


def _answered(
    model: VisionLanguageModel,
    images: GrowingRows,
    asked: Sequence[tuple[int, Record, KindQuestion]],
    sampling: SamplingConfig,
) -> list[dict[str, Any]]:
    """Label lines of some questions, each with the row of its image."""
    branches = [branch for (branch,) in model.prompt.branches([[question.message] for _, _, question in asked])]
    questions = images.select([row for row, _, _ in asked])
    questions.append_tokens([branch.token_ids[: branch.answer_start] for branch in branches])
    samples = questions.select([q for q in range(len(asked)) for _ in range(sampling.samples)])
    seeds = [
        sample_seed(sampling.seed, record.record_id, question.text, n)
        for _, record, question in asked
        for n in range(sampling.samples)
    ]
    end_ids = {branch.token_ids[-1] for branch in branches}
    # One token more than an answer may have: the end of turn.
    limit = sampling.max_tokens + 1
    written = generate(samples, sorted(end_ids), limit, Sampler(seeds, sampling.temperature, limit))
    lines = []
    for i, ((_, record, question), branch) in enumerate(zip(asked, branches, strict=True)):
        own = written[i * sampling.samples : (i + 1) * sampling.samples]
        sampled = [([int(piece) for piece in one.pieces], one.ended) for one in own]
        lines.append(label_line(model.processor.tokenizer, record, question, branch, sampled))
    return lines


def label_line(
    tokenizer: Any, record: Record, question: KindQuestion, branch: Branch, sampled: Sequence[tuple[list[int], bool]]
) -> dict[str, Any]:
    """A question's label. sampled: token ids of every answer without the end of turn, and whether it ended its turn."""
    # As tokens and back, so that spelling which the tokenizer does not keep cannot make an answer wrong.
    gold = _text(tokenizer, branch.token_ids[branch.answer_start : -1])
    answers = [_text(tokenizer, token_ids) for token_ids, _ in sampled]
    right = sum(ended and answer == gold for (_, ended), answer in zip(sampled, answers, strict=True))
    return {
        "record": record.record_id,
        "question": question.text,
        "answer": question.answer,
        "right": right,
        "samples": len(sampled),
        "answers": answers,
    }


def load_shown(records: Sequence[Record]) -> tuple[list[Shown], list[dict[str, Any]]]:
    """Records with their images, and the lines of those whose images cannot be read."""
    shown: list[Shown] = []
    lines: list[dict[str, Any]] = []
    for record in records:
        try:
            shown.append((record, record.load_images()))
        except DataError as error:
            lines.append({"record": record.record_id, "error": str(error)})
    return shown, lines


def _groups(shown: Sequence[Shown], n_questions: int) -> Iterator[list[Shown]]:
    """Runs of records with at most so many questions together, or one record: each record's images are read once."""
    group: list[Shown] = []
    n_asked = 0
    for record, images in shown:
        n = len(distinct(record))
        if group and n_asked + n > n_questions:
            yield group
            group, n_asked = [], 0
        group.append((record, images))
        n_asked += n
    if group:
        yield group


def distinct(record: Record) -> list[KindQuestion]:
    """Labels go by question text: one that is asked twice is sampled once."""
    first: dict[str, KindQuestion] = {}
    for question in record.questions:
        first.setdefault(question.text, question)
    return list(first.values())


def _text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()


def sample_seed(*parts: object) -> int:
    """A 64-bit number that depends on all parts."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:8], "big")
