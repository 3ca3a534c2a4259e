"""One served anchor: a model that answers, scores and tells its next-token distributions. No Ray here.

Legend: B images, K latents, D width, N answers, V vocabulary.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
import torch

from anchor_service.frozen_anchor import FrozenAnchor
from anchor_service.serving.concurrency import Batcher, EngineThread
from anchor_service.serving.continuations import Continuations
from anchor_service.serving.engine import EndEvent, Engine, Event, Job
from anchor_service.serving.vllm_engine import VllmEngine
from shared.config import Config
from shared.errors import DataError
from shared.messages import Question, ReadRequest
from shared.packing import latent_media
from shared.serve_config import EngineConfig, ServedAnchorConfig
from shared.vlm import load_vlm

ScoreItem = tuple[np.ndarray, Sequence[Question]]
"""Latents (K, D) and what is asked about them."""


class AnchorReader:
    """All of its model's work is done by one thread; its methods are for an event loop."""

    def __init__(self, anchor: ServedAnchorConfig, run: Config, engine: EngineConfig, batch_requests: int, device: str):
        positions = run.pool.latent_positions
        model = load_vlm(anchor.model, anchor.dtype, device).freeze()
        self._frozen = FrozenAnchor(anchor.name, model, run.generator.latents, positions)
        media = latent_media(run.generator.latents, on_grid=positions.value == "grid")
        self._thread = EngineThread(Engine(model, media, engine.rows))
        self._vllm: VllmEngine | None = None
        if anchor.vllm is not None:
            settings = anchor.vllm
            self._vllm = VllmEngine(anchor.model, settings.exported, anchor.dtype, engine.rows, settings.memory_share)
        self._continuations = Continuations(model, media, engine.continuations)
        self._score: Batcher[ScoreItem, list[list[float]]] = Batcher(
            lambda items: self._thread.call(lambda: self._read(items)), batch_requests
        )

    async def generate(self, job: Job) -> AsyncIterator[list[Event]]:
        """Events of a job as they come. Whoever stops listening cancels the job."""
        events_of_job = self._decoded(job) if self._vllm is None else self._vllm.generate(job)
        async with aclosing(events_of_job):
            async for events in events_of_job:
                yield events

    async def answer(self, job: Job) -> list[Event]:
        """All events of a job at once; the event loop is woken for the answer, not for every token of it."""
        if self._vllm is not None:
            return [event async for events in self.generate(job) for event in events]
        loop = asyncio.get_running_loop()
        whole: asyncio.Future[list[Event]] = loop.create_future()
        held: list[Event] = []
        n_open = job.sampling.n

        def settle(error: BaseException | None) -> None:
            if whole.done():
                return
            if error is None:
                whole.set_result(held)
            else:
                whole.set_exception(error)

        def arrive(events: list[Event] | BaseException) -> None:  # in the engine's thread
            nonlocal n_open
            if isinstance(events, BaseException):
                loop.call_soon_threadsafe(settle, events)
                return
            held.extend(events)
            n_open -= sum(isinstance(event, EndEvent) for event in events)
            if n_open == 0:
                loop.call_soon_threadsafe(settle, None)

        cancel = self._thread.submit(job, arrive)
        try:
            return await whole
        finally:
            cancel()

    async def _decoded(self, job: Job) -> AsyncGenerator[list[Event], None]:
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[list[Event] | BaseException] = asyncio.Queue()

        def arrive(events: list[Event] | BaseException) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, events)

        cancel = self._thread.submit(job, arrive)
        n_open = job.sampling.n
        try:
            while n_open:
                events = await arrived.get()
                # Whoever listens too slowly for single tokens gets those that have come meanwhile together.
                while not isinstance(events, BaseException) and not arrived.empty():
                    more = arrived.get_nowait()
                    events = more if isinstance(more, BaseException) else [*events, *more]
                if isinstance(events, BaseException):
                    raise events
                n_open -= sum(isinstance(event, EndEvent) for event in events)
                yield events
        finally:
            cancel()

    async def next_logprobs(
        self, image: str, latents_KD: np.ndarray, question: str, answers: Sequence[tuple[int, ...]]
    ) -> np.ndarray:
        """See `Continuations`."""
        return await self._thread.call(lambda: self._continuations.next_logprobs(image, latents_KD, question, answers))

    async def score(self, latents_KD: np.ndarray, questions: Sequence[Question]) -> list[list[float]]:
        """Log p of each token of each answer, the end of turn last. Calls that wait together share a pass.

        Raises DataError for an answer without tokens.
        """
        return await self._score((latents_KD, questions))

    async def state(self) -> dict[str, float]:
        """Counters of the engine, for metrics and tests."""
        n_vllm = 0 if self._vllm is None else self._vllm.at_work

        def take() -> dict[str, float]:
            at_work, waiting = self._thread.engine.load
            counters: dict[str, Any] = dataclasses.asdict(self._thread.engine.counters)
            return {
                **counters,
                "joint_columns": self._continuations.columns,
                "rows": at_work + n_vllm,
                "waiting": waiting,
            }

        return await self._thread.call(take)

    def _read(self, items: Sequence[ScoreItem]) -> list[list[list[float]] | Exception]:
        results: list[list[list[float]] | Exception] = [self._refusal(questions) or [] for _, questions in items]
        good = [i for i, result in enumerate(results) if not isinstance(result, Exception)]
        if good:
            latents_BKD = torch.stack([torch.from_numpy(items[i][0]) for i in good])
            reply = self._frozen.read(ReadRequest("", [items[i][1] for i in good], latents_BKD))
            for i, logprobs in zip(good, reply.logprobs, strict=True):
                results[i] = logprobs
        return results

    def _refusal(self, questions: Sequence[Question]) -> DataError | None:
        try:
            self._frozen.model.prompt.branches([questions])
        except DataError as error:
            return error
        return None
