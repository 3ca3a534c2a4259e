"""The anchor path on a GPU with random Qwen2.5-VL-7B models in bfloat16 (`make bench-gpu`); nothing is downloaded.

    python -m tests.benchmarks.anchor_path_gpu                        # needs a CUDA GPU; step rows take about 100 GB
    python -m tests.benchmarks.anchor_path_gpu --device cpu --tiny    # try the code out; nothing is written

What the machine cannot measure is recorded as not measured, never guessed.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from anchor_service.actor import AnchorActor
from anchor_service.pool import AnchorPool
from shared.config import load_config
from shared.errors import AnchorCallError
from shared.flops import decoder_size
from shared.vlm import vlm_config
from shared.vlm.generator import Generator
from tests.benchmarks.anchor_path import print_rows
from tests.benchmarks.bench import N_IMAGES, N_LATENTS, N_QUESTIONS, Bench, read_request
from tests.benchmarks.models import QWEN_7B, random_weights
from tests.benchmarks.ray_rows import generator_side, local_ray, pool_request
from tests.benchmarks.read_flops import generator_flops, packed_read_flops, packed_tokens
from tests.benchmarks.read_memory import memory_rows
from tests.benchmarks.read_rows import speed_rows, switch_rows
from tests.benchmarks.results import Result, record, record_unmeasured
from tests.benchmarks.runs import make_records, open_trainer, run_config
from tests.benchmarks.step_rows import IMAGE_PX, TINY_IMAGE_PX, step_rows
from tests.benchmarks.switches import READ_SWITCHES, STEP_SWITCHES
from tests.benchmarks.timing import interleaved, ratios, result
from trainer.image_features import ImageFeatures

COMMAND = "make bench-gpu"
NEEDS_GPU = "make bench-gpu needs a CUDA GPU and there is none: its figures are recorded as not measured"
_REPETITIONS = 7
_7B = "7B in bfloat16"
_A6000 = Path("deploy/configs/a6000.yaml")
_CLEVR_PX, _LONG_QUESTION_TOKENS = (480, 320), 40
GIB = 2**30


def reads(bench: Bench) -> list[Result]:
    """Reads against the baseline loop, and without each optimisation."""
    return [
        *speed_rows(bench, _7B, QWEN_7B, 3, at_least=2.2),
        *speed_rows(bench, _7B, QWEN_7B, 8, at_least=2.7),
        *switch_rows(bench, _7B, QWEN_7B),
    ]


def memory(bench: Bench) -> list[Result]:
    """Peak memory of a read."""
    return memory_rows(bench, _7B, QWEN_7B, at_most=0.35)


def steps(bench: Bench) -> list[Result]:
    """Whole training steps."""
    return step_rows(bench, _7B, QWEN_7B)


def throughput(bench: Bench) -> list[Result]:
    """Tokens per second, and what share of the card's measured matrix-multiply peak the useful operations are."""
    rows = []
    for n_images, at_least in ((N_IMAGES, 0.45), (8 * N_IMAGES, None)):
        anchor = bench.anchor(QWEN_7B)
        request = read_request(anchor, n_images=n_images)
        counts = decoder_size(anchor.model.hf_model.config)
        flops = packed_read_flops(counts, n_images, N_LATENTS, N_QUESTIONS)
        n_tokens = n_images * packed_tokens(N_LATENTS, N_QUESTIONS)
        call = partial(anchor.read, request)
        rows += _throughput(bench, f"anchor read, B={n_images}", call, flops, n_tokens, at_least)
        del anchor, call
        _free()
    return rows + _generator_throughput(bench)


def a6000(bench: Bench) -> list[Result]:
    """Peak memory of a training run of the config for one 48 GB card, at CLEVR's image size."""
    model = bench.folder(QWEN_7B)
    overrides = [f"generator.model={model}", f"anchors.0.model={model}", f"generator.device={bench.device}"]
    config = load_config(_A6000, overrides)
    image_px = TINY_IMAGE_PX if bench.tiny else _CLEVR_PX
    n_questions = config.data.questions_per_image
    n_images = 2 * config.train.batch_images
    records = make_records(bench.root / "a6000", n_images, image_px, n_questions, _LONG_QUESTION_TOKENS)
    with open_trainer(config, records) as trainer:
        for step in range(3):
            trainer.step(step)
        peak = torch.cuda.max_memory_reserved() if bench.device == "cuda" else _resident_peak()
    unit = f"GiB reserved; questions of {_LONG_QUESTION_TOKENS} tokens"
    return [result(f"{_A6000}: peak memory of training", [peak / GIB], unit, bench.command, at_most=44.0)]


