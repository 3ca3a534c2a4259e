"""What Ray costs and what it brings: remote reads, anchors side by side, overlap with the generator, transport.

Where a row asks how well calls run side by side, anchors only wait and answer: their latency is fixed by the row's
definition, so that the figure shows scheduling and transport alone and does not need a machine per anchor.

Legend: B images, K latents, D width, R anchors.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import ray
import torch
from torch import Tensor

from anchor_service.actor import AnchorActor
from anchor_service.pool import AnchorPool
from anchor_service.wire import WireReply, to_array, to_tensor
from shared.config import AnchorConfig, Config
from shared.messages import PROTOCOL_VERSION, Gradient, Handshake, LatentPositions, ReadReply, ReadRequest
from shared.vlm import ImageTokens, vlm_config
from shared.vlm.generator import Generator
from shared.vlm.model import DTYPES
from tests.benchmarks.bench import N_IMAGES, N_LATENTS, N_QUESTIONS, Bench, random_latents
from tests.benchmarks.models import TINY, ModelSize, make_questions
from tests.benchmarks.results import Result
from tests.benchmarks.runs import make_records, open_trainer, run_config
from tests.benchmarks.step_rows import TINY_IMAGE_PX
from tests.benchmarks.timing import interleaved, ratios, result
from trainer.loop import Trainer

_REPOSITORY = Path(__file__).parents[2]
_WIDTH_7B = 3584
_OVERLAP_IMAGES = 16


@contextlib.contextmanager
def local_ray() -> Iterator[None]:
    """A Ray of this machine for as long as the context lasts."""
    environment = {"PYTHONPATH": str(_REPOSITORY)}
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        logging_level="WARNING",
        log_to_driver=False,
        runtime_env={"env_vars": environment},
    )
    try:
        yield
    finally:
        ray.shutdown()


def remote_rows(bench: Bench, label: str, size: ModelSize) -> list[Result]:
    """The same anchor with the same single thread: as a Ray actor, and in this process."""
    anchor = bench.anchor_fields("anchor", size)
    request = pool_request(str(anchor["model"]), bench.dtype)
    with one_thread(), contextlib.ExitStack() as stack:
        sides = {}
        for placement in ("ray", "local"):
            config = run_config({"model": anchor["model"]}, [{**anchor, "placement": placement, "cpus": 1}])
            pool = stack.enter_context(AnchorPool.start(config, generator_side(config)))
            sides[placement] = partial(pool.read, dict.fromkeys(pool.names, request))
        seconds = interleaved(sides, bench.repetitions)
    in_process_ms = 1e3 * float(np.median(seconds["local"]))
    return [
        result(
            f"remote read / read in process, one anchor, {label}",
            ratios(seconds["ray"], seconds["local"]),
            f"× the time; in process {in_process_ms:.0f} ms",
            bench.command,
            at_most=1.05,
        )
    ]


def parallel_rows(bench: Bench, n_anchors: int = 8, latency_s: float = 0.5) -> list[Result]:
    """Training steps with R anchors that take a fixed time, over steps with one of them."""
    with contextlib.ExitStack() as stack:
        sides = {}
        for n in (n_anchors, 1):
            trainer = stack.enter_context(_trainer_of_waiting_anchors(bench, n, latency_s / N_IMAGES, N_IMAGES, 1))
            sides[str(n)] = _stepper(trainer)
        seconds = interleaved(sides, bench.repetitions)
    return [
        result(
            f"step time with R={n_anchors} anchors / with R=1, each on a worker of its own, {latency_s:g} s a read",
            ratios(seconds[str(n_anchors)], seconds["1"]),
            "× the time",
            bench.command,
            at_most=1.1,
        )
    ]


def overlap_rows(bench: Bench, side_s: float = 3.2) -> list[Result]:
    """Steps of a generator and an anchor that each take `side_s` per step, in as many microbatches as images."""
    per_image_s = side_s / _OVERLAP_IMAGES
    with _trainer_of_waiting_anchors(bench, 1, per_image_s, _OVERLAP_IMAGES, _OVERLAP_IMAGES) as trainer:
        _slow_down(trainer.generator, per_image_s)
        overlapped = _stepper(trainer)

        def in_sequence() -> object:
            with mock.patch.object(AnchorPool, "has_remote", False):
                return overlapped()

        seconds = interleaved({"overlapped": overlapped, "in sequence": in_sequence}, bench.repetitions)
    unit = f"× max(generator, anchor), {side_s:g} s each, {_OVERLAP_IMAGES} microbatches"
    return [
        result(f"step time, {name}", [s / side_s for s in seconds[name]], unit, bench.command, at_most=bar)
        for name, bar in (("overlapped", 1.15), ("in sequence", None))
    ]


def transport_rows(bench: Bench, n_calls: int = 100) -> list[Result]:
    """Latents of a 7B (4 × 16 × 3584, bfloat16, 0.46 MB) to an actor and a gradient of that size back."""
    latents_BKD = random_latents(N_IMAGES, N_LATENTS, _WIDTH_7B, torch.bfloat16)
    actor = ray.remote(_Echo).options(num_cpus=0.1).remote()

    def round_trip() -> Tensor:
        array, dtype = to_array(latents_BKD)
        return to_tensor(*ray.get(actor.array.remote(ray.put(array), dtype)))

    def shared_put(n_puts: int, n_readers: int = 8) -> None:
        array, dtype = to_array(latents_BKD)
        refs = [ray.put(array) for _ in range(n_puts)]
        ray.get([actor.receive.remote(refs[i % n_puts], dtype) for i in range(n_readers)])

    assert torch.equal(round_trip(), latents_BKD)
    sides: dict[str, Callable[[], object]] = {
        "empty": lambda: ray.get(actor.nothing.remote()),
        "array": round_trip,
        "pickled": lambda: ray.get(actor.tensor.remote(latents_BKD)),
        "one put": partial(shared_put, 1),
        "a put each": partial(shared_put, 8),
    }
    seconds = interleaved({name: _repeated(call, n_calls) for name, call in sides.items()}, bench.repetitions)
    empty_ms = 1e3 * float(np.median(seconds["empty"])) / n_calls
    unit = f"× an empty call of {empty_ms:.2f} ms"
    return [
        result(
            "round trip of 0.46 MB bfloat16 as an array of the object store",
            ratios(seconds["array"], seconds["empty"]),
            unit,
            bench.command,
            at_most=4.0,
        ),
        result(
            "round trip of 0.46 MB bfloat16 as a pickled tensor",
            ratios(seconds["pickled"], seconds["empty"]),
            unit,
            bench.command,
        ),
        result(
            "0.46 MB to 8 anchors without sharing one put",
            ratios(seconds["a put each"], seconds["one put"]),
            "× the time with one put",
            bench.command,
        ),
    ]


class _Echo:
    """Takes what it is given and gives it back, by each of the ways."""

    def nothing(self) -> None:
        return None

    def array(self, array: np.ndarray, dtype: str) -> tuple[np.ndarray, str]:
        return to_array(to_tensor(array, dtype))

    def receive(self, array: np.ndarray, dtype: str) -> None:
        to_tensor(array, dtype)

    def tensor(self, tensor: Tensor) -> Tensor:
        return tensor


def waiting_actor(per_image_s: float) -> type[AnchorActor]:
    """An anchor's actor without a model: waits a fixed time for each image, then answers with zeros."""

    class WaitingActor(AnchorActor):
        def __init__(self, config: AnchorConfig, n_latents: int, latent_positions: LatentPositions):
            self._process_token = time.time_ns()
            self._name, self._n_latents = config.name, n_latents
            self._width = vlm_config(config.model).get_text_config().hidden_size

        def handshake(self, probe_images: Sequence[bytes]) -> Handshake:
            shape = {"latents": self._n_latents, "width": self._width, "dtype": "float32"}
            return Handshake(self._name, PROTOCOL_VERSION, **shape, family="waiting", prompt="", image_norm=1.0)

        def read(
            self, request: ReadRequest, latents: np.ndarray | None, latents_dtype: str, start: int, stop: int
        ) -> WireReply:
            assert latents is not None
            time.sleep(per_image_s * (stop - start))
            logprobs = [[[-1.0] for _ in row] for row in request.questions]
            matches = [[[False] for _ in row] for row in request.questions]
            reply = ReadReply(request.request_id, self._name, 0, logprobs, matches)
            return WireReply(reply, np.zeros_like(latents[start:stop]), latents_dtype, self._process_token)

    return WaitingActor


