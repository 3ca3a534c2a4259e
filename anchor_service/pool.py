"""The trainer's side of the anchors: start them, call them in parallel, survive the loss of one.

    pool = AnchorPool.start(config, generator_handshake, shared_base)
    replies = pool.read({"A": request, "B": request})

Every call is submitted before any is gathered; `submit` and `gather` apart leave room for other work in between.
Each has a deadline. A call whose actor dies is sent again to the
restarted actor (bounded by pool.retries and pool.max_restarts), then to the anchor's other replicas.
An anchor lost for good ends the run or is dropped, by pool.on_loss; never silently.

Owned by one thread of the trainer's process.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from anchor_service.frozen_anchor import FrozenAnchor, check_handshake, load_frozen_anchor
from shared.config import AnchorConfig, Config, PoolConfig
from shared.errors import AnchorCallError, AnchorLostError, NonFiniteReplyError
from shared.messages import Gradient, Handshake, Question, ReadReply, ReadRequest
from shared.vlm import VisionLanguageModel


class PendingReply(Protocol):
    """A call under way."""

    def result(self, deadline: float) -> ReadReply:
        """The reply, by `time.monotonic()` = deadline. Raises AnchorLostError or AnchorCallError."""


class AnchorHandle(Protocol):
    """One anchor, wherever it runs."""

    name: str

    def start(self, deadline: float) -> None:
        """Wait until the anchor is loaded. Raises ResourceError, ModelError or AnchorLostError."""

    def handshake(self, probe_images: Sequence[bytes], deadline: float) -> Handshake:
        """What the anchor is and expects."""

    def submit(self, request: ReadRequest, shared_latents: dict[int, Any]) -> PendingReply:
        """Send a read. `shared_latents` keeps what was put into the object store for this step."""

    def submit_images(self, images: Sequence[Sequence[bytes]], questions: Sequence[Sequence[Question]]) -> PendingReply:
        """Send a read of real images."""

    def embed_images(self, images: Sequence[Sequence[bytes]], grid: tuple[int, int], deadline: float) -> Tensor:
        """See `FrozenAnchor.embed_images`."""

    def facts(self, deadline: float) -> list[Any]:
        """`ProcessFacts` of each replica; empty in the trainer's process."""

    def close(self) -> None:
        """Free processes and memory."""


@dataclass(frozen=True, slots=True)
class PendingReads:
    """Reads under way, by anchor: what was asked (of latents alone), and the calls that bring the answers."""

    requests: dict[str, ReadRequest]
    calls: dict[str, PendingReply]


