"""The Ray actor around one `FrozenAnchor`: one process, one model, one call at a time, no state between calls."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from anchor_service.frozen_anchor import FrozenAnchor, load_frozen_anchor
from anchor_service.wire import WireReply, pack_reply, to_tensor
from shared.config import AnchorConfig
from shared.errors import VisualLatentsError
from shared.messages import Handshake, LatentPositions, Question, ReadRequest


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """What `probe` prints about an anchor's process; process_token is that of its replies."""

    pid: int
    process_token: int
    node: str
    peak_memory_bytes: int
    gpu_memory_bytes: int


class AnchorActor:
    """Runs in a process of its own; created by the pool. `__init__` runs again after every restart.

    A model that cannot be loaded is reported by the first call, not by `__init__`: Ray hands on a method's error
    as it is, but of a constructor's only the text of the traceback.
    """

    def __init__(self, config: AnchorConfig, n_latents: int, latent_positions: LatentPositions):
        if config.gpus == 0:
            torch.set_num_threads(max(1, int(config.cpus)))
        device = "cuda" if config.gpus > 0 else "cpu"
        self._process_token = time.time_ns()
        self._loaded: FrozenAnchor | VisualLatentsError
        try:
            self._loaded = load_frozen_anchor(config, n_latents, latent_positions, device)
        except VisualLatentsError as error:
            self._loaded = error

    @property
    def _anchor(self) -> FrozenAnchor:
        if isinstance(self._loaded, VisualLatentsError):
            raise self._loaded
        return self._loaded

    def handshake(self, probe_images: Sequence[bytes]) -> Handshake:
        """See `FrozenAnchor.handshake`."""
        return self._anchor.handshake(probe_images)

    def read(
        self, request: ReadRequest, latents: np.ndarray | None, latents_dtype: str, start: int, stop: int
    ) -> WireReply:
        """Read images start … stop of the shared latents array."""
        if latents is not None:
            request = replace(request, latents=to_tensor(latents[start:stop], latents_dtype))
        return pack_reply(self._anchor.read(request), self._process_token)

    def read_images(
        self, request_id: str, images: Sequence[Sequence[bytes]], questions: Sequence[Sequence[Question]]
    ) -> WireReply:
        """See `FrozenAnchor.read_images`; evaluation only."""
        return pack_reply(self._anchor.read_images(request_id, images, questions), self._process_token)

    def embed_images(self, images: Sequence[Sequence[bytes]], grid: tuple[int, int]) -> np.ndarray:
        """See `FrozenAnchor.embed_images`; evaluation only."""
        return self._anchor.embed_images(images, grid).numpy()

    def facts(self) -> ProcessFacts:
        """Process id, host and peak memory."""
        gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return ProcessFacts(os.getpid(), self._process_token, os.uname().nodename, peak, gpu)
