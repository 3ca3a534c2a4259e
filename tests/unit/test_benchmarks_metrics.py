"""Every metric against scores worked out by hand; chance levels."""

from __future__ import annotations

from itertools import product

import pytest

from shared.errors import DataError
from trainer.evaluation.benchmarks import BENCHMARKS, BenchmarkRecord, score
from trainer.evaluation.benchmarks import metrics as m
from trainer.evaluation.benchmarks.metrics import Outcome, Pair


def pair(correct: float, group: str = "", category: str = "", answer: str | None = "x", **details: object) -> Pair:
    gold = str(details.pop("gold", "x"))
    return BenchmarkRecord("r", (), "?", (), gold, "text", group, category, details), Outcome(correct, answer)


def test_plain_accuracy_weighs_questions_and_blink_weighs_tasks():
    pairs = [pair(1, category="a"), pair(1, category="a"), pair(0, category="a"), pair(0, category="b")]
    assert m.accuracy(pairs) == {"accuracy": 0.5, "by_category": {"a": 2 / 3, "b": 0}}
    assert m.mean_over_categories(pairs)["accuracy"] == pytest.approx(1 / 3)


def test_details_that_are_tuples_count_for_each_of_their_parts():
    pairs = [pair(1, task="x", skills=("p", "q")), pair(0, task="x", skills=("q",))]
    assert m.by_details("task", "skills")(pairs) == {
        "accuracy": 0.5,
        "by_task": {"x": 0.5},
        "by_skills": {"p": 1, "q": 0.5},
    }


def test_cv_bench_averages_sources_then_dimensions():
    pairs = [pair(1, source="ADE20K"), *(pair(0, source="COCO") for _ in range(3)), pair(1, source="Omni3D")]
    scores = m.cv_bench(pairs)
    assert (scores["accuracy_2d"], scores["accuracy_3d"], scores["accuracy"]) == (0.5, 1, 0.75)
    with pytest.raises(DataError, match="no record of Omni3D"):
        m.cv_bench(pairs[:-1])


def test_circular_averages_over_cycles():
    pairs = [pair(1, "0", "single"), pair(0, "0", "cross"), pair(1, "1", "single"), pair(1, "1", "cross")]
    assert m.circular(pairs) == {
        "accuracy": 0.75,
        "by_category": {"cross": 0.5, "single": 1},
        "by_cycle": {"0": 0.5, "1": 1},
    }


def test_pairs_need_both_questions():
    pairs = [pair(1, "1"), pair(1, "1"), pair(1, "2"), pair(0, "2")]
    assert m.pair_accuracy(pairs) == {"pair_accuracy": 0.5, "accuracy": 0.75}
    with pytest.raises(DataError, match="group 2 has 1 of 2 records"):
        m.pair_accuracy(pairs[:3])


def test_natural_bench_counts_questions_images_and_groups():
    # q0i0 q0i1 q1i0 q1i1; the second group fails question 1 on image 1
    pairs = [pair(c, "1") for c in (1, 1, 1, 1)] + [pair(c, "2") for c in (1, 1, 1, 0)]
    assert m.natural_bench(pairs) == {
        "group_accuracy": 0.5,
        "question_accuracy": 0.75,  # questions 0, 1 of group 1 and 0 of group 2
        "image_accuracy": 0.75,  # images 0, 1 of group 1 and 0 of group 2
        "accuracy": 7 / 8,
    }
    only_one_image = [pair(c, "1") for c in (1, 0, 1, 0)]
    scores = m.natural_bench(only_one_image)
    assert (scores["image_accuracy"], scores["question_accuracy"]) == (0.5, 0)


def test_pope_scores_yes_per_subset():
    # random: gold yes: right, wrong; gold no: wrong (says yes), right → TP 1, FN 1, FP 1, TN 1
    random = [
        pair(correct, category="random", gold=gold) for correct, gold in ((1, "yes"), (0, "yes"), (0, "no"), (1, "no"))
    ]
    # popular: one yes found, one `no` unparsed: no false yes, yet wrong
    popular = [pair(1, category="popular", gold="yes"), pair(0, category="popular", gold="no", answer=None)]
    scores = m.pope(random + popular)
    expected = {"f1": 0.5, "accuracy": 0.5, "precision": 0.5, "recall": 0.5, "yes_ratio": 0.5}
    assert scores["by_category"]["random"] == pytest.approx(expected)
    expected = {"f1": 1, "accuracy": 0.5, "precision": 1, "recall": 1, "yes_ratio": 0.5}
    assert scores["by_category"]["popular"] == pytest.approx(expected)
    assert scores["f1"] == pytest.approx(0.75)


def test_pope_without_any_yes_is_zero():
    assert m.pope([pair(0, category="random", gold="yes", answer="no")])["f1"] == 0


def chain(group: str, *correct: float) -> list[Pair]:
    """Steps and then the chained question."""
    n = len(correct) - 1
    return [pair(c, group, n_steps=n, chained=i == n) for i, c in enumerate(correct)]