def sharing(bench: Bench) -> list[Result]:
    """Two anchors as processes on one card, their reads under way together, against one after the other in process."""
    fields = [bench.anchor_fields(name, QWEN_7B, seed) for seed, name in enumerate(("A", "B"))]
    model = str(fields[0]["model"])
    share = {"placement": "ray", "cpus": 1, "gpus": 0.5 if bench.device == "cuda" else 0}
    remote, local = (
        run_config({"model": model, "dtype": bench.dtype}, [{**anchor, **more} for anchor in fields])
        for more in (share, {"placement": "local"})
    )
    request = pool_request(model, bench.dtype)
    with (
        mock.patch("anchor_service.ray_handle.AnchorActor", _RandomActor),
        AnchorPool.start(remote, generator_side(remote)) as processes,
        AnchorPool.start(local, generator_side(local)) as in_turn,
    ):
        sides = {
            name: partial(pool.read, dict.fromkeys(pool.names, request))
            for name, pool in (("processes", processes), ("in turn", in_turn))
        }
        seconds = interleaved(sides, bench.repetitions)
    return [
        result(
            "two anchors sharing one card as processes, through the object store",
            ratios(seconds["processes"], seconds["in turn"]),
            "× the time of both in one process, in turn",
            bench.command,
        )
    ]


def sharing_with_ray(bench: Bench) -> list[Result]:
    """`sharing` in a Ray of its own."""
    with local_ray():
        return sharing(bench)


@dataclass(frozen=True, slots=True)
class Part:
    """Rows that are measured together; figures and bars of them stand here for machines that cannot."""

    run: Callable[[Bench], list[Result]]
    figures: tuple[tuple[str, str], ...]


def _speed_figures(n_questions: int, bar: str) -> tuple[tuple[str, str], ...]:
    figure = f"anchor read against the baseline loop, {_7B}, K_q={n_questions}"
    return (
        (figure, bar),
        (f"{figure}: measured / by FLOP count", "≥ 0.9"),
        (f"{figure}: largest difference of ∂NLL/∂h", "–"),
    )


def _throughput_figures(what: str, bar: str) -> tuple[tuple[str, str], ...]:
    return ((f"{what}, {_7B}: tokens", "–"), (f"{what}, {_7B}: share of the measured matrix-multiply peak", bar))


PARTS: dict[str, Part] = {
    "reads": Part(
        reads,
        (
            *_speed_figures(3, "≥ 2.2"),
            *_speed_figures(8, "≥ 2.7"),
            *((f"anchor read without {name}, {_7B}, K_q={N_QUESTIONS}", "–") for name in READ_SWITCHES),
        ),
    ),
    "memory": Part(
        memory,
        (
            (f"peak memory of a read, ours / baseline loop, {_7B}, K_q={N_QUESTIONS}", "≤ 0.35"),
            *((f"peak memory of a read without {name}, {_7B}, K_q={N_QUESTIONS}", "–") for name in READ_SWITCHES),
        ),
    ),
    "steps": Part(
        steps,
        (
            *(
                (f"training step against the baseline loop, R=2, {_7B}, {what}", bar)
                for what, bar in (
                    ("checkpointing on both sides", "≥ 1.5"),
                    ("checkpointing on neither side", "≥ 1.5"),
                    ("each side by its defaults", "≥ 1.8"),
                )
            ),
            *((f"training step without {name}, R=2, {_7B}", "–") for name in STEP_SWITCHES),
        ),
    ),
    "throughput": Part(
        throughput,
        (
            *_throughput_figures(f"anchor read, B={N_IMAGES}", "≥ 0.45"),
            *_throughput_figures(f"anchor read, B={8 * N_IMAGES}", "–"),
            *_throughput_figures(f"generator pass, B={N_IMAGES}", "–"),
        ),
    ),
    "a6000": Part(a6000, ((f"{_A6000}: peak memory of training", "≤ 44"),)),
    "sharing": Part(sharing_with_ray, (("two anchors sharing one card as processes, through the object store", "–"),)),
}


