"""Intervals cover what they should, figures are paired, and a summary is what one counts by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from anchor_service.pool import AnchorPool
from shared.config import Config, parse_config
from shared.errors import AnchorLostError
from shared.messages import ReadReply, ReadRequest
from trainer.data.records import ImageFile, KindQuestion, Record
from trainer.evaluation.reading import CONDITIONS, Outcome, Reader, mean_outcomes, summarise
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


def make_reader(config: Config) -> Reader:
    """Three images with questions of KINDS."""
    records = [
        Record(f"image {b}", "toy", (ImageFile(Path("unused")),), tuple(KindQuestion(kind, "?", "yes") for kind in row))
        for b, row in enumerate(KINDS)
    ]
    return Reader(AnchorPool([], config.pool, {}), records, config)


def make_outcomes() -> dict[str, Outcome]:
    """Every answer has one token and an end of turn; −log p of a token is its question's number, of the end 1."""
    numbers = np.arange(1.0, 7.0)
    return {
        condition: Outcome(np.array([hit for row in HITS[condition] for hit in row], float), (numbers + 1) / 2, numbers)
        for condition in CONDITIONS
    }


def test_a_summary_counted_by_hand():
    summary = summarise(make_outcomes(), make_reader(make_config(())), make_config(()))
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
    config = make_config(("exist",))
    summary = summarise(make_outcomes(), make_reader(config), config)
    assert summary["latents"]["value"] == pytest.approx(2 / 3)
    assert summary["latents"] == summary["kinds"]["count"]["latents"]
    assert summary["held_out_kinds"]["latents"]["value"] == pytest.approx(2 / 3)
    assert summary["held_out_kinds"] == summary["kinds"]["exist"]
    assert summary["held_out_kinds"]["ceiling"]["n"] == 3


class Replies:
    """A pool that gives prepared replies, one per call; what reading makes of them is the subject."""

    names = ("A",)

    def __init__(self, *replies: ReadReply):
        self.lost: dict[str, str] = {}
        self._replies = list(replies)
        self.calls: list[str] = []

    def new_request_id(self) -> str:
        return "r"

    def submit(self, requests: dict[str, ReadRequest]) -> dict[str, ReadRequest]:
        self.calls.append("submit")
        return requests

    def gather(self, pending: dict[str, ReadRequest]) -> dict[str, ReadReply]:
        self.calls.append("gather")
        return {"A": self._replies.pop(0)}


def one_image(count_end_of_turn: bool) -> tuple[list[Record], Config]:
    questions = (KindQuestion("exist", "?", "yes"),) * 2
    pool = {"count_end_of_turn": count_end_of_turn}
    tree = make_config(()).model_dump(mode="json") | {"pool": pool}
    return [Record("image", "toy", (ImageFile(Path("unused")),), questions)], parse_config(tree, "test")


def test_an_answer_is_a_hit_only_if_all_of_its_tokens_are():
    reply = ReadReply("r", "A", 0, [[[-1.0, -2.0, -6.0]] * 2], [[[True, True, False], [True, True, True]]])
    outcome = Reader(Replies(reply), *one_image(count_end_of_turn=False)).nothing()["A"]
    assert outcome.hits_N.tolist() == [0.0, 1.0]
    assert outcome.nll_N.tolist() == [1.5, 1.5]
    assert outcome.first_token_nll_N.tolist() == [1.0, 1.0]


def test_several_readings_are_averaged_question_by_question():
    readings = [
        ReadReply("r", "A", 0, [[[-1.0, -3.0], [-2.0, -2.0]]], [[[True, True], [False, True]]]),
        ReadReply("r", "A", 0, [[[-3.0, -5.0], [-2.0, -4.0]]], [[[True, False], [False, True]]]),
    ]
    reader = Reader(Replies(*readings), *one_image(count_end_of_turn=True))
    mean = mean_outcomes([reader.nothing(), reader.nothing()])["A"]
    assert mean.hits_N.tolist() == [0.5, 0.0]
    assert mean.nll_N.tolist() == [3.0, 2.5]
    assert mean.first_token_nll_N.tolist() == [2.0, 2.0]


def test_one_batch_is_under_way_while_the_replies_to_another_are_taken():
    (record,), config = one_image(count_end_of_turn=True)
    config = parse_config(config.model_dump(mode="json") | {"evaluation": {"batch_images": 1}}, "test")
    pool = Replies(*(ReadReply("r", "A", 0, [[[-n], [-n]]], [[[True], [False]]]) for n in (1.0, 2.0, 3.0)))
    outcome = Reader(pool, [record] * 3, config).nothing()["A"]
    assert outcome.nll_N.tolist() == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    assert pool.calls == ["submit", "submit", "gather", "submit", "gather", "gather"]


def test_an_anchor_that_was_dropped_ends_the_evaluation_by_name():
    pool = Replies()
    pool.gather, pool.lost = lambda pending: {}, {"A": "anchor A: its process died"}
    with pytest.raises(AnchorLostError, match="evaluation needs every anchor: anchor A: its process died"):
        Reader(pool, *one_image(count_end_of_turn=True)).nothing()
