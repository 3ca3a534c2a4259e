"""Joint decoding: all anchors answer together.

Anchors whose tokenizers agree mix their next-token distributions, token by token:

    arithmetic   p(v) = Σ_r w_r p_r(v)            geometric   p(v) ∝ Π_r p_r(v)^w_r            (Σ_r w_r = 1)

Groups of anchors whose tokenizers differ each write a candidate; every anchor then scores every candidate by its mean
log-probability per token, and the candidate with the largest weighted sum is the answer.

Legend: N answers, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch

from anchor_service.serving.concurrency import gathered
from anchor_service.serving.engine import EndEvent, Event, Job, TokenEvent
from anchor_service.serving.sampling import AnswerText, choose, random_numbers
from shared.messages import Question
from shared.vlm import Prompt, load_prompt, vlm_config

Mean = Literal["arithmetic", "geometric"]


class JointAnchor(Protocol):
    """What joint decoding asks of an anchor."""

    def generate(self, job: Job, replayable: bool) -> AsyncIterator[list[Event]]: ...

    async def next_logprobs(
        self, image: str, latents_KD: np.ndarray, question: str, answers: Sequence[tuple[int, ...]]
    ) -> np.ndarray: ...

    async def score(self, latents_KD: np.ndarray, questions: Sequence[Question]) -> list[list[float]]: ...


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """An anchor's tokenizer without its model. fingerprint: equal where token ids mean the same."""

    prompt: Prompt
    fingerprint: str


def load_vocabulary(model: str) -> Vocabulary:
    """The vocabulary of a model folder; no weight is loaded. Raises ModelError."""
    prompt = load_prompt(model)
    size = vlm_config(model).get_text_config().vocab_size
    _, end_id = prompt.opening("?")
    facts = [sorted(prompt.tokenizer.get_vocab().items()), size, end_id]
    return Vocabulary(prompt, hashlib.sha256(json.dumps(facts).encode()).hexdigest())


def mix(logprobs_NV: Sequence[np.ndarray], weights: Sequence[float], mean: Mean) -> np.ndarray:
    """(N, V) float64 log-probabilities of the mixture. weights need not sum to 1."""
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    stacked_RNV = np.stack(logprobs_NV).astype(np.float64)
    if mean == "arithmetic":
        mixed_NV = np.logaddexp.reduce(stacked_RNV + np.log(shares)[:, None, None], axis=0)
    else:
        mixed_NV = np.tensordot(shares, stacked_RNV, axes=1)
    normalised_NV: np.ndarray = mixed_NV - np.logaddexp.reduce(mixed_NV, axis=1, keepdims=True)
    return normalised_NV


def vote(scores: Mapping[str, Sequence[Sequence[float]]], weights: Mapping[str, float]) -> int:
    """The number of the candidate that wins. scores: by anchor, for each candidate the log p of its tokens."""
    n_candidates = len(next(iter(scores.values())))
    totals = [
        sum(weights[name] * float(np.mean(candidates[c])) for name, candidates in scores.items())
        for c in range(n_candidates)
    ]
    return int(np.argmax(totals))