class _RandomActor(AnchorActor):
    """An anchor whose weights are made in its own process."""

    def __init__(self, *arguments: Any):
        with random_weights():
            super().__init__(*arguments)


def _generator_throughput(bench: Bench) -> list[Result]:
    model = bench.folder(QWEN_7B)
    base = {"name": "base", "model": str(model), "placement": "shared_base"}
    fields = {"model": str(model), "latents": N_LATENTS, "dtype": bench.dtype, "device": bench.device}
    config = run_config(fields, [base])
    generator = Generator(config.generator, seed=0)
    records = make_records(bench.root / "generator", N_IMAGES, TINY_IMAGE_PX if bench.tiny else IMAGE_PX, 1)
    tokens = ImageFeatures(generator, None).of_records(records)
    prompt = generator.model.prompt
    n_tokens = len(prompt.prefix_ids) + len(tokens.tokens[0]) + len(prompt.after_image_ids) + 1 + N_LATENTS
    flops = generator_flops(decoder_size(vlm_config(str(model))), N_IMAGES, n_tokens, config.generator.lora.rank)

    def forward_and_backward() -> None:
        torch.autograd.grad(generator.emit(tokens).float().square().sum(), generator.parameters())

    return _throughput(bench, f"generator pass, B={N_IMAGES}", forward_and_backward, flops, N_IMAGES * n_tokens, None)


def _throughput(
    bench: Bench, what: str, call: Callable[[], object], flops: int, n_tokens: int, at_least: float | None
) -> list[Result]:
    n = 256 if bench.tiny else 8192
    factor = torch.randn(n, n, device=bench.device, dtype=torch.bfloat16)
    seconds = interleaved({"call": call, "product": lambda: factor @ factor}, bench.repetitions, warmups=3)
    # The peak is the fastest product: what the card can do, not what it does on average.
    peak = 2 * n**3 / min(seconds["product"])
    rates = [n_tokens / s for s in seconds["call"]]
    shares = [flops / s / peak for s in seconds["call"]]
    ms = 1e3 * statistics.median(seconds["call"])
    return [
        result(f"{what}, {_7B}: tokens", rates, "per second, forward and backward", bench.command),
        result(
            f"{what}, {_7B}: share of the measured matrix-multiply peak",
            shares,
            f"share of {peak / 1e12:.0f} TFLOP/s; {ms:.0f} ms",
            bench.command,
            at_least=at_least,
        ),
    ]


def _resident_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def unmeasured(part: Part) -> list[Result]:
    """The part's figures without values."""
    return [Result(figure, None, "–", bar, None, None, None, 0, COMMAND) for figure, bar in part.figures]


def main() -> None:
    """Measure the parts that are asked for and record them."""
    parser = argparse.ArgumentParser(description="Measure the anchor path on a GPU.")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; may be repeated")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, nothing recorded")
    given = parser.parse_args()
    if given.device == "cpu" and not given.tiny:
        parser.error("--device cpu goes with --tiny: a 7B on the CPU is no figure of this benchmark")
    names = given.only or list(PARTS)
    if given.device == "cuda" and not torch.cuda.is_available():
        print(NEEDS_GPU)
        for name in names:
            record_unmeasured(unmeasured(PARTS[name]))
        return
    for name in names:
        rows = run_part(PARTS[name], given.device, given.tiny)
        print(name)
        print_rows(rows)
        if not given.tiny:
            measured = [row for row in rows if row.value is not None]
            record(measured)
            record_unmeasured(row for row in rows if row.value is None)


def run_part(part: Part, device: str, tiny: bool) -> list[Result]:
    """A part's rows; without values where the card's memory does not suffice."""
    with tempfile.TemporaryDirectory() as folder, random_weights():
        repetitions = 1 if tiny else _REPETITIONS
        bench = Bench(Path(folder), COMMAND, repetitions, device, "bfloat16", tiny, with_weights=False)
        try:
            return part.run(bench)
        except (torch.OutOfMemoryError, AnchorCallError) as error:
            if not isinstance(error.__cause__ or error, torch.OutOfMemoryError):
                raise
            print("out of GPU memory; recorded as not measured")
            return unmeasured(part)
        finally:
            _free()


if __name__ == "__main__":
    main()
