"""The load benchmark's rows that ask a service run at a tiny size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.benchmarks import serve_load
from tests.benchmarks.serve_process import Served, serving
from tests.serving import local_service, make_run


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    return serve_load.tree_of(make_run(folder), serve_load.write_wordy(folder / "words"))


@pytest.fixture(scope="module")
def served(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served"), tree) as one:
        yield one


def test_overhead(served: Served, tree: dict[str, Any]) -> None:
    direct, ratio = serve_load.overhead_rows(served.url, local_service(tree), serve_load.ANSWERS[0], 1.0, rounds=2)
    assert direct.n == ratio.n == 2
    assert ratio.value > 1
    assert ratio.bar == "≤ 1.25"


@pytest.mark.parametrize("kind", serve_load.ANSWERS)
def test_throughput(served: Served, kind: str) -> None:
    loads = serve_load.loads_over_http(served.url, kind, (1, 4), 0.5)
    rows = serve_load.throughput_rows(loads, kind)
    assert len(rows) == 2 * 4
    assert all(row.value is not None and row.value > 0 for row in rows)
    p50, p95, p99 = (row.value for row in rows[1:4])
    assert p50 <= p95 <= p99


def test_first_tokens(served: Served) -> None:
    new, cached, ratio = serve_load.first_token_rows(served.url, n_images=3)
    assert new.value > 0
    assert cached.value > 0
    assert ratio.low <= ratio.value <= ratio.high


def test_overload_is_refused_and_passes(served: Served) -> None:
    """Far more than there is room for, so that some must be refused."""
    arrivals, answered, refused, recovered = serve_load.overload_rows(served.url, capacity=100.0, duration_s=1.0)
    assert arrivals.value > 1
    assert answered.value > 0
    assert refused.n > 0
    assert "429" in refused.bar
    assert recovered.met


def test_a_soak_survives_a_kill(served: Served) -> None:
    lost, refused, p99, back, memory, slope = serve_load.soak_rows(served, 0.1, kill_every_s=5.0, sample_every_s=0.5)
    assert "1 kills" in lost.figure
    assert lost.met, f"{lost.value} requests lost"
    assert lost.n > 10
    assert refused.value == 0
    assert p99.value > 0
    assert back.value > 0.2, "a replica that is killed is away for a while"
    assert memory.value > 100
    assert slope.n > 2
