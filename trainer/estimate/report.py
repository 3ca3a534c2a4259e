"""The estimate for people: one table per process, then what limits a step and what would balance it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from shared.config import Config
from shared.errors import ConfigError
from trainer.estimate.devices import GPUS, Device, gpu_named
from trainer.estimate.memory import ProcessMemory, estimate_memory
from trainer.estimate.models import ModelFacts, models_of
from trainer.estimate.rows import typical_questions
from trainer.estimate.step_time import StepTime, step_time
from trainer.microbatches import Microbatches

GIB = 2**30
_SPARE = 2 * GIB
NOTE = (
    "One training step with questions of typical length. Not counted: the CUDA context and fragmentation (plan 2 GiB "
    "per GPU), the vision tower's passing activations, optimizer and network time, evaluation. Processes on the CPU "
    "are taken to have cores of their own."
)


def print_estimate(config: Config, console: Console, device: str | None = None) -> None:
    """Print memory and time of every process. device: a name of the table that stands for the config's GPUs.

    Raises ModelError where a model's config or processor cannot be read, ConfigError for an unknown device.
    """
    gpu = gpu_named(device)
    if device is not None and not _wants_gpu(config):
        raise ConfigError(f"--device {device}: no process of this config runs on a GPU; set generator.device: cuda")
    models = models_of(config)
    # `auto` also tries the whole batch at once, which takes the most memory.
    whole = with_microbatches(config, config.train.fewest_microbatches)
    config, time = fastest(config, models, gpu)
    for i, process in enumerate(estimate_memory(whole, models, typical_questions(whole))):
        console.print(_table(process, _seconds_of(process, time, is_trainer=i == 0)))
        if gpu is not None and process.on_gpu and process.total + _SPARE > gpu.memory_bytes:
            console.print(f"does not fit: {gpu.name} has {gpu.memory_bytes / GIB:.1f} GiB", style="bold red")
    if time is None:
        console.print(f"Step time: this machine has no GPU of the table; name one with --device ({', '.join(GPUS)}).")
    else:
        for line in verdict(config, time, gpu):
            console.print(line, highlight=False)
    console.print(NOTE, style="dim")


def fastest(config: Config, models: Mapping[str, ModelFacts], gpu: Device | None) -> tuple[Config, StepTime | None]:
    """The config with a number in place of microbatches `auto`, the one that should be fastest, and its step time."""
    train = config.train
    has_remote = any(anchor.placement == "ray" for anchor in config.anchors)
    counts = Microbatches(train.microbatches, train.batch_images, has_remote).candidates
    choices = [with_microbatches(config, n) for n in counts]
    times = [step_time(choice, models, typical_questions(choice), gpu) for choice in choices]
    best = min(range(len(choices)), key=lambda i: math.inf if (time := times[i]) is None else time.step_s)
    return choices[best], times[best]


def with_microbatches(config: Config, n: int) -> Config:
    """The same run with n microbatches."""
    return config.model_copy(update={"train": config.train.model_copy(update={"microbatches": n})})


def verdict(config: Config, time: StepTime, gpu: Device | None) -> list[str]:
    """Step time, the slower side and by how much, and how many replicas would balance them."""
    images_per_s = config.train.batch_images / time.step_s
    basis = "CPU: its peak measured now" if gpu is None else f"{gpu.name}: efficiency assumed, not measured"
    cut = f"{config.train.microbatches} microbatches" if config.train.microbatches != 1 else "1 microbatch"
    lines = [f"Step: {time.step_s:.3g} s, {images_per_s:.3g} images/s in {cut} ({basis})."]
    if not time.remote_s:
        return [*lines, "Everything runs in one process, one call after the other; no replicas to balance."]
    slowest = max(time.remote_s, key=lambda name: time.remote_s[name])
    anchor_s, generator_s = time.remote_s[slowest], time.generator_s
    sides = [(f"anchor {slowest}", anchor_s), ("the generator's process", generator_s)]
    (slow, slow_s), (fast, fast_s) = sorted(sides, key=lambda side: -side[1])
    lines.append(
        f"Bottleneck: {slow}, {slow_s:.3g} s per microbatch against {fast_s:.3g} s of {fast} ({slow_s / fast_s:.1f} ×)."
    )
    counts = [f"{name} {n if n is not None else 'cannot'}" for name, n in time.balance.items()]
    lines.append(f"Replicas that keep up with the generator: {', '.join(counts)}.")
    if None in time.balance.values():
        lines.append("cannot: one image per replica is still slower; raise train.batch_images or lower microbatches.")
    if config.train.microbatches == 1:
        lines.append("With train.microbatches: 1 nothing overlaps: generator and anchors wait for each other.")
    return lines


def _table(process: ProcessMemory, seconds: Mapping[str, float]) -> Table:
    title = f"{process.name} on {'GPU' if process.on_gpu else 'CPU'}"
    table = Table("part", "", title=title, title_justify="left", min_width=56)
    table.columns[1].justify = "right"
    for part, n_bytes in process.parts.items():
        table.add_row(f"{part} ← config" if part in process.otherwise else part, f"{n_bytes / GIB:.3f} GiB")
        if part in process.otherwise:
            other, n_other = process.otherwise[part]
            table.add_row(f"({other})", f"({n_other / GIB:.3f} GiB)", style="dim")
    table.add_section()
    times = f" (each of {process.replicas} replicas)" if process.replicas > 1 else ""
    table.add_row(f"total{times}", f"{process.total / GIB:.3f} GiB", end_section=True)
    for part, s in seconds.items():
        table.add_row(f"{part}, per microbatch", f"{s:.3g} s")
    return table


def _seconds_of(process: ProcessMemory, time: StepTime | None, is_trainer: bool) -> dict[str, float]:
    if time is None:
        return {}
    if not is_trainer:
        name = process.name.removeprefix("anchor ")
        return {"read with gradient": time.remote_s[name]} if name in time.remote_s else {}
    local = {f"read of {name}": s for name, s in time.local_s.items()}
    return {"generator forward": time.forward_s, **local, "generator backward": time.backward_s}


def _wants_gpu(config: Config) -> bool:
    return config.generator.device != "cpu" or any(anchor.gpus > 0 for anchor in config.anchors)
