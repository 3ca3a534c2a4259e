"""Continuous decoding of one anchor: answers join and leave between two tokens, each with its keys and values.

A step lets waiting jobs in and then writes one token of every answer at work. Jobs that begin together share one pass
over the latents of each image and one over their questions. What an answer says depends on its job alone; only
rounding depends on the rows beside it.

Legend: B rows, K latents, D width, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anchor_service.serving.sampling import AnswerText, Sampling, choose, random_numbers
from shared.packing import Media
from shared.vlm import GrowingRows, ImageTokens, VisionLanguageModel

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Job:
    """Answers to one question about one image. latents_KD: float32. image: equal for equal latents."""

    image: str
    latents_KD: np.ndarray
    question: str
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of a sample.

    text: what the answer has gained, perhaps nothing. logprob: under the anchor itself, whatever the temperature.
    top: the most probable tokens with theirs. token: the token alone as text.
    """

    sample: int
    text: str
    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class EndEvent:
    """The end of a sample. text: what was held back. completion_tokens: the end of turn is not one."""

    sample: int
    text: str
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


Event = TokenEvent | EndEvent


@dataclass(slots=True)
class Counters:
    """What an engine has computed since it began."""

    images: int = 0
    questions: int = 0
    tokens: int = 0
    steps: int = 0
    cancelled: int = 0


@dataclass(slots=True)
class _Row:
    """One answer at work."""

    job_id: int
    sample: int
    sampling: Sampling
    end_id: int
    prompt_tokens: int
    text: AnswerText
    numbers: np.random.Generator
    n_written: int = 0


@dataclass(slots=True)
class _Waiting:
    job_id: int
    job: Job = field(repr=False)


