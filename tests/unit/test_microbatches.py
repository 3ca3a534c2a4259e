"""The number of microbatches: fixed, or the fastest of those that were tried."""

from __future__ import annotations

from trainer.microbatches import Microbatches


def run(microbatches: Microbatches, seconds: dict[int, float], n_steps: int, first: int = 0) -> list[int]:
    """Takes steps of given lengths; the first step of a new shape takes ten times as long."""
    counts, seen = [], set()
    for step in range(first, n_steps):
        n = microbatches.count(step)
        microbatches.record(step, seconds[n] * (1 if n in seen else 10))
        seen.add(n)
        counts.append(n)
    return counts


def test_a_number_stays() -> None:
    assert run(Microbatches(4, 8, has_remote=True), {4: 1.0}, 10) == [4] * 10


def test_auto_without_remote_anchors_is_one() -> None:
    assert run(Microbatches("auto", 8, has_remote=False), {1: 1.0}, 10) == [1] * 10


def test_auto_tries_every_divisor_and_keeps_the_fastest() -> None:
    seconds = {1: 1.0, 2: 0.8, 3: 0.5, 4: 0.6, 6: 0.7, 12: 0.9}
    counts = run(Microbatches("auto", 12, has_remote=True), seconds, 25)
    assert counts == [n for n in (1, 2, 3, 4, 6, 12) for _ in range(3)] + [3] * 7


def test_large_batches_try_no_more_than_sixteen() -> None:
    assert Microbatches("auto", 96, has_remote=True).candidates == [1, 2, 3, 4, 6, 8, 12, 16]


def test_a_resumed_run_chooses_as_an_uninterrupted_one() -> None:
    seconds = {1: 1.0, 2: 0.4, 4: 0.6}
    whole = run(Microbatches("auto", 4, has_remote=True), seconds, 15)
    for stop in (1, 4, 8, 9, 12):
        before, after = Microbatches("auto", 4, has_remote=True), Microbatches("auto", 4, has_remote=True)
        counts = run(before, seconds, stop)
        after.load_state(before.state())
        assert counts + run(after, seconds, 15, first=stop) == whole
