"""The Ray Serve application: a generator, one deployment per anchor, and the front that composes them.

serve deploy deploy/serve/toy.yaml                                  # import_path anchor_service.serving.app:build
python -m anchor_service serve --config deploy/serve/toy.yaml       # the same file on this machine, until Ctrl-C
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp

from anchor_service.serving.api import make_api
from anchor_service.serving.engine import Event, Job
from anchor_service.serving.gate import log_to_stdout
from anchor_service.serving.handles import RemoteAnchor, RemoteGenerator
from anchor_service.serving.joint import load_vocabulary
from anchor_service.serving.reader import AnchorReader
from anchor_service.serving.service import Service
from anchor_service.serving.writer import LatentWriter
from shared.config import Config, parse_section
from shared.errors import ConfigError
from shared.messages import LatentPositions, Question
from shared.run_folder import best_checkpoint, run_config
from shared.serve_config import ReplicasConfig, ServeConfig, ServedAnchorConfig
from shared.vlm import vlm_config

EXAMPLE_IMAGE = Path(__file__).with_name("example.png")


class GeneratorDeployment:
    """A `LatentWriter` behind a handle."""

    def __init__(self, config: ServeConfig):
        device = _device(config.generator)
        run = run_config(config.run)
        self._writer = LatentWriter(run, device, config.batch_requests, config.limits.image_pixels)

    async def emit(self, images: Sequence[bytes]) -> np.ndarray:
        """See `LatentWriter`."""
        return await self._writer.emit(images)

    async def attention_png(self, image: bytes) -> bytes | None:
        """See `LatentWriter`."""
        return await self._writer.attention_png(image)

    async def state(self) -> dict[str, float]:
        """See `LatentWriter`."""
        return await self._writer.state()


class AnchorDeployment:
    """An `AnchorReader` behind a handle."""

    def __init__(self, config: ServeConfig, anchor: ServedAnchorConfig):
        run = run_config(config.run)
        self._reader = AnchorReader(anchor, run, config.engine, config.batch_requests, _device(anchor))

    async def generate(self, job: Job) -> AsyncIterator[list[Event]]:
        """See `AnchorReader`."""
        async for events in self._reader.generate(job):
            yield events

    async def answer(self, job: Job) -> list[Event]:
        """See `AnchorReader`."""
        return await self._reader.answer(job)

    async def next_logprobs(
        self, image: str, latents_KD: np.ndarray, question: str, answers: Sequence[tuple[int, ...]]
    ) -> np.ndarray:
        """See `AnchorReader`."""
        return await self._reader.next_logprobs(image, latents_KD, question, answers)

    async def score(self, latents_KD: np.ndarray, questions: Sequence[Question]) -> list[list[float]]:
        """See `AnchorReader`."""
        return await self._reader.score(latents_KD, questions)

    async def state(self) -> dict[str, float]:
        """See `AnchorReader`."""
        return await self._reader.state()


@serve.ingress()
class Front:
    """The API. Holds no model, only tokenizers."""

    def __init__(
        self,
        config: ServeConfig,
        shape: tuple[int, int],
        generator: DeploymentHandle[Any],
        anchors: Mapping[str, DeploymentHandle[Any]],
    ):
        log_to_stdout()
        self._service = Service(
            config,
            shape,
            RemoteGenerator(generator),
            {name: RemoteAnchor(handle) for name, handle in anchors.items()},
            {anchor.name: load_vocabulary(anchor.model) for anchor in config.anchors},
            EXAMPLE_IMAGE.read_bytes(),
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return make_api(self._service)


def build(args: dict[str, Any]) -> serve.Application:
    """The application of a config (see `shared/serve_config.py`), checked before anything is started.

    Raises ConfigError, CheckpointError or ModelError.
    """
    config = parse_section(ServeConfig, args, "args")
    if not config.run.is_dir():
        raise ConfigError(f"run: {config.run}: no such run folder; train first (make demo writes runs/demo)")
    run = run_config(config.run)
    best_checkpoint(run)
    shape = (run.generator.latents, _width(run.generator.model))
    _check_anchors(config, run, shape[1])
    limits = config.limits
    # A replica that is replaced finishes what it has accepted, which takes at most the time that a request may take.
    deployment = functools.partial(_deployment, drain_s=limits.request_timeout_s)
    generator = deployment(GeneratorDeployment, "generator", config.generator, limits.requests).bind(config)
    anchors = {
        anchor.name: deployment(
            AnchorDeployment, f"anchor-{anchor.name}", anchor, limits.requests, _environment(anchor)
        ).bind(config, anchor)
        for anchor in config.anchors
    }
    # One more than the gate lets in: it says 429 itself, with its bound. What waits before it is Serve's queue.
    front = deployment(Front, "front", config.front, limits.requests + 64)
    application: serve.Application = front.bind(config, shape, generator, anchors)
    return application


def _environment(anchor: ServedAnchorConfig) -> dict[str, Any]:
    """Ray's runtime_env: vLLM lives in an environment of its own."""
    return {} if anchor.vllm is None else {"py_executable": anchor.vllm.python}


def _deployment(
    cls: Any,
    name: str,
    replicas: ReplicasConfig,
    n_requests: int,
    runtime_env: dict[str, Any] | None = None,
    *,
    drain_s: float,
) -> Any:
    scaling: dict[str, Any] = {"num_replicas": replicas.min_replicas}
    if replicas.max_replicas > replicas.min_replicas:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=replicas.min_replicas,
                max_replicas=replicas.max_replicas,
                target_ongoing_requests=max(1.0, n_requests / 4),
            )
        }
    return serve.deployment(
        cls,
        name=name,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus, "runtime_env": runtime_env or {}},
        max_ongoing_requests=n_requests,
        max_queued_requests=n_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        graceful_shutdown_timeout_s=drain_s,
        health_check_period_s=2,
        # The gate writes a line for each request, with more in it.
        logging_config=LoggingConfig(enable_access_log=False),
        **scaling,
    )


def _check_anchors(config: ServeConfig, run: Config, width: int) -> None:
    for anchor in config.anchors:
        if anchor.vllm is not None and run.pool.latent_positions is LatentPositions.GRID:
            raise ConfigError(
                f"anchors: {anchor.name}: vLLM gives prompts of embeddings positions one by one, {config.run} was "
                "trained with pool.latent_positions: grid; drop vllm, or train with latent_positions: text"
            )
        if anchor.vllm is not None and not anchor.vllm.exported.is_dir():
            raise ConfigError(
                f"anchors: {anchor.name}: vllm.exported: {anchor.vllm.exported}: no such folder; write it: "
                "python -m anchor_service export"
            )
        if (found := _width(anchor.model)) != width:
            raise ConfigError(
                f"anchors: {anchor.name} has width {found}, the generator of {config.run} has {width}; "
                "use an anchor of the generator's width"
            )


def _width(model: str) -> int:
    width: int = vlm_config(model).get_text_config().hidden_size
    return width


def _device(replicas: ReplicasConfig) -> str:
    return "cuda" if replicas.gpus > 0 else "cpu"
