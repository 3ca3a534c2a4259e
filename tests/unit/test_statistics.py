"""Intervals cover what they should, figures are paired, and a summary is what one counts by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from shared.config import Config, parse_config
from shared.messages import ReadReply
from trainer.evaluation.reading import CONDITIONS, AnswerTable, summarise
from trainer.evaluation.statistics import ImageBootstrap, over_seeds, recovered_share


def test_the_interval_of_a_mean_is_the_normal_ones():
    """One question per image: the bootstrap's interval tends to mean ± 1.96 s/√n."""
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    figure = ImageBootstrap(400, 4000, seed=0).mean(values, np.ones(400))
    half = 1.96 * values.std() / math.sqrt(400)
    assert figure.value == pytest.approx(values.mean())
    assert figure.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert figure.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert figure.n == 400


def test_intervals_cover_the_truth_and_count_images_not_questions():
    """All 5 questions of an image agree; intervals that took them as independent would be √5 too short."""
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        sums = 5.0 * (rng.random(60) < 0.6)
        figure = ImageBootstrap(60, 300, seed=trial).mean(sums, np.full(60, 5.0))
        covered += figure.low <= 0.6 <= figure.high
    assert 0.88 <= covered / 200 <= 0.99


def test_a_mean_is_over_questions_not_over_images():
    figure = ImageBootstrap(2, 100, 0).mean(np.array([4.0, 0.0]), np.array([4.0, 1.0]))
    assert (figure.value, figure.n) == (0.8, 5)
    assert figure.to_json()["n"] == 5


def test_resamples_are_paired_and_repeatable():
    """The difference of two figures that move together has no spread, though each has."""
    bootstrap = ImageBootstrap(50, 500, seed=3)
    base = np.random.default_rng(4).random(50)
    ones = np.ones(50)
    difference = bootstrap.ratio(lambda m: m[0] - m[1], [(base + 0.25, ones), (base, ones)])
    assert bootstrap.mean(base, ones).high - bootstrap.mean(base, ones).low > 0.05
    assert (difference.low, difference.high) == pytest.approx((0.25, 0.25))
    assert ImageBootstrap(50, 500, seed=3).mean(base, ones) == bootstrap.mean(base, ones)
    assert ImageBootstrap(50, 500, seed=5).mean(base, ones) != bootstrap.mean(base, ones)


def test_values_of_questions_are_summed_by_image():
    sums, counts = ImageBootstrap(4, 100, 0).per_image(np.array([0, 2, 0, 1]), np.array([1.0, 0.5, 3.0, -2.0]))
    assert (sums.tolist(), counts.tolist()) == ([4.0, -2.0, 0.5, 0.0], [2.0, 1.0, 1.0, 0.0])


def test_the_interval_over_seeds_is_students():
    """t(0.975) for 2 degrees of freedom is 4.303, for 1 it is 12.706."""
    three = over_seeds([1.0, 2.0, 6.0])
    half = 4.302653 * math.sqrt(7.0) / math.sqrt(3)
    assert (three.value, three.low, three.high, three.n) == pytest.approx((3.0, 3 - half, 3 + half, 3))
    assert over_seeds([1.0, 3.0]).high == pytest.approx(2 + 12.706205 * math.sqrt(2) / math.sqrt(2))
    assert over_seeds([0.5]).to_json() == {"value": 0.5, "low": None, "high": None, "n": 1}


def test_recovered_share():
    assert recovered_share([np.array(0.8), np.array(0.4), np.array(0.9)]) == pytest.approx(0.8)
    # Resamples in which ceiling and floor tie have no share; they are left out instead of spoiling the interval.
    hits, floor, ceiling = np.array([1.0, 0.0]), np.array([0.0, 0.0]), np.array([1.0, 0.0])
    figure = ImageBootstrap(2, 200, 0).ratio(recovered_share, [(part, np.ones(2)) for part in (hits, floor, ceiling)])
    assert (figure.value, figure.low, figure.high) == (1.0, 1.0, 1.0)


def make_config(held_out: tuple[str, ...]) -> Config:
    tree = {
        "run": {"dir": "unused"},
        "generator": {"model": "m"},
        "anchors": [{"name": "A", "model": "m"}],
        "data": {"path": "unused", "held_out_kinds": held_out},
        "evaluation": {"bootstrap_samples": 100},
    }
    return parse_config(tree, "test")


KINDS = [["count", "exist", "exist"], ["count"], ["exist", "count"]]
HITS = {
    "ceiling": [[True, True, True], [True], [True, False]],
    "latents": [[True, False, True], [True], [True, False]],
    "swapped": [[False, False, True], [False], [True, False]],
    "floor": [[False, False, True], [False], [True, False]],
}


def make_table() -> AnswerTable:
    """Three images; every answer has one token and an end of turn; −log p of a token is its question's number."""
    table = AnswerTable()
    for condition in CONDITIONS:
        number = iter(range(1, 7))
        logprobs = [[[-float(next(number)), -1.0] for _ in row] for row in KINDS]
        matches = [[[hit, True] for hit in row] for row in HITS[condition]]
        table.add(condition, ReadReply("r", "A", 0, logprobs, matches), count_end_of_turn=True)
    for image, row in enumerate(KINDS):
        table.images += [image] * len(row)
        table.kinds += row
    return table


def test_a_summary_counted_by_hand():
    summary = summarise(make_table(), 3, make_config(()))
    values = {condition: summary[condition]["value"] for condition in CONDITIONS}
    assert values == pytest.approx({"ceiling": 5 / 6, "latents": 4 / 6, "swapped": 2 / 6, "floor": 2 / 6})
    assert summary["recovered_share"]["value"] == pytest.approx((4 - 2) / (5 - 2))
    assert summary["nll"]["latents"]["value"] == pytest.approx((sum(range(1, 7)) / 6 + 1) / 2)
    assert summary["first_token_nll"]["floor"]["value"] == pytest.approx(3.5)
    assert summary["latents"]["n"] == 6
    assert "held_out_kinds" not in summary
    count = summary["kinds"]["count"]
    assert (count["latents"]["value"], count["ceiling"]["value"], count["latents"]["n"]) == pytest.approx(
        (2 / 3, 2 / 3, 3)
    )
    for figure in (*(summary[c] for c in CONDITIONS), count["latents"]):
        assert figure["low"] <= figure["value"] <= figure["high"]


def test_held_out_kinds_stand_apart_from_the_headline():
    summary = summarise(make_table(), 3, make_config(("exist",)))
    assert summary["latents"]["value"] == pytest.approx(2 / 3)
    assert summary["latents"] == summary["kinds"]["count"]["latents"]
    assert summary["held_out_kinds"]["latents"]["value"] == pytest.approx(2 / 3)
    assert summary["held_out_kinds"] == summary["kinds"]["exist"]
    assert summary["held_out_kinds"]["ceiling"]["n"] == 3


def test_an_answer_is_a_hit_only_if_all_of_its_tokens_are():
    table = AnswerTable()
    reply = ReadReply("r", "A", 0, [[[-1.0, -2.0, -6.0]] * 2], [[[True, True, False], [True, True, True]]])
    table.add("latents", reply, count_end_of_turn=False)
    assert table.hits["latents"] == [False, True]
    assert table.nll["latents"] == [1.5, 1.5]