class AnchorPool:
    """All anchors of a run. Use as a context manager: leaving it ends the actors."""

    def __init__(self, handles: Sequence[AnchorHandle], config: PoolConfig, weights: Mapping[str, float]):
        self._handles = {handle.name: handle for handle in handles}
        self._config = config
        self._weights = dict(weights)
        self._lost: dict[str, str] = {}
        self._request_numbers = itertools.count()
        self.handshakes: dict[str, Handshake] = {}

    @classmethod
    def start(
        cls,
        config: Config,
        generator: Handshake,
        shared_base: SharedBase | None = None,
        anchors: Sequence[AnchorConfig] | None = None,
        probe_images: Sequence[bytes] = (),
    ) -> AnchorPool:
        """Start `anchors` (default: those of the config), wait for them and shake hands with each.

        Raises HandshakeError, ResourceError, ModelError or AnchorLostError; nothing is left running then.
        """
        chosen = config.anchors if anchors is None else anchors
        handles = make_handles(config, chosen, shared_base)
        pool = cls(handles, config.pool, {anchor.name: anchor.weight for anchor in chosen})
        deadline = time.monotonic() + config.pool.start_timeout_s
        try:
            for handle in handles:
                handle.start(deadline)
            for handle in handles:
                shaken = handle.handshake(probe_images, deadline)
                check_handshake(shaken, generator)
                pool.handshakes[handle.name] = shaken
        except BaseException:
            pool.close()
            raise
        return pool

    @property
    def has_remote(self) -> bool:
        """Whether any anchor computes in a process of its own, beside the trainer."""
        return any(not isinstance(self._handles[name], LocalHandle) for name in self.names)

    @property
    def names(self) -> list[str]:
        """Anchors that still answer, in the order of the config."""
        return [name for name in self._handles if name not in self._lost]

    @property
    def lost(self) -> dict[str, str]:
        """Dropped anchors and why."""
        return dict(self._lost)

    def weights(self) -> dict[str, float]:
        """w_r of the anchors that still answer, normalised to sum to 1."""
        total = sum(self._weights[name] for name in self.names)
        return {name: self._weights[name] / total for name in self.names}

    def new_request_id(self) -> str:
        """A number that no other request of this pool has."""
        return f"r{next(self._request_numbers)}"

    def read(self, requests: Mapping[str, ReadRequest]) -> dict[str, ReadReply]:
        """Send one request to each named anchor at once and gather the replies; see `gather`."""
        return self.gather(self.submit(requests))

    def submit(self, requests: Mapping[str, ReadRequest]) -> PendingReads:
        """Send one request to each named anchor and return at once.

        Anchors in the trainer's process compute when they are gathered.
        """
        shared_latents: dict[int, Any] = {}
        calls = {name: self._handles[name].submit(request, shared_latents) for name, request in requests.items()}
        return PendingReads(dict(requests), calls)

    def gather(self, pending: PendingReads) -> dict[str, ReadReply]:
        """The replies, each checked against its request; the deadline runs from now.

        Anchors dropped on the way are absent from the result. Raises AnchorLostError (policy `fail`),
        AnchorCallError, DataError.
        """
        replies = self._gather(pending.calls, time.monotonic() + self._config.deadline_s)
        for name, request in pending.requests.items():
            if name in replies:
                _check_reply(request, replies[name])
        return replies

    def read_images(
        self, images: Sequence[Sequence[bytes]], questions: Sequence[Sequence[Question]], names: Sequence[str]
    ) -> dict[str, ReadReply]:
        """The ceiling: the same questions with each record's real images (encoded files)."""
        return self.gather(self.submit_images(images, questions, names))

    def submit_images(
        self, images: Sequence[Sequence[bytes]], questions: Sequence[Sequence[Question]], names: Sequence[str]
    ) -> PendingReads:
        """`read_images` that returns at once; see `submit`."""
        return PendingReads({}, {name: self._handles[name].submit_images(images, questions) for name in names})

    def embed_images(self, name: str, images: Sequence[Sequence[bytes]], grid: tuple[int, int]) -> Tensor:
        """(B, C, D) an anchor's own visual tokens of each record's images, pooled into a grid."""
        return self._handles[name].embed_images(images, grid, time.monotonic() + self._config.deadline_s)

    def facts(self) -> dict[str, list[Any]]:
        """`ProcessFacts` of every replica, by anchor."""
        deadline = time.monotonic() + self._config.deadline_s
        return {name: self._handles[name].facts(deadline) for name in self.names}

    def close(self) -> None:
        """End all actors. Safe to call twice. An error in closing one does not keep the others."""
        with contextlib.ExitStack() as stack:
            for handle in self._handles.values():
                stack.callback(handle.close)

    def __enter__(self) -> AnchorPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _gather(self, pending: Mapping[str, PendingReply], deadline: float) -> dict[str, ReadReply]:
        replies = {}
        for name, call in pending.items():
            if name in self._lost:
                continue  # dropped while this call was waiting behind the one that noticed
            try:
                replies[name] = call.result(deadline)
            except AnchorLostError as error:
                if self._config.on_loss == "fail":
                    raise
                self._lost[name] = str(error)
                if not self.names:
                    raise AnchorLostError(f"all anchors are lost; the last one: {error}") from error
        return replies


SharedBase = tuple[VisionLanguageModel, Callable[[], contextlib.AbstractContextManager[object]]]
"""The generator's model and the context in which its adapter is off."""


