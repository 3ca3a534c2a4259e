"""Curricula: schedules against numbers worked out by hand, what is asked when, and what is logged."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from shared.config import CurriculumConfig
from trainer.data.curriculum import Curriculum, level_weights, progress, several_kinds_first
from trainer.data.records import ImageFile, KindQuestion, Record
from trainer.data.sampling import Sampler

ORDER = (("attribute",), ("exist", "count"), ("relate",))


def record(n: int, *kinds: str) -> Record:
    questions = tuple(KindQuestion(kind, f"{n}.{place}?", "yes") for place, kind in enumerate(kinds))
    return Record(f"r{n}", "test", (ImageFile(Path(f"{n}.png")),), questions)


def curriculum(schedule: str, steps: int = 100, **more: object) -> Curriculum:
    return Curriculum(CurriculumConfig.model_validate({"schedule": schedule, "steps": steps, "order": ORDER, **more}))


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        ("none", {0: 1, 50: 1, 200: 1}),
        ("linear", {0: 0, 25: 0.25, 50: 0.5, 100: 1, 200: 1}),
        ("cosine", {0: 0, 25: (1 - 0.5**0.5) / 2, 50: 0.5, 75: (1 + 0.5**0.5) / 2, 100: 1, 200: 1}),
        ("steps", {0: 0, 49: 0, 50: 0.5, 99: 0.5, 100: 1, 200: 1}),
    ],
)
def test_schedules(schedule: str, at: dict[int, float]) -> None:
    assert [progress(schedule, step, 100, 3) for step in at] == pytest.approx(list(at.values()))


def test_levels_come_in_one_after_the_other() -> None:
    assert level_weights(0.0, 3) == [1, 0, 0]
    assert level_weights(0.25, 3) == [1, 0.5, 0]
    assert level_weights(0.5, 3) == [1, 1, 0]
    assert level_weights(0.75, 3) == [1, 1, 0.5]
    assert level_weights(1.0, 3) == [1, 1, 1]
    assert level_weights(0.3, 1) == [1]
    assert progress("steps", 3, 10, 1) == 0


@pytest.mark.parametrize(("step", "shares"), [(35, [1, 0.7, 0.7, 0, 0]), (80, [1, 1, 1, 0.6, 0.6])])
def test_questions_pass_as_often_as_their_weight_says(step: int, shares: list[float]) -> None:
    many = record(0, *("attribute", "exist", "count", "relate", "unheard_of") * 4000)
    passed = curriculum("linear").let_through(many, step, np.random.default_rng(0))
    assert [np.mean(passed[kind::5]) for kind in range(5)] == pytest.approx(shares, abs=0.03)  # σ < 0.008


def test_an_image_without_an_open_question_is_asked_its_simplest() -> None:
    rng = np.random.default_rng(0)
    assert curriculum("steps").let_through(record(0, "relate", "count", "exist"), 0, rng) == [False, True, True]


def test_several_kinds_first() -> None:
    asked = record(0, "a", "a", "b", "a", "c", "b").questions
    assert several_kinds_first(asked) == [asked[i] for i in (0, 2, 4, 1, 5, 3)]
    assert several_kinds_first([]) == []


def test_the_sampler_asks_what_is_open_and_in_the_end_what_it_asks_without() -> None:
    records = [record(n, "attribute", "attribute", "exist", "count", "relate", "relate") for n in range(12)]
    plain = Sampler(records, 4, 3, seed=5)
    rising = Sampler(records, 4, 3, seed=5, curriculum=curriculum("steps", steps=10))
    kinds = lambda step: {q.kind for asked in rising.batch(step).questions for q in asked}  # noqa: E731
    assert all(kinds(step) == {"attribute"} for step in range(5))
    assert set.union(*(kinds(step) for step in range(5, 10))) == {"attribute", "exist", "count"}
    for step in range(10):
        assert rising.batch(step).records == plain.batch(step).records
    for step in range(10, 20):
        assert rising.batch(step) == plain.batch(step)


def test_weights_and_shares_are_logged() -> None:
    records = [record(n, "attribute", "exist", "relate", "relate") for n in range(8)]
    sampler = Sampler(records, 8, 4, seed=0, curriculum=curriculum("linear"))
    batch = sampler.batch(75)
    counts = Counter(q.kind for asked in batch.questions for q in asked)
    logged = sampler.metrics(75, [batch])
    assert {name: value for name, value in logged.items() if name.startswith("weight/")} == {
        "weight/attribute": 1,
        "weight/exist": 1,
        "weight/relate": 0.5,
    }
    assert counts["relate"] < 16
    assert {name: value for name, value in logged.items() if name.startswith("share/")} == pytest.approx(
        {f"share/{kind}": n / counts.total() for kind, n in counts.items()}
    )
    assert Sampler(records, 8, 4, seed=0).metrics(75, [batch]) == {}


def test_measured_difficulty(tmp_path: Path) -> None:
    """Five levels by wrong answers out of eight: 8 right → 0, 5 → 3/8 · 4 = 1.5 → 2, 0 → 4, no label → 4."""
    one = record(0, "relate", "relate", "relate", "relate")
    right = zip(one.questions[:3], (8, 5, 0), strict=True)
    rows = [{"record": "r0", "question": question.text, "right": n, "samples": 8} for question, n in right]
    header = {"format": 1, "settings": {}, "about": {}, "complete": True}
    (tmp_path / "labels.json").write_text(json.dumps(header))
    (tmp_path / "part-000000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    measured = curriculum("steps", difficulty=tmp_path)
    rng = np.random.default_rng(0)
    opened = {step: measured.let_through(one, step, rng) for step in (0, 49, 50, 99, 100)}
    assert opened[0] == opened[49] == [True, False, False, False]
    assert opened[50] == opened[99] == [True, True, False, False]
    assert opened[100] == [True] * 4
    logged = measured.metrics(50, [one], [one.questions[:2]])
    assert logged == {
        **{"share/level 0": 0.5, "share/level 2": 0.5, "share/level 4": 0},
        **{"weight/level 0": 1, "weight/level 2": 1, "weight/level 4": 0},
    }
