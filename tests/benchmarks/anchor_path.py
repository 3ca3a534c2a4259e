"""The anchor path on two CPU cores, against the baseline loop and its own arithmetic limit (`make bench`).

Every figure is a ratio measured in this one run. Run it on a machine that does nothing else.

    python -m tests.benchmarks.anchor_path                  # measure everything, write results.json and RESULTS.md
    python -m tests.benchmarks.anchor_path --only reads     # one part of it
    python -m tests.benchmarks.anchor_path --tiny           # try the code out; nothing is written
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.bench import Bench
from tests.benchmarks.models import PROPORTIONS_7B, REAL_VOCABULARY
from tests.benchmarks.plot import draw
from tests.benchmarks.ray_rows import local_ray, overlap_rows, parallel_rows, remote_rows, transport_rows
from tests.benchmarks.read_memory import memory_rows
from tests.benchmarks.read_rows import growth_rows, speed_rows, switch_rows
from tests.benchmarks.results import GROWTH_PNG, Result, record
from tests.benchmarks.step_rows import step_rows

COMMAND = "make bench"
_REPETITIONS = 5
_7B, _REAL = "7B proportions", "real vocabulary"


def reads(bench: Bench) -> list[Result]:
    """The reads of one anchor."""
    return [
        *speed_rows(bench, _7B, PROPORTIONS_7B, 3, at_least=2.2),
        *speed_rows(bench, _7B, PROPORTIONS_7B, 8, at_least=2.7),
        *speed_rows(bench, _REAL, REAL_VOCABULARY, 3, at_least=12.0),
        *switch_rows(bench, _7B, PROPORTIONS_7B),
        *switch_rows(bench, _REAL, REAL_VOCABULARY),
    ]


def steps(bench: Bench) -> list[Result]:
    """Whole training steps."""
    return step_rows(bench, _7B, PROPORTIONS_7B)


def cluster(bench: Bench) -> list[Result]:
    """What runs through Ray."""
    with local_ray():
        return [
            *transport_rows(bench),
            *remote_rows(bench, _7B, PROPORTIONS_7B),
            *overlap_rows(bench),
            *parallel_rows(bench),
        ]


def memory(bench: Bench) -> list[Result]:
    """Peak memory of a read."""
    return [
        *memory_rows(bench, _7B, PROPORTIONS_7B, at_most=0.35),
        *memory_rows(bench, _REAL, REAL_VOCABULARY, at_most=0.35),
    ]


def growth(bench: Bench) -> list[Result]:
    """Read time over sizes, with its picture."""
    rows, panels = growth_rows(bench, _7B, PROPORTIONS_7B)
    draw(panels, bench.root / GROWTH_PNG.name if bench.tiny else GROWTH_PNG)
    return rows


PARTS: dict[str, Callable[[Bench], list[Result]]] = {
    "reads": reads,
    "steps": steps,
    "memory": memory,
    "growth": growth,
    "cluster": cluster,
}


def main() -> None:
    """Measure the parts that are asked for and record them."""
    parser = argparse.ArgumentParser(description="Measure the anchor path on the CPU.")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; may be repeated")
    parser.add_argument("--tiny", action="store_true", help="tiny models, nothing recorded")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), COMMAND, 1 if given.tiny else _REPETITIONS, tiny=given.tiny)
        for name in given.only or PARTS:
            started = time.perf_counter()
            rows = PARTS[name](bench)
            print(f"{name}: {time.perf_counter() - started:.0f} s")
            print_rows(rows)
            if not given.tiny:
                record(rows)


def print_rows(rows: list[Result]) -> None:
    """One line per figure."""
    for row in rows:
        value = "not measured" if row.value is None else f"{row.value:.3g} ({row.low:.3g} – {row.high:.3g})"
        print(f"  {row.figure}: {value} {row.unit}, bar {row.bar}, met {row.met}", flush=True)


if __name__ == "__main__":
    main()
