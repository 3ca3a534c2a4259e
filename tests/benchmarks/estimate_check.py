"""What `estimate` predicts against what one training step of the same config really takes, on this CPU.

    python -m tests.benchmarks.estimate_check

A step is what the trainer does for one microbatch: tower, generator, the read of an anchor, backward. Seconds are
those of the processor, with one thread, so that other work on the machine disturbs little. Memory is what the
allocator handed out at the peak, above the weights.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from anchor_service.frozen_anchor import FrozenAnchor
from shared.config import Config, parse_config
from shared.flops import forward_flops, input_gradient_flops
from shared.messages import Gradient, LatentPositions, ReadRequest
from shared.vlm import load_vlm
from shared.vlm.generator import Generator
from tests.benchmarks.results import Result, record
from tests.sized_models import peak_bytes, sized_config, write_sized
from trainer.estimate.devices import this_cpu
from trainer.estimate.memory import activation_bytes, read_bytes
from trainer.estimate.models import model_facts
from trainer.estimate.rows import anchor_rows, generator_rows, typical_questions
from trainer.estimate.step_time import generator_seconds, read_seconds
from trainer.toy.world import IMAGE_PX

COMMAND = "python -m tests.benchmarks.estimate_check"
MEMORY_BAR, TIME_BAR = 0.10, 0.25
SHAPES = {
    "width 512, 8 layers": {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1408},
    "width 1024, 4 layers": {"hidden_size": 1024, "num_hidden_layers": 4, "intermediate_size": 2816},
    "width 256, 6 layers": {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 704},
}
_MORE = {"vocab_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 4}
_REPETITIONS = 7
GPU_FIGURES = ("predicted over measured memory on a GPU", "predicted over measured seconds of a step on a GPU")


@dataclass(frozen=True, slots=True)
class Check:
    """Predictions for one call, and the call."""

    name: str
    n_bytes: int
    seconds: float
    flops: int
    call: Callable[[], object]


def config_for(folder: str, checkpointing: bool) -> Config:
    """A run on the toy world's questions with this model on both sides."""
    return parse_config(
        {
            "run": {"dir": "unused"},
            "generator": {
                "model": folder,
                "latents": 16,
                "device": "cpu",
                "cpus": 1,
                "gradient_checkpointing": checkpointing,
                "lora": {"rank": 16, "alpha": 32},
            },
            "anchors": [{"name": "anchor", "model": folder}],
            "data": {"source": "toy", "path": "unused", "questions_per_image": 8},
            "train": {"batch_images": 8},
        },
        COMMAND,
    )


def generator_check(folder: str, checkpointing: bool) -> Check:
    """Tower, forward and backward of one microbatch."""
    config = config_for(folder, checkpointing)
    facts = model_facts(folder, (IMAGE_PX, IMAGE_PX))
    rows, lora = generator_rows(config, facts), config.generator.lora
    generator = Generator(config.generator, seed=0)
    generator.train()
    inputs = generator.model.image_inputs([Image.new("RGB", (IMAGE_PX, IMAGE_PX), (200, 60, 60))] * rows.n_rows)
    size = (facts.decoder, rows.n_rows, rows.n_tokens, rows.n_keys)
    return Check(
        f"generator, checkpointing {'on' if checkpointing else 'off'}",
        activation_bytes(facts, rows, "float32", lora, checkpointing),
        sum(generator_seconds(config, facts, this_cpu("float32", 1))),
        forward_flops(*size) * (2 if checkpointing else 1) + input_gradient_flops(*size),
        lambda: generator.emit(generator.image_tokens_from(inputs)).sum().backward(),
    )


def anchor_check(folder: str) -> Check:
    """One read with gradient."""
    config = config_for(folder, False)
    facts = model_facts(folder, (IMAGE_PX, IMAGE_PX))
    questions = typical_questions(config)
    rows = anchor_rows(config, facts, questions, 1)
    anchor = FrozenAnchor("anchor", load_vlm(folder).freeze(), 16, LatentPositions.TEXT)
    latents_BKD = torch.randn(rows.n_rows, 16, facts.decoder.width)
    request = ReadRequest(request_id="r0", questions=questions, latents=latents_BKD, gradient=Gradient.FUSED)
    size = (facts.decoder, rows.n_rows, rows.n_tokens, rows.n_keys, rows.n_predictions)
    return Check(
        "anchor's read",
        sum(read_bytes(facts, rows, "float32").values()),
        read_seconds(facts, rows, "float32", this_cpu("float32", 1)),
        forward_flops(*size) + input_gradient_flops(*size),
        lambda: anchor.read(request),
    )


def results_of(shape: str, check: Check) -> list[Result]:
    """Measure one call and compare."""
    check.call()  # caches fill; gradients exist from here on, as from the second microbatch
    memory = check.n_bytes / peak_bytes(check.call)
    seconds = []
    for _ in range(_REPETITIONS):
        started = time.process_time()
        check.call()
        seconds.append(time.process_time() - started)
    measured = statistics.median(seconds)
    ratio, peak = check.seconds / measured, this_cpu("float32", 1).peak["float32"]
    label, bars = f"{shape}: {check.name}", (f"within {MEMORY_BAR:.0%}", f"within {TIME_BAR:.0%}")
    met = abs(memory - 1) <= MEMORY_BAR, abs(ratio - 1) <= TIME_BAR
    low, high = check.seconds / max(seconds), check.seconds / min(seconds)
    share = check.flops / measured / peak
    return [
        Result(f"{label}, predicted over measured memory", memory, "ratio", bars[0], met[0], None, None, 1, COMMAND),
        Result(
            f"{label}, predicted over measured seconds",
            ratio,
            "ratio; range over repetitions",
            bars[1],
            met[1],
            low,
            high,
            _REPETITIONS,
            COMMAND,
        ),
        Result(f"{label}, share of a matrix product's peak", share, "share", "–", None, None, None, 1, COMMAND),
    ]


def main() -> None:
    """Check every shape and record it."""
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as root:
        for shape, text in SHAPES.items():
            folder = Path(root) / shape
            path = write_sized(folder, sized_config("qwen2_5_vl", folder, **text, **_MORE))
            for check in (generator_check(path, False), generator_check(path, True), anchor_check(path)):
                results += results_of(shape, check)
    for result in results:
        print(f"{result.figure}: {result.value:.3f} ({result.bar})")
    unmeasured = [Result(f, None, "ratio", "–", None, None, None, 0, "a machine with a GPU") for f in GPU_FIGURES]
    record([*results, *unmeasured])


if __name__ == "__main__":
    main()
