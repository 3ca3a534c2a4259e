"""Peak memory of one read, ours against the baseline loop, above what the process holds before it.

On the CPU a process of its own measures both sides in turn (`python -m tests.benchmarks.read_memory …`): the kernel's
peak of resident memory, set back before each read, less the resident memory at that moment. The C library is told to
give large blocks back to the system when they are freed, so that no read hides in what an earlier one left. Nothing
is sampled and nothing depends on time. On a GPU, torch counts its allocations itself.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from anchor_service.frozen_anchor import FrozenAnchor
from shared.messages import LatentPositions
from shared.vlm import load_vlm
from tests.benchmarks import baseline_loop
from tests.benchmarks.bench import N_LATENTS, N_QUESTIONS, Bench, read_request
from tests.benchmarks.models import ModelSize
from tests.benchmarks.results import Result
from tests.benchmarks.timing import ratios, result

_REPOSITORY = Path(__file__).parents[2]
_M_MMAP_THRESHOLD = -3  # glibc, malloc.h
_LARGE_BLOCK_BYTES = 64 * 1024


def memory_rows(bench: Bench, label: str, size: ModelSize, at_most: float | None) -> list[Result]:
    """Peak of ours over peak of the loop."""
    if bench.device == "cuda":
        anchor = bench.anchor(size)
        calls = _calls(anchor)
        peaks = {side: [_cuda_peak(call) for _ in range(bench.repetitions)] for side, call in calls.items()}
    else:
        peaks = _peaks_of_process(bench.folder(size), bench.repetitions)
    mib = peaks["ours"][0] / 2**20
    return [
        result(
            f"peak memory of a read, ours / baseline loop, {label}, K_q={N_QUESTIONS}",
            ratios(peaks["ours"], peaks["loop"]),
            f"share; ours is {mib:.0f} MiB",
            bench.command,
            at_most=at_most,
        )
    ]


def resident_peaks(folder: str, repetitions: int) -> dict[str, list[float]]:
    """Bytes that each read adds to this process at its peak, by side."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)
    calls = _calls(FrozenAnchor("anchor", load_vlm(folder).freeze(), N_LATENTS, LatentPositions.TEXT))
    peaks: dict[str, list[float]] = {side: [] for side in calls}
    for call in calls.values():
        call()  # what stays for good (thread pools, the constant prefix) is there from now on
    for _ in range(repetitions):
        for side, call in calls.items():
            gc.collect()
            libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = _status_bytes("VmRSS")
            call()
            peaks[side].append(_status_bytes("VmHWM") - before)
    return peaks


def _peaks_of_process(folder: Path, repetitions: int) -> dict[str, list[float]]:
    arguments = [sys.executable, "-m", "tests.benchmarks.read_memory", str(folder), str(repetitions)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(arguments, env=environment, cwd=_REPOSITORY, capture_output=True, text=True, check=True)
    return dict(json.loads(run.stdout.splitlines()[-1]))


def _cuda_peak(call: Callable[[], object]) -> float:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return float(torch.cuda.max_memory_allocated() - before)


def _calls(anchor: FrozenAnchor) -> dict[str, Callable[[], object]]:
    request = read_request(anchor)
    assert request.latents is not None
    return {
        "ours": partial(anchor.read, request),
        "loop": partial(baseline_loop.read, anchor.model, request.latents, request.questions),
    }


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; memory on the CPU is measured on Linux alone")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("repetitions", type=int)
    given = parser.parse_args()
    print(json.dumps(resident_peaks(given.folder, given.repetitions)))
