"""An anchor as Ray actors: placement group, replicas, deadlines, recovery. The pool's only module that needs Ray."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from anchor_service.actor import AnchorActor, ProcessFacts
from anchor_service.cluster import bundle, check_resources
from anchor_service.wire import WireReply, slice_request, to_array, to_tensor, unpack_reply
from shared.config import AnchorConfig, Config
from shared.errors import AnchorCallError, AnchorLostError, HandshakeError, ResourceError, VisualLatentsError
from shared.messages import Handshake, Question, ReadReply, ReadRequest

_RETURN_POLL_S = 0.2


def reserve_ray_handles(config: Config, anchors: Sequence[AnchorConfig]) -> list[RayHandle]:
    """Reserve one placement group bundle for each replica of each anchor. Ray must be initialised.

    Raises ResourceError at once if the cluster as it stands could never hold them. The actors are created by
    `RayHandle.start`, so that from here on closing any handle gives everything back.
    """
    check_resources(config, anchors)
    bundles = [bundle(config, anchor) for anchor in anchors for _ in range(anchor.replicas)]
    group = placement_group(bundles, strategy=config.pool.strategy)
    handles, first_bundle = [], 0
    for anchor in anchors:
        handles.append(RayHandle(config, anchor, group, first_bundle))
        first_bundle += anchor.replicas
    return handles


@dataclass
class _Part:
    """A call to one replica; for reads, of images start … stop."""

    ref: Any
    replica: int
    arguments: tuple[Any, ...]
    method: str


class RayHandle:
    """One anchor and its replicas; see `AnchorHandle` for the methods."""

    def __init__(self, config: Config, anchor: AnchorConfig, group: PlacementGroup, first_bundle: int):
        self.name = anchor.name
        self._config = config
        self._anchor = anchor
        self._pool = config.pool
        self._group = group
        self._first_bundle = first_bundle
        self._actors: list[Any] = []
        self._process_tokens: dict[int, list[int]] = {}
        self._dead: set[int] = set()

    def start(self, deadline: float) -> None:
        # Ray cuts this limit down to whole seconds.
        if not self._group.wait(max(0, math.ceil(deadline - time.monotonic()))):
            raise ResourceError(
                f"anchor {self.name}: the cluster gave no place within pool.start_timeout_s; "
                f"free {self._anchor.cpus:g} CPU and {self._anchor.gpus:g} GPU per replica, or raise the timeout"
            )
        options = {
            "num_cpus": self._anchor.cpus,
            "num_gpus": self._anchor.gpus,
            "resources": dict(self._pool.resources) or None,
            "max_restarts": self._pool.max_restarts,
            # Calls are sent again by `_answer`: Ray would use up its retries while a lost node still counts as alive.
            "max_task_retries": 0,
        }
        actor_class: Any = ray.remote(AnchorActor)
        for i in range(self._anchor.replicas):
            place = PlacementGroupSchedulingStrategy(self._group, self._first_bundle + i)
            actor = actor_class.options(**options, scheduling_strategy=place)
            arguments = (self._anchor, self._config.generator.latents, self._pool.latent_positions)
            self._actors.append(actor.remote(*arguments))

    def handshake(self, probe_images: Sequence[bytes], deadline: float) -> Handshake:
        """That of the first replica; the others must be equal to it but for the measured norm."""
        limit = "pool.start_timeout_s"
        calls = [self._send("handshake", (list(probe_images),), i) for i in range(len(self._actors))]
        shaken: list[Handshake] = [self._answer(call, deadline, limit) for call in calls]
        self._process_tokens = {i: [facts.process_token] for i, facts in enumerate(self._facts(deadline, limit))}
        if len({replace(handshake, image_norm=None) for handshake in shaken}) > 1:
            raise HandshakeError(f"anchor {self.name}: its replicas differ ({shaken}); give every node the same model")
        return shaken[0]

    def submit(self, request: ReadRequest, shared_latents: dict[int, Any]) -> _RayCall:
        latents_ref, dtype = _put_once(request.latents, shared_latents)
        parts = []
        for i, (start, stop) in enumerate(self._shares(len(request.questions))):
            arguments = (slice_request(request, start, stop, str(i)), latents_ref, dtype, start, stop)
            parts.append(self._send("read", arguments, self._replica_after(i)))
        return _RayCall(self, request.request_id, parts)

    def submit_images(self, images: Sequence[Sequence[bytes]], questions: Sequence[Sequence[Question]]) -> _RayCall:
        parts = []
        for i, (start, stop) in enumerate(self._shares(len(images))):
            arguments = (f"images/{i}", list(images[start:stop]), list(questions[start:stop]))
            parts.append(self._send("read_images", arguments, self._replica_after(i)))
        return _RayCall(self, "images", parts)

    def embed_images(self, images: Sequence[Sequence[bytes]], grid: tuple[int, int], deadline: float) -> Tensor:
        array = self._answer(self._send("embed_images", (list(images), grid), 0), deadline, "pool.deadline_s")
        return to_tensor(array, "float32")

    def facts(self, deadline: float) -> list[ProcessFacts]:
        return self._facts(deadline, "pool.deadline_s")

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        # The group belongs to all anchors of the pool; removing it again is harmless.
        with contextlib.suppress(ValueError):
            remove_placement_group(self._group)

    def gather_part(self, part: _Part, deadline: float) -> ReadReply:
        """The reply of one part; another replica takes over when its own is gone for good."""
        while True:
            try:
                wire: WireReply = self._answer(part, deadline, "pool.deadline_s")
            except _ReplicaGoneError as gone:
                self._dead.add(part.replica)
                if len(self._dead) == len(self._actors):
                    raise AnchorLostError(str(gone)) from gone
                part = self._send(part.method, part.arguments, self._replica_after(part.replica))
                continue
            tokens = self._process_tokens[part.replica]
            if wire.process_token not in tokens:
                tokens.append(wire.process_token)
            return unpack_reply(wire, tokens.index(wire.process_token))

    def _answer(self, part: _Part, deadline: float, limit: str) -> Any:
        """What a call returns; sent again after each death of its process, at most pool.retries times.

        Raises _ReplicaGoneError when that was not enough or the process will not come back.
        """
        try:
            for _ in range(self._pool.retries):
                try:
                    return self._get(part.ref, deadline, limit)
                except RayActorError:
                    self._await_process(part.replica, deadline, limit)
                    part = self._send(part.method, part.arguments, part.replica)
            return self._get(part.ref, deadline, limit)
        except RayActorError as error:
            raise _ReplicaGoneError(
                f"anchor {self.name}: its process died and its {self._pool.max_restarts} restarts or "
                f"{self._pool.retries} retries are used up ({_last_line(error)}); look for the cause in its log "
                "(often out of memory), or raise pool.max_restarts"
            ) from error

    def _await_process(self, replica: int, deadline: float, limit: str) -> None:
        """Until the replica's process answers again. Raises RayActorError if it never will.

        Ray queues calls to an actor that it restarts, but fails them at once as long as it takes a lost node for
        alive (some seconds), hence the loop.
        """
        while True:
            try:
                self._get(self._actors[replica].facts.remote(), deadline, limit)
            except ActorUnavailableError:
                time.sleep(_RETURN_POLL_S)
            else:
                return

    def _facts(self, deadline: float, limit: str) -> list[ProcessFacts]:
        calls = [self._send("facts", (), i) for i in range(len(self._actors)) if i not in self._dead]
        return [self._answer(call, deadline, limit) for call in calls]

    def _send(self, method: str, arguments: tuple[Any, ...], replica: int) -> _Part:
        return _Part(getattr(self._actors[replica], method).remote(*arguments), replica, arguments, method)

    def _replica_after(self, replica: int) -> int:
        """The replica itself, or the next one that lives."""
        order = [(replica + step) % len(self._actors) for step in range(len(self._actors))]
        return next((i for i in order if i not in self._dead), order[0])

    def _shares(self, n_images: int) -> list[tuple[int, int]]:
        """Contiguous, nearly equal shares of the images, one per replica; empty shares are left out."""
        n = len(self._actors)
        edges = [n_images * i // n for i in range(n + 1)]
        return [(start, stop) for start, stop in itertools.pairwise(edges) if stop > start]

    def _get(self, ref: Any, deadline: float, limit: str) -> Any:
        """One answer. Raises RayActorError for a dead process, AnchorLostError past the deadline."""
        try:
            return ray.get(ref, timeout=max(0.0, deadline - time.monotonic()))
        except GetTimeoutError as error:
            ray.cancel(ref, force=False)
            raise AnchorLostError(
                f"anchor {self.name}: no answer within {limit}; see its log for why it is slow or did not "
                "come back, or raise the limit"
            ) from error
        except RayTaskError as error:
            if isinstance(error.cause, VisualLatentsError):
                raise error.cause from error
            raise AnchorCallError(f"anchor {self.name}: the call failed ({_last_line(error)})") from error


class _ReplicaGoneError(AnchorLostError):
    """One replica is gone for good; others may live."""


class _RayCall:
    """A call cut into one part per replica."""

    def __init__(self, handle: RayHandle, request_id: str, parts: list[_Part]):
        self._handle, self._request_id, self._parts = handle, request_id, parts

    def result(self, deadline: float) -> ReadReply:
        return _join(self._request_id, [self._handle.gather_part(part, deadline) for part in self._parts])


def _join(request_id: str, replies: Sequence[ReadReply]) -> ReadReply:
    import torch

    first = replies[0]
    gradients = [reply.latents_grad for reply in replies]
    return ReadReply(
        request_id=request_id,
        anchor=first.anchor,
        incarnation=max(reply.incarnation for reply in replies),
        logprobs=[row for reply in replies for row in reply.logprobs],
        matches=[row for reply in replies for row in reply.matches],
        answers=[row for reply in replies for row in reply.answers],
        latents_grad=None if gradients[0] is None else torch.cat([g for g in gradients if g is not None]),
        timings=max((reply.timings for reply in replies), key=lambda t: t.forward_s + t.backward_s),
    )


def _put_once(latents: Tensor | None, shared: dict[int, Any]) -> tuple[Any, str]:
    """One `ray.put` for latents that several anchors read; `shared` is keyed by tensor identity for one step."""
    if latents is None:
        return None, ""
    if id(latents) not in shared:
        array, dtype = to_array(latents)
        shared[id(latents)] = (ray.put(array), dtype)
    ref, dtype = shared[id(latents)]
    return ref, dtype


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
