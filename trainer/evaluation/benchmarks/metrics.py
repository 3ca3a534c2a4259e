"""The benchmarks' metrics, as functions of how right each record was answered.

Every metric is multilinear in the records' correctness, so the same function gives a score, from 0s and 1s, and its
chance level, from 1/n for n choices: guesses are independent. Two exceptions: F1, precision and recall of POPE (ratios
of expected counts) and the rote memorization rate of We-Math (the same).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from shared.errors import DataError
from trainer.evaluation.benchmarks.records import BenchmarkRecord


@dataclass(frozen=True, slots=True)
class Outcome:
    """How right an answer is, in [0, 1], and the answer as it was extracted; None if it could not be."""

    correct: float
    answer: str | None


Pair = tuple[BenchmarkRecord, Outcome]
Scores = dict[str, Any]
"""Figures by name; a value is a number or again a dict of figures."""
Metric = Callable[[Sequence[Pair]], Scores]


def accuracy(pairs: Sequence[Pair]) -> Scores:
    """Share of right answers, and the same per category."""
    return {"accuracy": _mean(pairs), "by_category": _by(pairs, lambda record: record.category)}


def mean_over_categories(pairs: Sequence[Pair]) -> Scores:
    """Accuracy per category and its mean over categories, large and small alike (BLINK: eval/evaluate.py, `Total`)."""
    by_category = _by(pairs, lambda record: record.category)
    return {"accuracy": _average(by_category), "by_category": by_category}


def by_details(*keys: str) -> Metric:
    """Accuracy, and the same per value of each of these details; a detail that is a list counts for all it holds."""

    def metric(pairs: Sequence[Pair]) -> Scores:
        return {
            "accuracy": _mean(pairs),
            **{f"by_{key}": _by(pairs, partial(_detail, key)) for key in keys},
        }

    return metric


def cv_bench(pairs: Sequence[Pair]) -> Scores:
    """½ (½ (ADE20K + COCO) + Omni3D), as the data set's README computes it; per source and task besides."""
    by_source = _by(pairs, lambda record: record.details["source"])
    missing = {"ADE20K", "COCO", "Omni3D"} - by_source.keys()
    if missing:
        raise DataError(f"CV-Bench: no record of {', '.join(sorted(missing))}; its mean needs test_2d and test_3d")
    accuracy_2d = (by_source["ADE20K"] + by_source["COCO"]) / 2
    return {
        "accuracy": (accuracy_2d + by_source["Omni3D"]) / 2,
        "accuracy_2d": accuracy_2d,
        "accuracy_3d": by_source["Omni3D"],
        "by_source": by_source,
        "by_category": _by(pairs, lambda record: record.category),
    }


def circular(pairs: Sequence[Pair]) -> Scores:
    """Accuracy of each cycle (options rotated), and per category within it; then means over cycles (HR-Bench).

    Source: DreamMr/HR-Bench, hrbench/vlmeval/dataset/image_mcq.py, `HRBenchDataset.evaluate`.
    """
    cycles = [accuracy(members) for members in _groups(pairs).values()]
    categories = {category for cycle in cycles for category in cycle["by_category"]}
    return {
        "accuracy": sum(cycle["accuracy"] for cycle in cycles) / len(cycles),
        "by_category": {
            category: sum(cycle["by_category"].get(category, 0.0) for cycle in cycles) / len(cycles)
            for category in sorted(categories)
        },
        "by_cycle": {group: _mean(members) for group, members in _groups(pairs).items()},
    }


def pair_accuracy(pairs: Sequence[Pair]) -> Scores:
    """Share of pairs with both questions right (MMVP: scripts/gpt_grader.py), and accuracy over single questions."""
    groups = _complete_groups(pairs, 2)
    both = [members[0][1].correct * members[1][1].correct for members in groups]
    return {"pair_accuracy": sum(both) / len(both), "accuracy": _mean(pairs)}


def natural_bench(pairs: Sequence[Pair]) -> Scores:
    """Accuracy, and the share of questions (both images right), images (both questions right) and groups (all four).

    Source: Baiqi-Li/NaturalBench, naturalbench_vqa.py, `get_scores`. A group's order: question 0 on images 0 and 1,
    then question 1 on both.
    """
    q00, q01, q10, q11 = zip(
        *([outcome.correct for _, outcome in members] for members in _complete_groups(pairs, 4)), strict=True
    )
    groups = list(zip(q00, q01, q10, q11, strict=True))
    return {
        "group_accuracy": sum(math.prod(group) for group in groups) / len(groups),
        "question_accuracy": sum(a * b + c * d for a, b, c, d in groups) / (2 * len(groups)),
        "image_accuracy": sum(a * c + b * d for a, b, c, d in groups) / (2 * len(groups)),
        "accuracy": _mean(pairs),
    }


def pope(pairs: Sequence[Pair]) -> Scores:
    """Accuracy, precision, recall and F1 for `yes` and the share of yes, per subset; their means over subsets.

    Source: AoiDragon/POPE, evaluate.py, which takes all that says no `no` for a yes; here such a response is unparsed:
    wrong, but no yes. A ratio without denominator is 0.
    """
    subsets = {name: _yes_scores(members) for name, members in _split(pairs, lambda record: record.category).items()}
    names = next(iter(subsets.values()))
    return {
        **{name: sum(subset[name] for subset in subsets.values()) / len(subsets) for name in names},
        "by_category": subsets,
    }


