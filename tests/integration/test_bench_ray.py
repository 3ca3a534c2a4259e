"""The benchmark's rows that go through Ray run at a tiny size."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.anchor_path_gpu import PARTS, sharing
from tests.benchmarks.bench import Bench
from tests.benchmarks.models import PROPORTIONS_7B, random_weights
from tests.benchmarks.ray_rows import overlap_rows, parallel_rows, remote_rows, transport_rows


@pytest.fixture
def bench(clean_ray: None, tmp_path: Path) -> Bench:
    return Bench(tmp_path, "a test", repetitions=1, tiny=True)


def test_transport(bench: Bench) -> None:
    array, pickled, shared = transport_rows(bench, n_calls=2)
    assert (array.bar, pickled.bar, shared.bar) == ("≤ 4", "–", "–")
    assert min(array.value, pickled.value, shared.value) > 0


def test_remote_against_in_process(bench: Bench) -> None:
    (row,) = remote_rows(bench, "tiny", PROPORTIONS_7B)
    assert row.bar == "≤ 1.05"
    assert row.value > 0


def test_waiting_anchors_wait_side_by_side(bench: Bench) -> None:
    (row,) = parallel_rows(bench, n_anchors=2, latency_s=0.5)
    assert 0.5 < row.value < 1.7


def test_overlap(bench: Bench) -> None:
    overlapped, in_sequence = overlap_rows(bench, side_s=0.8)
    assert 1 < overlapped.value < in_sequence.value
    assert in_sequence.value > 2


def test_two_processes_share_a_device(clean_ray: None, tmp_path: Path) -> None:
    bench = Bench(tmp_path, "a test", 1, dtype="bfloat16", tiny=True, with_weights=False)
    with random_weights():
        rows = sharing(bench)
    assert [(row.figure, row.bar) for row in rows] == list(PARTS["sharing"].figures)