class Joint:
    """All anchors as one. weights: by anchor."""

    def __init__(
        self,
        anchors: Mapping[str, JointAnchor],
        vocabularies: Mapping[str, Vocabulary],
        weights: Mapping[str, float],
        mean: Mean,
    ):
        self._anchors = anchors
        self._vocabularies = vocabularies
        self._weights = weights
        self._mean: Mean = mean
        groups: dict[str, list[str]] = {}
        for name, vocabulary in vocabularies.items():
            groups.setdefault(vocabulary.fingerprint, []).append(name)
        self.groups = list(groups.values())

    async def generate(self, job: Job, replayable: bool) -> AsyncIterator[list[Event]]:
        """Events as of one anchor. Where anchors vote, the whole answer comes at its end, without log-probabilities."""
        if len(self.groups) == 1:
            async for events in self._mixed(self.groups[0], job):
                yield events
        else:
            yield await self._voted(job)

    async def _mixed(self, names: Sequence[str], job: Job) -> AsyncIterator[list[Event]]:
        prompt = self._vocabularies[names[0]].prompt
        decode = prompt.tokenizer.decode
        opening, end_id = prompt.opening(job.question)
        prompt_tokens = len(prompt.prefix_ids) + len(job.latents_KD) + len(opening)
        sampling = job.sampling
        texts = [AnswerText(prompt.tokenizer, sampling.stop) for _ in range(sampling.n)]
        numbers = [random_numbers(sampling, sample) for sample in range(sampling.n)]
        answers: dict[int, tuple[int, ...]] = dict.fromkeys(range(sampling.n), ())
        while answers:
            going_on = list(answers)
            logprobs_NV = await self._next(names, job, [answers[sample] for sample in going_on])
            draw_N = torch.tensor([numbers[sample].random() for sample in going_on], dtype=torch.float64)
            temperature_N = torch.full_like(draw_N, sampling.temperature)
            top_p_N = torch.full_like(draw_N, sampling.top_p)
            tokens = choose(torch.from_numpy(logprobs_NV), temperature_N, top_p_N, draw_N).tolist()
            events: list[Event] = []
            for sample, token, logprobs_V in zip(going_on, tokens, logprobs_NV, strict=True):
                written = answers[sample] if token == end_id else (*answers[sample], token)
                answers[sample] = written
                text = "" if token == end_id else texts[sample].add(token)
                if token == end_id or texts[sample].stopped:
                    del answers[sample]
                    text = text if texts[sample].stopped else texts[sample].end()
                    events.append(EndEvent(sample, text, "stop", prompt_tokens, len(written)))
                    continue
                best = np.argsort(-logprobs_V, kind="stable")[: sampling.top_logprobs]
                top = tuple((str(decode([int(v)])), float(logprobs_V[v])) for v in best)
                events.append(TokenEvent(sample, text, str(decode([token])), float(logprobs_V[token]), top))
                if len(written) == sampling.max_tokens:
                    del answers[sample]
                    events.append(EndEvent(sample, texts[sample].end(), "length", prompt_tokens, len(written)))
            yield events

    async def _next(self, names: Sequence[str], job: Job, answers: Sequence[tuple[int, ...]]) -> np.ndarray:
        calls = (self._anchors[n].next_logprobs(job.image, job.latents_KD, job.question, answers) for n in names)
        replies = await gathered(*calls)
        return mix(replies, [self._weights[name] for name in names], self._mean)

    async def _voted(self, job: Job) -> list[Event]:
        written = await gathered(*(self._candidates(names, job) for names in self.groups))
        ends: list[Event] = []
        for sample in range(job.sampling.n):
            candidates = [of_group[sample] for of_group in written]
            ends.append(await self._winner(job, candidates))
        return ends

    async def _candidates(self, names: Sequence[str], job: Job) -> list[EndEvent]:
        """A group's answers, each an end event with the whole text."""
        source = self._mixed(names, job) if len(names) > 1 else self._anchors[names[0]].generate(job, True)
        texts = [""] * job.sampling.n
        ends: dict[int, EndEvent] = {}
        async for events in source:
            for event in events:
                texts[event.sample] += event.text
                if isinstance(event, EndEvent):
                    ends[event.sample] = event
        return [replace(ends[sample], text=texts[sample]) for sample in range(job.sampling.n)]

    async def _winner(self, job: Job, candidates: Sequence[EndEvent]) -> EndEvent:
        # An empty answer has no token whose probability could be taken.
        by_text = {candidate.text: candidate for candidate in reversed(candidates) if candidate.text.strip()}
        if len(by_text) < 2:
            return next(iter(by_text.values()), candidates[0])
        questions = [Question(job.question, text) for text in by_text]
        scored = await gathered(*(anchor.score(job.latents_KD, questions) for anchor in self._anchors.values()))
        winner = vote(dict(zip(self._anchors, scored, strict=True)), self._weights)
        return list(by_text.values())[winner]
