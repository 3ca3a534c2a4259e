"""Seconds of a training step, from the operations of each process; who waits for whom, and what would balance it.

Per microbatch the generator takes g = forward + backward, and the reads of anchors in its own process; each remote
anchor takes a. With m microbatches the generator writes the next latents while anchors read, so

    step = max(m · g, m · slowest a + g)

which is g + a for m = 1, where nothing overlaps, and tends to m · max(g, a) for many. The optimizer, the
loss terms beside the anchors' and the network are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from shared.config import AnchorConfig, Config
from shared.flops import (
    forward_flops,
    head_flops,
    input_gradient_flops,
    lora_backward_flops,
    lora_forward_flops,
    tower_flops,
)
from trainer.estimate.devices import GPUS, Device, this_cpu
from trainer.estimate.memory import BYTES, kept_per_layer
from trainer.estimate.models import ModelFacts, lora_parameters
from trainer.estimate.rows import Questions, Rows, anchor_rows, generator_rows, microbatch_images


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds. forward_s, backward_s: of the generator; local_s, remote_s: one read of each anchor, by name.

    All but step_s are of one microbatch. balance: replicas of each remote anchor that suffice not to be slower than
    the generator's process; None where one replica for each image would not.
    """

    forward_s: float
    backward_s: float
    local_s: Mapping[str, float]
    remote_s: Mapping[str, float]
    balance: Mapping[str, int | None]
    step_s: float

    @property
    def generator_s(self) -> float:
        """The generator's process, per microbatch."""
        return self.forward_s + self.backward_s + sum(self.local_s.values())


def step_time(
    config: Config, models: Mapping[str, ModelFacts], questions: Questions, gpu: Device | None
) -> StepTime | None:
    """gpu: what stands for every GPU of the config. None if one is needed and not known."""
    facts = models[config.generator.model]
    device = _generator_device(config, gpu)
    if device is None:
        return None
    forward_s, backward_s = generator_seconds(config, facts, device)
    local_s: dict[str, float] = {}
    for anchor in config.anchors:
        if anchor.placement != "ray":
            own = facts if anchor.placement == "shared_base" else models[anchor.model]
            local_s[anchor.name] = _read_s(config, anchor, own, questions, 1, device)
    generator_s = forward_s + backward_s + sum(local_s.values())

    remote_s: dict[str, float] = {}
    balance: dict[str, int | None] = {}
    for anchor in config.anchors:
        if anchor.placement == "ray":
            place = _anchor_device(anchor, gpu)
            if place is None:
                return None
            read_s = functools.partial(_read_s, config, anchor, models[anchor.model], questions, device=place)
            remote_s[anchor.name] = read_s(anchor.replicas)
            enough = (n for n in range(1, microbatch_images(config) + 1) if read_s(n) <= generator_s)
            balance[anchor.name] = next(enough, None)
    step_s = overlapped_s(config.train.fewest_microbatches, generator_s, max(remote_s.values(), default=0.0))
    return StepTime(forward_s, backward_s, local_s, remote_s, balance, step_s)


def overlapped_s(n_microbatches: int, generator_s: float, anchor_s: float) -> float:
    """The formula at the head of this file."""
    fill_s = generator_s if anchor_s else 0.0
    return max(n_microbatches * generator_s, n_microbatches * anchor_s + fill_s)


def generator_seconds(config: Config, facts: ModelFacts, device: Device) -> tuple[float, float]:
    """Forward (tower and decoder) and backward of one microbatch."""
    generator = config.generator
    rows, n_lora = generator_rows(config, facts), lora_parameters(facts, generator.lora)
    size = (facts.decoder, rows.n_rows, rows.n_tokens, rows.n_keys)
    kept = kept_per_layer(facts, rows, generator.dtype, generator.lora, on_gpu=device.name in GPUS)
    flops = forward_flops(*size) + lora_forward_flops(n_lora, rows.all_tokens)
    forward_s = pass_seconds(facts, device, generator.dtype, flops, kept)
    flops = input_gradient_flops(*size) + lora_backward_flops(n_lora, rows.all_tokens)
    backward_s = pass_seconds(facts, device, generator.dtype, flops, kept, backward=True)
    tower_s = tower_flops(facts.tower, rows.n_rows) / device.product_rate(generator.dtype)
    # Checkpointing computes the decoder's forward again.
    return tower_s + forward_s, backward_s + (forward_s if generator.gradient_checkpointing else 0.0)


def read_seconds(facts: ModelFacts, rows: Rows, dtype: str, device: Device, forwards: int = 1) -> float:
    """One read with gradient; forwards: 2 in vjp mode, which asks for log-probabilities first."""
    size = (facts.decoder, rows.n_rows, rows.n_tokens, rows.n_keys, rows.n_predictions)
    head = head_flops(facts.decoder, rows.n_predictions)
    kept = kept_per_layer(facts, rows, dtype, on_gpu=device.name in GPUS)
    forward_s = pass_seconds(facts, device, dtype, forward_flops(*size) + head, kept)
    return forwards * forward_s + pass_seconds(
        facts, device, dtype, input_gradient_flops(*size) + head, kept, backward=True
    )


def pass_seconds(
    facts: ModelFacts, device: Device, dtype: str, flops: int, kept_per_layer: int, backward: bool = False
) -> float:
    """The formula at the head of `trainer.estimate.devices`. Backward makes two tensors for each one of forward."""
    times, layers = 2 if backward else 1, facts.decoder.layers
    moved = times * device.moves * layers * kept_per_layer + facts.decoder.linear_weights * BYTES[dtype]
    return flops / device.product_rate(dtype) + moved / device.bandwidth + times * layers * device.layer_overhead_s


def _read_s(
    config: Config, anchor: AnchorConfig, facts: ModelFacts, questions: Questions, replicas: int, device: Device
) -> float:
    dtype = config.generator.dtype if anchor.placement == "shared_base" else anchor.dtype
    rows = anchor_rows(config, facts, questions, replicas)
    return read_seconds(facts, rows, dtype, device, 2 if config.pool.mode == "vjp" else 1)


def _generator_device(config: Config, gpu: Device | None) -> Device | None:
    wanted = config.generator.device
    if wanted == "cpu" or (wanted == "auto" and gpu is None and not torch.cuda.is_available()):
        return this_cpu(config.generator.dtype, config.generator.cpus or torch.get_num_threads())
    return gpu


def _anchor_device(anchor: AnchorConfig, gpu: Device | None) -> Device | None:
    return gpu if anchor.gpus > 0 else this_cpu(anchor.dtype, max(1, int(anchor.cpus)))