def test_we_math_of_five_chains():
    pairs = [
        *chain("mastery", 1, 1, 1),
        *chain("inadequate", 1, 1, 0),
        *chain("insufficient", 1, 0, 0),
        *chain("rote, strictly", 1, 0, 1),
        *chain("rote", 0, 0, 0, 1),
    ]
    scores = m.we_math(pairs)
    assert scores == pytest.approx(
        {
            "score_strict": (5 - 0.5 * 1 - 2 - 1) / 5,
            "complete_mastery_strict": 1 / 5,
            "rote_memorization_strict": 2 / 3,
            "score_loose": (5 - 0.5 * 1 - 1 - 1) / 5,
            "complete_mastery_loose": 2 / 5,
            "rote_memorization_loose": 1 / 3,
            "insufficient_knowledge": 1 / 5,
            "inadequate_generalization": 1 / 5,
            "one_step": 6 / 11,
            "2_steps": 2 / 4,
            "3_steps": 1,
        }
    )
    with pytest.raises(DataError, match="1 steps and 1 chained"):
        m.we_math([pair for pair in pairs if pair[0].group == "mastery"][1:])


def test_counting_errors_leave_out_what_is_no_number():
    pairs = [
        pair(1, category="simple", gold="2", answer="2"),
        pair(0, category="simple", gold="2", answer="5"),
        pair(0, category="complex", gold="3", answer=None),
    ]
    assert m.counting(pairs) == {
        "accuracy": 1 / 3,
        "rmse": pytest.approx((9 / 2) ** 0.5),
        "by_category": {
            "complex": {"accuracy": 0, "rmse": None},
            "simple": {"accuracy": 0.5, "rmse": pytest.approx((9 / 2) ** 0.5)},
        },
    }


@pytest.mark.parametrize("metric", [m.we_math, m.natural_bench], ids=["we_math", "natural_bench"])
def test_chance_is_the_mean_over_all_ways_to_guess(metric):
    """The metric of probabilities equals the metric of each outcome, weighted by its probability."""
    probabilities = (0.5, 0.25, 0.2, 0.5)

    def pairs(values):
        return [pair(c, "g", n_steps=3, chained=i == 3) for i, c in enumerate(values)]

    expected: dict[str, float] = {}
    for outcome in product((0.0, 1.0), repeat=4):
        weight = 1.0
        for right, probability in zip(outcome, probabilities, strict=True):
            weight *= probability if right else 1 - probability
        for name, value in metric(pairs(outcome)).items():
            expected[name] = expected.get(name, 0) + weight * value
    got = metric(pairs(probabilities))
    ratios = {"rote_memorization_strict", "rote_memorization_loose"}
    assert {k: v for k, v in got.items() if k not in ratios} == pytest.approx(
        {k: v for k, v in expected.items() if k not in ratios}
    )


def letter_records(n_choices: int) -> list[BenchmarkRecord]:
    choices = tuple(f"option {i}" for i in range(n_choices))
    return [BenchmarkRecord(f"{i}", (), "?", choices, "A", "letter", str(i // 2)) for i in range(4)]


@pytest.mark.parametrize(("name", "chance"), [("vstar", 1 / 4), ("mmvp", 1 / 16)])
def test_chance_of_four_choices(name, chance):
    result = score(name, letter_records(4), dict.fromkeys("0123", "A"))
    assert result["chance"]["n"] == 4
    assert result["chance"]["scores"][result["headline"]] == chance
    assert result["scores"][result["headline"]] == 1


def test_no_chance_without_choices():
    records = [BenchmarkRecord("0", (), "?", (), "2", "integer")]
    assert score("tally_qa", records, {"0": "two"})["chance"] is None


def test_unparsed_responses_are_wrong_and_listed():
    result = score("vstar", letter_records(2), {"0": "A", "1": "B", "2": "who knows", "3": "A" + " x" * 500})
    assert result["scores"]["accuracy"] == 0.25
    assert [entry["id"] for entry in result["unparsed"]] == ["2", "3"]
    assert result["unparsed"][0]["response"] == "who knows"
    assert len(result["unparsed"][1]["response"]) == 200


def test_a_missing_prediction_is_an_error_and_not_a_zero():
    with pytest.raises(DataError, match="2 of 4 records have no prediction, first '2'"):
        score("vstar", letter_records(2), {"0": "A", "1": "A"})


def test_every_benchmark_of_the_project_is_in_the_table():
    assert set(BENCHMARKS) == {
        *("blink", "mmvp", "cv_bench", "vstar", "hr_bench_4k", "hr_bench_8k", "mmstar", "mme_realworld_lite"),
        *("math_vista", "we_math", "pope", "natural_bench", "vsp", "gqa", "clevr", "tally_qa"),
    }
    with pytest.raises(DataError, match="no benchmark 'mmlu'"):
        score("mmlu", [], {})