class Engine:
    """Owned by one thread. n_rows: answers at work at one time; a job of more of them takes all places."""

    def __init__(self, model: VisionLanguageModel, media: Media, n_rows: int):
        self.model = model
        self.counters = Counters()
        self._media = media
        self._n_rows = n_rows
        self._ids = itertools.count()
        self._waiting: deque[_Waiting] = deque()
        self._at_work: list[_Row] = []
        self._rows: GrowingRows | None = None

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing."""
        return not self._waiting and not self._at_work

    @property
    def load(self) -> tuple[int, int]:
        """Answers at work, jobs waiting."""
        return len(self._at_work), len(self._waiting)

    def add(self, job: Job) -> int:
        """Let a job wait for its turn; the number under which its events come."""
        self._waiting.append(_Waiting(next(self._ids), job))
        return self._waiting[-1].job_id

    def cancel(self, job_id: int) -> None:
        """Forget a job: its rows are computed no further. Nothing happens if it has ended."""
        n_before = len(self._waiting) + len(self._at_work)
        self._waiting = deque(one for one in self._waiting if one.job_id != job_id)
        self._keep([i for i, row in enumerate(self._at_work) if row.job_id != job_id])
        self.counters.cancelled += len(self._waiting) + len(self._at_work) < n_before

    def has(self, job_id: int) -> bool:
        """Whether a job waits or is at work."""
        return any(row.job_id == job_id for row in self._at_work) or any(w.job_id == job_id for w in self._waiting)

    def forget(self) -> list[int]:
        """After an error: drop everything; the numbers of the jobs that are lost."""
        lost = [one.job_id for one in self._waiting] + [row.job_id for row in self._at_work]
        self._waiting.clear()
        self._keep([])
        return list(dict.fromkeys(lost))

    @torch.no_grad()
    def step(self) -> list[tuple[int, Event]]:
        """Let jobs in, write one token of each answer; what happened, with the job's number."""
        self._admit()
        if self._rows is None:
            return []
        self.counters.steps += 1
        logits_BV = F.linear(self._rows.hidden_BD, *self.model.head()).float()
        tokens = self._choose(logits_BV)
        logprobs_BV = logits_BV.log_softmax(dim=-1)
        events: list[tuple[int, Event]] = []
        going_on = []
        for i, (row, token) in enumerate(zip(self._at_work, tokens, strict=True)):
            new = self._advance(row, token, logprobs_BV[i])
            events += [(row.job_id, event) for event in new]
            if not isinstance(new[-1], EndEvent):
                going_on.append(i)
        written = [tokens[i] for i in going_on]
        self._keep(going_on)
        if self._rows is not None:
            self._rows.append_tokens([[token] for token in written])
        return events

    def _choose(self, logits_BV: Tensor) -> list[int]:
        settings = [
            (row.sampling.temperature, row.sampling.top_p, row.numbers.random() if row.sampling.temperature else 0.0)
            for row in self._at_work
        ]
        temperature_B, top_p_B, draw_B = torch.tensor(settings, dtype=torch.float64, device=logits_BV.device).T
        chosen: list[int] = choose(logits_BV, temperature_B, top_p_B, draw_B).tolist()
        return chosen

    def _advance(self, row: _Row, token: int, logprobs_V: Tensor) -> list[Event]:
        """What one more token makes of an answer."""
        self.counters.tokens += 1
        if token == row.end_id:
            return [self._end(row, "stop")]
        row.n_written += 1
        text = row.text.add(token)
        if row.text.stopped:
            return [self._end(row, "stop", text)]
        top = self._top(logprobs_V, row.sampling.top_logprobs)
        event = TokenEvent(row.sample, text, self._token_text(token), float(logprobs_V[token]), top)
        return [event, self._end(row, "length")] if row.n_written == row.sampling.max_tokens else [event]

    def _end(self, row: _Row, reason: FinishReason, text: str | None = None) -> EndEvent:
        rest = row.text.end() if text is None else text
        return EndEvent(row.sample, rest, reason, row.prompt_tokens, row.n_written)

    def _top(self, logprobs_V: Tensor, n: int) -> tuple[tuple[str, float], ...]:
        values, tokens = logprobs_V.topk(n)
        return tuple(zip(map(self._token_text, tokens.tolist()), values.tolist(), strict=True))

    def _token_text(self, token: int) -> str:
        return str(self.model.processor.tokenizer.decode([token]))

    def _keep(self, going_on: Sequence[int]) -> None:
        if len(going_on) == len(self._at_work):
            return
        self._at_work = [self._at_work[i] for i in going_on]
        self._rows = self._rows.select(going_on) if self._rows is not None and going_on else None

    def _admit(self) -> None:
        """First come, first served: as many waiting jobs as there is room for."""
        taken: list[_Waiting] = []
        n_rows = len(self._at_work)
        while self._waiting and (n_rows == 0 or n_rows + self._waiting[0].job.sampling.n <= self._n_rows):
            taken.append(self._waiting.popleft())
            n_rows += taken[-1].job.sampling.n
        if taken:
            fresh, rows = self._begin(taken)
            self._rows = rows if self._rows is None else GrowingRows.joined([self._rows, rows])
            self._at_work += fresh

    def _begin(self, taken: Sequence[_Waiting]) -> tuple[list[_Row], GrowingRows]:
        """Rows of new jobs, read up to where their answers begin."""
        images = list({one.job.image: one.job.latents_KD for one in taken}.items())
        numbers = {image: i for i, (image, _) in enumerate(images)}
        read = read_latents(self.model, [latents for _, latents in images], self._media)
        asked = list(dict.fromkeys((one.job.image, one.job.question) for one in taken))
        openings = [self.model.prompt.opening(question) for _, question in asked]
        questions = read.select([numbers[image] for image, _ in asked])
        questions.append_tokens([token_ids for token_ids, _ in openings])
        self.counters.images += len(images)
        self.counters.questions += len(asked)
        before = len(self.model.prompt.prefix_ids) + self._media.length
        fresh, places = [], []
        for one in taken:
            place, sampling = asked.index((one.job.image, one.job.question)), one.job.sampling
            token_ids, end_id = openings[place]
            for sample in range(sampling.n):
                text = AnswerText(self.model.processor.tokenizer, sampling.stop)
                rng = random_numbers(sampling, sample)
                fresh.append(_Row(one.job_id, sample, sampling, end_id, before + len(token_ids), text, rng))
                places.append(place)
        return fresh, questions.select(places)


def read_latents(model: VisionLanguageModel, latents: Iterable[np.ndarray], media: Media) -> GrowingRows:
    """A row for each image's latents (K, D): the prompt up to the end of them."""
    tensors = [torch.tensor(one, device=model.device, dtype=model.dtype) for one in latents]
    return GrowingRows.after_images(model, ImageTokens(tensors, [media.grid] * len(tensors)))
