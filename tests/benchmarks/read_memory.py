"""Peak memory of one read, ours against the baseline loop, above what the process holds before it.

It is what torch's allocator hands out: on the CPU recorded allocation by allocation, on a GPU counted by torch itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from tests.benchmarks import baseline_loop
from tests.benchmarks.bench import N_QUESTIONS, Bench, read_request
from tests.benchmarks.models import ModelSize
from tests.benchmarks.results import Result
from tests.benchmarks.switches import READ_SWITCHES
from tests.benchmarks.timing import ratios, result
from tests.sized_models import peak_bytes


def memory_rows(bench: Bench, label: str, size: ModelSize, at_most: float | None) -> list[Result]:
    """Peak of ours over peak of the loop, and without each optimisation over the peak with all."""
    anchor = bench.anchor(size)
    request = read_request(anchor)
    assert request.latents is not None
    calls: dict[str, Callable[[], object]] = {
        "ours": partial(anchor.read, request),
        "loop": partial(baseline_loop.read, anchor.model, request.latents, request.questions),
    }
    calls |= {name: partial(READ_SWITCHES[name], anchor, request) for name in READ_SWITCHES}
    measure = _cuda_peak_bytes if bench.device == "cuda" else peak_bytes
    peaks: dict[str, list[float]] = {side: [] for side in calls}
    for call in calls.values():
        call()  # what stays for good, such as the constant prefix, is there from now on
    for _ in range(bench.repetitions):
        for side, call in calls.items():
            peaks[side].append(measure(call))
    without = [
        result(
            f"peak memory of a read without {name}, {label}, K_q={N_QUESTIONS}",
            ratios(peaks[name], peaks["ours"]),
            "× the memory with all",
            bench.command,
        )
        for name in READ_SWITCHES
    ]
    return [
        result(
            f"peak memory of a read, ours / baseline loop, {label}, K_q={N_QUESTIONS}",
            ratios(peaks["ours"], peaks["loop"]),
            f"share; ours is {peaks['ours'][0] / 2**20:.0f} MiB",
            bench.command,
            at_most=at_most,
        ),
        *without,
    ]


def _cuda_peak_bytes(call: Callable[[], object]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before
