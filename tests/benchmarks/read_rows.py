"""Reads of one anchor in one process: against the baseline loop, without each optimisation, and over sizes.

Legend: B images, K latents, D width, K_q questions per image.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial

import numpy as np

from anchor_service.frozen_anchor import FrozenAnchor
from shared.flops import decoder_size
from shared.messages import LatentPositions
from tests.benchmarks import baseline_loop
from tests.benchmarks.bench import N_IMAGES, N_LATENTS, N_QUESTIONS, Bench, read_request
from tests.benchmarks.models import ModelSize
from tests.benchmarks.plot import Panel
from tests.benchmarks.read_flops import loop_read_flops, packed_read_flops
from tests.benchmarks.results import Result
from tests.benchmarks.switches import READ_SWITCHES
from tests.benchmarks.timing import interleaved, ratios, result

N_QUESTIONS_GROWTH = (1, 2, 4, 8, 16)
N_LATENTS_GROWTH = (4, 9, 16, 36, 64, 144)
N_IMAGES_GROWTH = (1, 2, 4, 8, 16, 32, 64)


def speed_rows(bench: Bench, label: str, size: ModelSize, n_questions: int, at_least: float | None) -> list[Result]:
    """Ours against the baseline loop: speed-up, its share of the speed-up by count, agreement of the gradients."""
    anchor = bench.anchor(size)
    request = read_request(anchor, n_questions)
    assert request.latents is not None
    sides = {
        "ours": partial(anchor.read, request),
        "loop": partial(baseline_loop.read, anchor.model, request.latents, request.questions),
    }
    seconds = interleaved(sides, bench.repetitions)
    speedups = ratios(seconds["loop"], seconds["ours"])
    shape = (decoder_size(anchor.model.hf_model.config), N_IMAGES, N_LATENTS, n_questions)
    by_count = loop_read_flops(*shape) / packed_read_flops(*shape)
    figure = f"anchor read against the baseline loop, {label}, K_q={n_questions}"
    unit = f"× faster; ours takes {1e3 * statistics.median(seconds['ours']):.0f} ms"
    shares = [speedup / by_count for speedup in speedups]
    error_limit = 1e-5 if bench.dtype == "float32" else None
    return [
        result(figure, speedups, unit, bench.command, at_least=at_least),
        result(
            f"{figure}: measured / by FLOP count",
            shares,
            f"share; by count {by_count:.2f}×",
            bench.command,
            at_least=0.9,
        ),
        result(
            f"{figure}: largest difference of ∂NLL/∂h",
            [_gradient_error(anchor, n_questions)],
            "relative to the largest entry",
            bench.command,
            at_most=error_limit,
        ),
    ]


def switch_rows(bench: Bench, label: str, size: ModelSize) -> list[Result]:
    """What each optimisation of a read alone brings: time without it over time with all."""
    anchor = bench.anchor(size)
    request = read_request(anchor)
    sides: dict[str, Callable[[], object]] = {"all": partial(anchor.read, request)}
    sides |= {name: partial(read, anchor, request) for name, read in READ_SWITCHES.items()}
    seconds = interleaved(sides, bench.repetitions)
    return [
        result(
            f"anchor read without {name}, {label}, K_q={N_QUESTIONS}",
            ratios(seconds[name], seconds["all"]),
            "× the time with all",
            bench.command,
        )
        for name in READ_SWITCHES
    ]


def growth_rows(bench: Bench, label: str, size: ModelSize) -> tuple[list[Result], list[Panel]]:
    """Read time over K_q, K and B: exponent of time against FLOPs, and the curves."""
    anchor = bench.anchor(size)
    counts = decoder_size(anchor.model.hf_model.config)
    axes: dict[str, list[tuple[int, int, int]]] = {
        "K_q, questions per image": [(N_IMAGES, N_LATENTS, n) for n in N_QUESTIONS_GROWTH],
        "K, latents per image": [(N_IMAGES, n, N_QUESTIONS) for n in N_LATENTS_GROWTH],
        "B, images": [(n, N_LATENTS, N_QUESTIONS) for n in N_IMAGES_GROWTH],
    }
    rows, panels = [], []
    for place, (axis, shapes) in zip((2, 1, 0), axes.items(), strict=True):
        seconds = interleaved({str(i): _read_of(anchor, shape) for i, shape in enumerate(shapes)}, bench.repetitions)
        times = np.array(list(seconds.values()))
        flops = np.array([packed_read_flops(counts, *shape) for shape in shapes])
        slopes = np.polyfit(np.log(flops), np.log(times), 1)[0].tolist()
        values = [shape[place] for shape in shapes]
        growth = f"{flops[-1] / flops[0]:.0f}× the FLOPs"
        rows.append(
            result(
                f"growth of read time with {axis}, {values[0]} … {values[-1]}, {label}",
                slopes,
                f"exponent of time against FLOPs ({growth})",
                bench.command,
            )
        )
        # The count's line goes through the largest read, where fixed costs weigh least.
        medians = np.median(times, axis=1)
        panels.append(Panel(axis, values, medians.tolist(), (flops * medians[-1] / flops[-1]).tolist()))
    return rows, panels


def _read_of(anchor: FrozenAnchor, shape: tuple[int, int, int]) -> Callable[[], object]:
    n_images, n_latents, n_questions = shape
    sized = FrozenAnchor(anchor.name, anchor.model, n_latents, LatentPositions.TEXT)
    return partial(sized.read, read_request(anchor, n_questions, n_images, n_latents))


def _gradient_error(anchor: FrozenAnchor, n_questions: int) -> float:
    request = read_request(anchor, n_questions)
    ours = anchor.read(request).latents_grad
    assert request.latents is not None
    assert ours is not None
    _, loop_BKD = baseline_loop.read(anchor.model, request.latents, request.questions)
    # Ours is the gradient of each image's NLL, the loop's that of their mean.
    difference_BKD = ours.float() / N_IMAGES - loop_BKD.float()
    error = float(difference_BKD.abs().max() / loop_BKD.float().abs().max())
    assert math.isfinite(error)
    return error