@contextlib.contextmanager
def _trainer_of_waiting_anchors(
    bench: Bench, n_anchors: int, per_image_s: float, n_images: int, microbatches: int
) -> Iterator[Trainer]:
    folder = bench.folder(TINY)
    anchors = [{"name": f"A{i}", "model": str(folder), "placement": "ray", "cpus": 0.1} for i in range(n_anchors)]
    train = {"batch_images": n_images, "microbatches": microbatches}
    config = run_config({"model": str(folder), "latents": N_LATENTS, "cpus": 1}, anchors, train=train)
    records = make_records(bench.root / f"tiny-{n_images}", n_images, TINY_IMAGE_PX, N_QUESTIONS)
    with (
        one_thread(),
        mock.patch("anchor_service.ray_handle.AnchorActor", waiting_actor(per_image_s)),
        open_trainer(config, records) as trainer,
    ):
        yield trainer


def _slow_down(generator: Generator, per_image_s: float) -> None:
    """Forward takes a third of the time per image and backward the rest, as with frozen weights and checkpointing."""

    def emit(tokens: ImageTokens) -> Tensor:
        n_images = len(tokens.tokens)
        time.sleep(n_images * per_image_s / 3)
        return _WaitInBackward.apply(Generator.emit(generator, tokens), n_images * per_image_s * 2 / 3)

    generator.emit = emit  # type: ignore[method-assign]


class _WaitInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latents_BKD: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return latents_BKD.clone()

    @staticmethod
    def backward(ctx: Any, grad_BKD: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return grad_BKD, None


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """As many threads as an anchor's process with one CPU has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def generator_side(config: Config) -> Handshake:
    """What the generator of a config would say of itself."""
    facts = vlm_config(config.generator.model)
    shape = {"latents": config.generator.latents, "width": facts.get_text_config().hidden_size}
    return Handshake(
        "benchmark", PROTOCOL_VERSION, **shape, dtype=config.generator.dtype, family=facts.model_type, prompt=""
    )


def pool_request(model: str, dtype: str) -> ReadRequest:
    """A read with gradient for anchors of this model, latents on the CPU."""
    width = vlm_config(model).get_text_config().hidden_size
    latents_BKD = random_latents(N_IMAGES, N_LATENTS, width, DTYPES[dtype])
    return ReadRequest("benchmark", make_questions(N_IMAGES, N_QUESTIONS), latents_BKD, Gradient.FUSED)


def _stepper(trainer: Trainer) -> Callable[[], object]:
    step = 0

    def call() -> object:
        nonlocal step
        step += 1
        return trainer.step(step - 1)

    return call


def _repeated(call: Callable[[], object], n_calls: int) -> Callable[[], object]:
    def many() -> None:
        for _ in range(n_calls):
            call()

    return many
