"""Times that can be compared: every side runs in every repetition, in turn, and ratios are taken within one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from tests.benchmarks.results import Result

Sides = Mapping[str, Callable[[], object]]


def interleaved(sides: Sides, repetitions: int, warmups: int = 1) -> dict[str, list[float]]:
    """Seconds of each side in each repetition, after rounds that do not count.

    The order turns round with every repetition, so that a machine that warms up or slows down favours no side.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(-warmups, repetitions):
        names = list(sides) if repetition % 2 == 0 else list(reversed(sides))
        for name in names:
            taken = seconds_of(sides[name])
            if repetition >= 0:
                seconds[name].append(taken)
    return seconds


def seconds_of(call: Callable[[], object]) -> float:
    """Wall time of one call, work that it left on a GPU included."""
    _synchronize()
    started = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - started


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """The ratio of each repetition."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def result(
    figure: str,
    values: Sequence[float],
    unit: str,
    command: str,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Result:
    """A figure as median with minimum and maximum; the median must keep the bar, if there is one."""
    value = statistics.median(values)
    bar, met = "–", None
    if at_least is not None:
        bar, met = f"≥ {at_least:g}", value >= at_least
    if at_most is not None:
        bar, met = f"≤ {at_most:g}", value <= at_most
    spread = f"{unit}; median, min and max of {len(values)}"
    return Result(figure, value, spread, bar, met, min(values), max(values), len(values), command)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
