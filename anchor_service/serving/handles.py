"""Generator and anchors as Ray Serve deployments: calls that survive the death of a replica.

Replicas keep nothing between calls that another could not compute, so a call whose replica died is sent again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from anchor_service.serving.engine import Event, Job
from anchor_service.serving.errors import ServiceError, too_busy
from shared.errors import VisualLatentsError
from shared.messages import Question

TRIES = 5
_PAUSE_S = 0.2
_GONE = (ActorDiedError, ActorUnavailableError, ReplicaUnavailableError)


class RemoteGenerator:
    """See `LatentWriter`."""

    def __init__(self, handle: DeploymentHandle[Any]):
        self._handle = handle

    async def emit(self, images: Sequence[bytes]) -> np.ndarray:
        latents_KD: np.ndarray = await _call(self._handle.emit, list(images))
        return latents_KD

    async def attention_png(self, image: bytes) -> bytes | None:
        png: bytes | None = await _call(self._handle.attention_png, image)
        return png

    async def state(self) -> dict[str, float]:
        state: dict[str, float] = await _call(self._handle.state)
        return state


class RemoteAnchor:
    """See `AnchorReader`."""

    def __init__(self, handle: DeploymentHandle[Any]):
        self._handle = handle

    async def generate(self, job: Job, replayable: bool) -> AsyncIterator[list[Event]]:
        """Events of a job. replayable: all of them at once in one reply, so that every death can be survived;
        otherwise only one before the first event.
        """
        if replayable:
            yield await _call(self._handle.answer, job)
            return
        for n_before in range(TRIES):
            has_sent = False
            response = self._handle.options(stream=True).generate.remote(job)
            try:
                async for events in response:
                    has_sent = True
                    yield events
                return
            except _GONE as error:
                if has_sent:
                    raise ServiceError(
                        503, "replica_lost", "the anchor was lost in the middle of the answer"
                    ) from error
                await _pause(n_before, error)
            except (BackPressureError, DeploymentUnavailableError, RayTaskError) as error:
                raise _plain(error) from error
            finally:
                response.cancel()

    async def next_logprobs(
        self, image: str, latents_KD: np.ndarray, question: str, answers: Sequence[tuple[int, ...]]
    ) -> np.ndarray:
        logprobs_NV: np.ndarray = await _call(self._handle.next_logprobs, image, latents_KD, question, answers)
        return logprobs_NV

    async def score(self, latents_KD: np.ndarray, questions: Sequence[Question]) -> list[list[float]]:
        logprobs: list[list[float]] = await _call(self._handle.score, latents_KD, list(questions))
        return logprobs

    async def state(self) -> dict[str, float]:
        state: dict[str, float] = await _call(self._handle.state)
        return state


async def _call(method: Any, *arguments: Any) -> Any:
    for n_before in range(TRIES):
        response = method.remote(*arguments)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except _GONE as error:
            await _pause(n_before, error)
        except (BackPressureError, DeploymentUnavailableError, RayTaskError) as error:
            raise _plain(error) from error
    raise AssertionError("the last pause raises")


async def _pause(n_before: int, error: Exception) -> None:
    """Wait before the next try, longer every time; raises ServiceError after the last."""
    if n_before + 1 == TRIES:
        raise ServiceError(503, "replica_lost", f"a replica died {TRIES} times; try again later") from error
    await asyncio.sleep(_PAUSE_S * 2**n_before)


def _plain(error: Exception) -> Exception:
    """What was meant: Ray wraps what a replica raises."""
    if isinstance(error, BackPressureError):
        return too_busy("every replica is busy and the queue is full; try again")
    if isinstance(error, DeploymentUnavailableError):
        return ServiceError(503, "unavailable", "a part of the service could not be started")
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, VisualLatentsError) else error
