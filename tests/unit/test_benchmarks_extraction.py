"""What is read out of a response, and what is left unread; answers by likelihood."""

from __future__ import annotations

import pytest

from shared.errors import DataError
from trainer.evaluation.benchmarks import BenchmarkRecord, likelihood_answer
from trainer.evaluation.benchmarks.extraction import (
    extract_block_plan,
    extract_directions,
    extract_integer,
    extract_letter,
    extract_list,
    extract_maze_plan,
    extract_number,
    extract_text,
    extract_yes_no,
    normalise,
)

FRUIT = ("apple", "pear", "red pear", "plum")


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        # 1: nothing but the letter
        ("B", "B"),
        ("(b)", "B"),
        (" **D.** ", "D"),
        # 2: the letter opens the text
        ("B. pear", "B"),
        ("(a) apple, not pear", "A"),
        ("C) red pear", "C"),
        ("The answer is A because it is round", "A"),
        ("pear? No. Answer: (D)", "D"),
        ("<Output> C\nas shown", "C"),
        ("The answer is B. Wait: the answer is C.", "C"),
        ("The best option is A", "A"),
        # 3: option B
        ("I choose option A over the others", "A"),
        # 4: one letter in brackets
        ("it must be (C) I think", "C"),
        (r"so \boxed{A}", "A"),
        # 5: the text of one option; the longest of nested ones
        ("It is a plum.", "D"),
        ("A red pear!", "C"),
        ("the pear", "B"),
        # 6: one capital letter
        ("I think B", "B"),
    ],
)
def test_letters_are_found(response, letter):
    assert extract_letter(response, FRUIT) == letter


@pytest.mark.parametrize(
    "response",
    ["", "I cannot tell.", "it is (A) or (B)", "either B or D", "E", "A fruit", "apple or plum", "(Z) Failed", "Both."],
)
def test_what_names_no_single_option_stays_unparsed(response):
    assert extract_letter(response, FRUIT) is None


def test_options_without_texts_are_found_by_letter_alone():
    assert extract_letter("B", ("", "")) == "B"
    assert extract_letter("a b c", ("", "")) is None


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Yes", "yes"),
        ("no, there is none", "no"),
        ("Well, yes, no doubt", "yes"),
        ("There is not a dog.", "no"),
        ("I see nothing. The answer is: No.", "no"),
        ("Yes. The answer is clear.", "yes"),
        ("There is a dog.", None),
        ("Nobody knows", None),
        ("", None),
    ],
)
def test_yes_and_no(response, answer):
    assert extract_yes_no(response) == answer


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("14", "14"),
        ("The number missing is 14.", "14"),
        ("There are three of them", "3"),
        ("-1.50", "-1.50"),
        ("$1,234.5", "1234.5"),
        (".5", ".5"),
        ("2 + 2, so the answer is 4", "4"),
        ("2 or 3", None),
        ("none", None),
        ("9" * 400, None),
    ],
)
def test_numbers(response, number):
    assert extract_number(response) == number


def test_integers_are_cut_like_in_math_vista():
    assert extract_integer("7.9") == "7"
    assert extract_integer("many") is None


def test_lists_are_the_last_ones_that_parse():
    assert extract_list("not [x], but [1,2.5]") == "[1, 2.5]"
    assert extract_list("1, 2") is None


def test_texts_are_normalised_like_in_the_vqa_evaluation():
    assert normalise("The Two dogs, and a 3.5 m x-ray!") == "2 dogs and 3.5 m x-ray"
    assert extract_text("Answer: A Blue car.\nBecause.") == "blue car"
    assert extract_text(" \n ") is None


def test_directions_need_a_place_of_their_own():
    assert extract_directions('<Output> "Left, Above"') == "above,left"
    assert extract_directions("below and right") == "below,right"
    assert extract_directions("the player is left of the goal") is None


def test_plans():
    assert extract_maze_plan('First … Action plan: "R, D,D" done') == "R,D,D"
    assert extract_maze_plan("Right then down") is None
    assert extract_block_plan("<Output>\n1. move(red,table)\n2. move(Orange, blue)") == "r>table o>b"
    assert extract_block_plan("red to the table") is None


def record(kind: str, choices: tuple[str, ...]) -> BenchmarkRecord:
    return BenchmarkRecord("r", (), "?", choices, "", kind)  # type: ignore[arg-type]


def test_the_most_likely_candidate_is_the_answer():
    assert likelihood_answer(record("letter", FRUIT), [-3.0, -1.0, -2.0, -9.0]) == "B"
    assert likelihood_answer(record("yes_no", ("yes", "no")), [-3.0, -1.0]) == "no"
    assert likelihood_answer(record("text", ("cube", "sphere")), [-1.0, -1.0]) == "cube", "the first of equals"


def test_per_token_likelihood_does_not_favour_short_options():
    log_probabilities, lengths = [-2.0, -3.0], [1, 3]
    assert likelihood_answer(record("letter", ("a", "a long one")), log_probabilities) == "A"
    assert likelihood_answer(record("letter", ("a", "a long one")), log_probabilities, lengths) == "B"


@pytest.mark.parametrize(
    ("kind", "choices", "values", "lengths", "problem"),
    [
        ("letter", FRUIT, [-1.0], None, "4 candidates"),
        ("letter", FRUIT[:2], [-1.0, -1.0], [1], "1 lengths"),
        ("letter", FRUIT[:2], [-1.0, float("nan")], None, "NaN"),
        ("text", (), [], None, "0 candidates"),
    ],
)
def test_likelihoods_that_do_not_fit_are_refused(kind, choices, values, lengths, problem):
    with pytest.raises(DataError, match=problem):
        likelihood_answer(record(kind, choices), values, lengths)
