"""What the API does, whatever stands behind it: remote deployments, or models in this process in tests.

Legend: B entries, K latents, D width.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from anchor_service.serving.cache import Cache
from anchor_service.serving.concurrency import gathered
from anchor_service.serving.engine import Event, Job
from anchor_service.serving.errors import ServiceError
from anchor_service.serving.inputs import (
    check_count,
    check_words,
    checked_latents,
    decoded_url,
    digest_of,
    noise_like,
)
from anchor_service.serving.joint import Joint, JointAnchor, Vocabulary
from anchor_service.serving.remote import RemoteImages
from anchor_service.serving.sampling import Sampling
from anchor_service.serving.schema import REMOTE, ChatRequest, ImagePart, ScoreEntry, TextPart
from shared.errors import DataError
from shared.messages import Question
from shared.serve_config import ServeConfig

JOINT = "joint"
READY_LIMIT_S = 5.0


class ServedGenerator(Protocol):
    """What the service asks of the generator."""

    async def emit(self, images: Sequence[bytes]) -> np.ndarray: ...

    async def attention_png(self, image: bytes) -> bytes | None: ...

    async def state(self) -> dict[str, float]: ...


class ServedAnchor(JointAnchor, Protocol):
    """What the service asks of an anchor."""

    async def state(self) -> dict[str, float]: ...


@dataclass(frozen=True, slots=True)
class Answering:
    """A chat request, checked; its job holds the latents that are read, perhaps swapped."""

    request: ChatRequest
    job: Job
    images: Sequence[bytes]
    cached: bool


class Service:
    """One per front replica. shape: (K, D) of latents. example: the encoded image of swap `other_image`."""

    def __init__(
        self,
        config: ServeConfig,
        shape: tuple[int, int],
        generator: ServedGenerator,
        anchors: Mapping[str, ServedAnchor],
        vocabularies: Mapping[str, Vocabulary],
        example: bytes,
    ):
        self.config = config
        self.shape = shape
        self.generator = generator
        self.anchors = anchors
        self.latents_cache: Cache[np.ndarray] = Cache(config.cache_bytes, lambda latents_KD: latents_KD.nbytes)
        self.attention_cache: Cache[bytes] = Cache(config.cache_bytes // 4, len)
        self.remote = RemoteImages(config.limits)
        self._example = example
        weights = {name: config.joint.weights.get(name, 1.0) for name in anchors}
        self.joint = Joint(anchors, vocabularies, weights, config.joint.mean)
        self._special_tokens = frozenset(
            token
            for one in vocabularies.values()
            for token in (*one.prompt.tokenizer.all_special_tokens, *one.prompt.tokenizer.get_added_vocab())
        )

    @property
    def models(self) -> list[str]:
        """Names that a chat request may ask."""
        return [*self.anchors, JOINT]

    async def latents(self, images: Sequence[bytes]) -> tuple[np.ndarray, bool]:
        """(K, D) latents of one record, and whether they were there."""
        try:
            return await self.latents_cache.get(digest_of(images), lambda: self.generator.emit(images))
        except DataError as error:
            raise ServiceError(422, "invalid_image", f"the image cannot be read: {error}") from error

    async def latents_of_urls(self, urls: Sequence[str]) -> list[tuple[np.ndarray, bool]]:
        """Latents of each image, in order."""
        check_count(len(urls), self.config.limits.batch, "images")
        images = await self._images(urls)
        return await gathered(*(self.latents([image]) for image in images))

    async def prepare(self, request: ChatRequest) -> Answering:
        """Check a chat request and have its latents written. Raises ServiceError."""
        limits = self.config.limits
        if request.model not in self.models:
            raise ServiceError(404, "model_not_found", f"no such model; there are {', '.join(self.models)}")
        max_tokens = request.max_tokens or request.max_completion_tokens or limits.max_tokens
        check_count(max_tokens, limits.max_tokens, "max_tokens")
        check_count(request.n, limits.n, "answers (n)")
        (message,) = request.messages
        urls = [part.image_url.url for part in message.content if isinstance(part, ImagePart)]
        question = "\n".join(part.text for part in message.content if isinstance(part, TextPart))
        check_words([question], limits, self._special_tokens)
        check_count(len(urls), limits.images, "images")
        if not urls:
            raise ServiceError(422, "no_image", "the message has no image; add a part of type image_url")
        images = await self._images(urls)
        latents_KD, cached = await self.latents(images)
        latents_KD = await self._swapped(latents_KD, request.visual_latents.swap, digest_of(images))
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=secrets.randbits(63) if request.seed is None else request.seed,
            stop=request.stops,
            n=request.n,
            top_logprobs=request.top_logprobs,
        )
        image = hashlib.sha256(latents_KD.tobytes()).hexdigest()
        return Answering(request, Job(image, latents_KD, question, sampling), images, cached)

    def answer(self, answering: Answering, replayable: bool) -> AsyncIterator[list[Event]]:
        """Events as they come. replayable: nothing has been sent before all of them are there."""
        model = answering.request.model
        anchor: JointAnchor | Joint = self.joint if model == JOINT else self.anchors[model]
        return anchor.generate(answering.job, replayable)

    async def evidence(self, answering: Answering, answer: str) -> dict[str, object]:
        """What speaks for an answer: see `visual_latents` of the chat response."""
        swap = answering.request.visual_latents.swap
        has_map = swap == "none" and len(answering.images) == 1
        scored, png = await asyncio.gather(
            self._log_probabilities(answering.job, answer),
            self._attention(answering.images[0]) if has_map else asyncio.sleep(0, b""),
        )
        return {
            "log_probability": scored,
            "attention_png": base64.b64encode(png).decode() if png else None,
            "swap": swap,
            "cached": answering.cached,
        }

    async def score(self, entries: Sequence[ScoreEntry], names: Sequence[str] | None) -> list[list[dict[str, object]]]:
        """Per entry and question, log p of each answer token under each anchor. Raises ServiceError."""
        limits = self.config.limits
        names = list(dict.fromkeys(names or self.anchors))
        if unknown := [name for name in names if name not in self.anchors]:
            raise ServiceError(
                404, "model_not_found", f"{len(unknown)} unknown anchors; there are {', '.join(self.anchors)}"
            )
        check_count(len(entries), limits.batch, "entries")
        for entry in entries:
            check_count(len(entry.questions), limits.batch, "questions of an entry")
            check_words([t for q in entry.questions for t in (q.question, q.answer)], limits, self._special_tokens)
        latents = await gathered(*(self._latents_of_entry(entry) for entry in entries))
        return await gathered(
            *(self._score_entry(entry, one, names) for entry, one in zip(entries, latents, strict=True))
        )

    async def states(self) -> dict[str, dict[str, float]]:
        """Counters of generator and anchors, of one replica each; those that do not answer in time are left out."""

        async def state(one: ServedGenerator | ServedAnchor) -> dict[str, float] | None:
            try:
                async with asyncio.timeout(READY_LIMIT_S):
                    return await one.state()
            except Exception:  # noqa: BLE001 - whatever it is, it does not answer
                return None

        parts: dict[str, ServedGenerator | ServedAnchor] = {"generator": self.generator, **self.anchors}
        states = zip(parts, await asyncio.gather(*map(state, parts.values())), strict=True)
        return {name: found for name, found in states if found is not None}

    async def is_ready(self) -> dict[str, bool]:
        """Whether generator and anchors answer."""
        states = await self.states()
        return {name: name in states for name in ("generator", *self.anchors)}

    async def _images(self, urls: Sequence[str]) -> list[bytes]:
        """Encoded images, in order."""

        async def image(url: str) -> bytes:
            return await self.remote.fetch(url) if url.startswith(REMOTE) else decoded_url(url)

        return await gathered(*map(image, urls))

    async def _swapped(self, latents_KD: np.ndarray, swap: str, digest: str) -> np.ndarray:
        if swap == "noise":
            return noise_like(latents_KD, digest)
        if swap == "other_image":
            return (await self.latents([self._example]))[0]
        return latents_KD

    async def _log_probabilities(self, job: Job, answer: str) -> dict[str, float]:
        if not answer.strip():
            return {}
        question = [Question(job.question, answer)]
        scored = await gathered(*(anchor.score(job.latents_KD, question) for anchor in self.anchors.values()))
        return {name: sum(tokens) for name, (tokens,) in zip(self.anchors, scored, strict=True)}

    async def _attention(self, image: bytes) -> bytes:
        async def make() -> bytes:
            return await self.generator.attention_png(image) or b""

        return (await self.attention_cache.get(digest_of([image]), make))[0]

    async def _latents_of_entry(self, entry: ScoreEntry) -> np.ndarray:
        if entry.image is not None:
            return (await self.latents(await self._images([entry.image])))[0]
        assert entry.latents is not None, "the schema asks for one of both"
        return checked_latents(entry.latents, self.shape, self.config.limits.latent_norm)

    async def _score_entry(
        self, entry: ScoreEntry, latents_KD: np.ndarray, names: Sequence[str]
    ) -> list[dict[str, object]]:
        questions = [Question(one.question, one.answer) for one in entry.questions]
        try:
            replies = await gathered(*(self.anchors[name].score(latents_KD, questions) for name in names))
        except DataError as error:
            raise ServiceError(422, "invalid_answer", "an answer has no tokens; correct it") from error
        return [
            {
                name: {"logprobs": reply[q], "log_probability": sum(reply[q])}
                for name, reply in zip(names, replies, strict=True)
            }
            for q in range(len(questions))
        ]