def make_handles(config: Config, anchors: Sequence[AnchorConfig], shared_base: SharedBase | None) -> list[AnchorHandle]:
    """One handle per anchor, not yet started; Ray is imported only if an anchor needs it."""
    by_name: dict[str, AnchorHandle] = {}
    for anchor in anchors:
        if anchor.placement == "shared_base" and shared_base is None:
            raise AnchorCallError(f"anchor {anchor.name}: shared_base needs a generator in this process")
        if anchor.placement != "ray":
            base = shared_base if anchor.placement == "shared_base" else None
            by_name[anchor.name] = LocalHandle(anchor, config, base)
    remote = [anchor for anchor in anchors if anchor.placement == "ray"]
    if remote:
        # Last, so that nothing can go wrong between taking a place on the cluster and having a pool to close.
        from anchor_service.ray_handle import reserve_ray_handles

        by_name |= {handle.name: handle for handle in reserve_ray_handles(config, remote)}
    return [by_name[anchor.name] for anchor in anchors]


class LocalHandle:
    """An anchor in the trainer's process: placements local and shared_base."""

    def __init__(self, anchor: AnchorConfig, config: Config, shared_base: SharedBase | None):
        self.name = anchor.name
        self._anchor_config = anchor
        self._config = config
        self._shared_base = shared_base
        self._anchor: FrozenAnchor | None = None

    def start(self, deadline: float) -> None:
        n_latents, positions = self._config.generator.latents, self._config.pool.latent_positions
        if self._shared_base is None:
            device = "cuda" if self._anchor_config.gpus > 0 else "cpu"
            self._anchor = load_frozen_anchor(self._anchor_config, n_latents, positions, device)
        else:
            model, adapter_off = self._shared_base
            self._anchor = FrozenAnchor(self.name, model, n_latents, positions, adapter_off)

    def handshake(self, probe_images: Sequence[bytes], deadline: float) -> Handshake:
        return self._started().handshake(probe_images)

    def submit(self, request: ReadRequest, shared_latents: dict[int, Any]) -> PendingReply:
        return _LocalCall(lambda: self._started().read(request))

    def submit_images(self, images: Sequence[Sequence[bytes]], questions: Sequence[Sequence[Question]]) -> PendingReply:
        return _LocalCall(lambda: self._started().read_images("images", images, questions))

    def embed_images(self, images: Sequence[Sequence[bytes]], grid: tuple[int, int], deadline: float) -> Tensor:
        return self._started().embed_images(images, grid)

    def facts(self, deadline: float) -> list[Any]:
        return []

    def close(self) -> None:
        self._anchor = None

    def _started(self) -> FrozenAnchor:
        assert self._anchor is not None, "start() comes first"
        return self._anchor


class _LocalCall:
    """Computed when it is gathered, after every remote call is on its way."""

    def __init__(self, compute: Callable[[], ReadReply]):
        self._compute = compute

    def result(self, deadline: float) -> ReadReply:
        return self._compute()


def _check_reply(request: ReadRequest, reply: ReadReply) -> None:
    """A reply must answer this request, image by image, with finite numbers."""
    where = f"anchor {reply.anchor} (incarnation {reply.incarnation}), request {request.request_id}"
    if reply.request_id != request.request_id:
        raise AnchorCallError(f"{where}: the reply answers {reply.request_id}; the call was mixed up")
    if [len(row) for row in reply.logprobs] != [len(row) for row in request.questions]:
        raise AnchorCallError(f"{where}: the reply's questions are not those that were asked")
    bad = [b for b, row in enumerate(reply.logprobs) if not all(math.isfinite(v) for q in row for v in q)]
    if request.gradient is not Gradient.NONE:
        gradient, latents = reply.latents_grad, request.latents
        if gradient is None or latents is None or gradient.shape != latents.shape:
            shape = None if gradient is None else tuple(gradient.shape)
            raise AnchorCallError(f"{where}: gradient of shape {shape}, expected that of the latents")
        bad += torch.nonzero(~torch.isfinite(gradient).flatten(1).all(1)).flatten().tolist()
    if bad:
        raise NonFiniteReplyError(
            f"{where}: NaN or infinity for images {sorted(set(bad))} of the batch", sorted(set(bad))
        )