def _yes_scores(pairs: Sequence[Pair]) -> Scores:
    gold_yes = [outcome for record, outcome in pairs if record.answer == "yes"]
    gold_no = [outcome for record, outcome in pairs if record.answer == "no"]
    true_yes = sum(outcome.correct for outcome in gold_yes)
    false_yes = sum(1 - outcome.correct for outcome in gold_no if outcome.answer is not None)
    precision, recall = _ratio(true_yes, true_yes + false_yes), _ratio(true_yes, len(gold_yes))
    return {
        "f1": _ratio(2 * precision * recall, precision + recall),
        "accuracy": _mean(pairs),
        "precision": precision,
        "recall": recall,
        "yes_ratio": (true_yes + false_yes) / len(pairs),
    }


def we_math(pairs: Sequence[Pair]) -> Scores:
    """The four outcomes of a chain of steps and the score, strict and loose; accuracy of single and of chained steps.

    With the steps' questions as knowledge and the chained question as reasoning, a chain is insufficient knowledge (IK:
    a step and the chain wrong), inadequate generalization (IG: steps right, chain wrong), complete mastery (CM: steps
    and chain right) or rote memorization (RM: a step wrong, chain right). Loose: one right step suffices for CM instead
    of RM. Score = 1 − IK − ½ IG − RM; the RM rate is RM / (CM + RM).
    Source: We-Math/We-Math, evaluation/four_dimensional_metrics.py, `calculate_metrics` and `update_main_results_df`.
    """
    chains: list[tuple[list[float], float]] = []
    by_length: dict[int, list[float]] = defaultdict(list)
    for group, members in _groups(pairs).items():
        steps = [outcome.correct for record, outcome in members if not record.details["chained"]]
        whole = [outcome.correct for record, outcome in members if record.details["chained"]]
        if len(whole) != 1 or len(steps) != members[0][0].details["n_steps"]:
            raise DataError(f"We-Math: problem {group} has {len(steps)} steps and {len(whole)} chained questions")
        chains.append((steps, whole[0]))
        by_length[len(steps)].append(whole[0])
    n = len(chains)
    knows_all = [math.prod(steps) for steps, _ in chains]
    knows_some = [1 - math.prod(1 - step for step in steps) for steps, _ in chains]
    whole_right = [whole for _, whole in chains]
    insufficient = sum((1 - knows) * (1 - right) for knows, right in zip(knows_all, whole_right, strict=True)) / n
    inadequate = sum(knows * (1 - right) for knows, right in zip(knows_all, whole_right, strict=True)) / n
    scores: Scores = {}
    for name, knows_n in (("strict", knows_all), ("loose", knows_some)):
        mastery = sum(knows * right for knows, right in zip(knows_n, whole_right, strict=True)) / n
        rote = sum((1 - knows) * right for knows, right in zip(knows_n, whole_right, strict=True)) / n
        scores[f"score_{name}"] = 1 - insufficient - inadequate / 2 - rote
        scores[f"complete_mastery_{name}"] = mastery
        scores[f"rote_memorization_{name}"] = _ratio(rote, mastery + rote)
    single = [step for steps, _ in chains for step in steps]
    return {
        **scores,
        "insufficient_knowledge": insufficient,
        "inadequate_generalization": inadequate,
        "one_step": sum(single) / len(single),
        **{f"{length}_steps": sum(right) / len(right) for length, right in sorted(by_length.items())},
    }


def counting(pairs: Sequence[Pair]) -> Scores:
    """Accuracy and root mean square error, per category (TallyQA: Acharya et al. 2019, section 5).

    The error is over the answers that are numbers; None if there is none.
    """

    def scores(members: Sequence[Pair]) -> Scores:
        errors = [int(outcome.answer) - int(record.answer) for record, outcome in members if outcome.answer is not None]
        rmse = math.sqrt(sum(error**2 for error in errors) / len(errors)) if errors else None
        return {"accuracy": _mean(members), "rmse": rmse}

    subsets = _split(pairs, lambda record: record.category)
    return {**scores(pairs), "by_category": {name: scores(members) for name, members in subsets.items()}}


def _detail(key: str, record: BenchmarkRecord) -> Hashable:
    value: Hashable = record.details[key]
    return value


def _mean(pairs: Sequence[Pair]) -> float:
    return sum(outcome.correct for _, outcome in pairs) / len(pairs)


def _average(by: dict[str, float]) -> float:
    return sum(by.values()) / len(by)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _split(pairs: Sequence[Pair], key: Callable[[BenchmarkRecord], Hashable]) -> dict[str, list[Pair]]:
    parts: dict[str, list[Pair]] = defaultdict(list)
    for record, outcome in pairs:
        value = key(record)
        for part in value if isinstance(value, tuple) else (value,):
            parts[str(part)].append((record, outcome))
    return dict(sorted(parts.items()))


def _by(pairs: Sequence[Pair], key: Callable[[BenchmarkRecord], Hashable]) -> dict[str, float]:
    return {name: _mean(part) for name, part in _split(pairs, key).items()}


def _groups(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    return _split(pairs, lambda record: record.group)


def _complete_groups(pairs: Sequence[Pair], size: int) -> list[list[Pair]]:
    groups = _groups(pairs)
    for name, members in groups.items():
        if len(members) != size:
            raise DataError(f"group {name} has {len(members)} of {size} records; its metric needs all of them")
    return list(groups.values())
