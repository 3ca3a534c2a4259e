"""The load benchmark's clients and what it measures without a service, at a tiny size."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from tests.benchmarks import serve_load
from tests.benchmarks.serve_client import Load, closed_loop, open_loop
from tests.serving import local_service, make_run

ANSWER_S = 0.02


async def answered(number: int) -> int:
    """A service with room for everybody."""
    await asyncio.sleep(ANSWER_S)
    return 200 if number % 3 else 429


def test_clients_of_a_closed_loop_wait_for_their_answers() -> None:
    load = asyncio.run(closed_loop(answered, 4, 0.4))
    n = sum(load.statuses.values())
    assert 4 <= n <= 4 * (0.4 / ANSWER_S + 1), "none asks before it is answered"
    assert len(load.seconds) == load.statuses[200]
    assert len(load.refused_s) == load.statuses[429] == len(range(0, n, 3))
    assert load.percentile_ms(50) >= 1e3 * ANSWER_S
    assert load.n_lost == 0


def test_arrivals_of_an_open_loop_wait_for_nobody_and_are_bounded() -> None:
    async def never_quick(number: int) -> int:
        await asyncio.sleep(0.5)
        return 0

    started = time.perf_counter()
    load, per_second = asyncio.run(open_loop(never_quick, 200, 0.25, most=1000))
    assert load.n_lost == 50, "all have come, though none was answered while they came"
    assert 0.7 < time.perf_counter() - started < 10
    assert 20 < per_second < 210
    load, _ = asyncio.run(open_loop(answered, 1000, 60, most=30))
    assert sum(load.statuses.values()) == 30


def test_latents_cost_memory_and_the_question_alone_costs_none_of_it(tmp_path: Path) -> None:
    rows = serve_load.latents_rows(serve_load.write_wordy(tmp_path / "words"), repetitions=2)
    by_name = {row.figure: row for row in rows}
    assert len(rows) == 4 * len(serve_load.LATENTS)
    kib = [by_name[f"service, K = {k}: keys and values when the answer begins"].value for k in serve_load.LATENTS]
    # Layers × (keys and values) × width × bytes of the toy model.
    assert [one - kib[0] for one in kib] == [k * 3 * 2 * 64 * 4 / 1024 for k in serve_load.LATENTS]
    for k in serve_load.LATENTS:
        written = by_name[f"service, K = {k}: latents of an image written"].value
        assert (written == 0) == (k == 0)
        assert by_name[f"service, K = {k}: first token on the engine"].value > 0


def test_the_engine_called_directly_and_ratios(tmp_path: Path) -> None:
    service = local_service(serve_load.tree_of(make_run(tmp_path), serve_load.write_wordy(tmp_path / "words")))
    one_word, words = (serve_load.direct_load(service, kind, 0.3).percentile_ms(50) for kind in serve_load.ANSWERS)
    assert words > 3 * one_word
    row = serve_load.batching_row(serve_load.ANSWERS[1], Load(1.0, [1.0] * 30), Load(2.0, [1.0] * 20))
    assert (row.value, row.bar, row.met) == (3.0, "≥ 3", True)
