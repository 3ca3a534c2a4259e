"""From what a model wrote, or from likelihoods, to its answer. What no rule reads is None, never a guess.

The official scripts of several benchmarks ask another language model when their rules fail (BLINK, MMVP, HR-Bench,
MathVista); here such a response counts as unparsed. Rules are tried in the order in which they stand, first on what
follows the last marker ("the answer is", "<Output>", …), then on the whole response.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence

from shared.errors import DataError
from trainer.evaluation.benchmarks.records import LETTERS, BenchmarkRecord

_MARKER = re.compile(
    r"<(?:answer|output)>|\b(?:answer|option|choice|output|action plan)\b[\s*\"]*(?:is\b|:)[\s*:]*", re.IGNORECASE
)
_NUMBER = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?|-?\d*\.\d+|-?\d+")
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_MAX_NUMBER_CHARS = 30
_MOVE = re.compile(r"move\(\s*([a-z])[a-z]*\s*,\s*(table|[a-z])[a-z]*", re.IGNORECASE)


def extract(record: BenchmarkRecord, response: str) -> str | None:
    """The answer that a response gives, written like the record's answer, or None."""
    if record.answer_kind == "letter":
        return extract_letter(response, record.choices)
    return _EXTRACTORS[record.answer_kind](response)


def extract_letter(response: str, choices: Sequence[str]) -> str | None:
    """The letter of an option, by the first of these rules that finds one.

    1. nothing but the letter: `B`, `(b)`, `B.`
    2. the letter opens the text: `B. red`, `(b) red`, `B) red`; after a marker also `B because …`
    3. `option B`, `choice B`
    4. one letter, and no other, in brackets: `it is (B)`
    5. the text of one option, and of no other; of options that contain each other, the longest
    6. one capital letter, and no other, on its own: `I think B`; not A and I, which are words
    """
    capital, any_case = f"[{LETTERS[: len(choices)]}]", f"[{LETTERS[: len(choices)]}{LETTERS[: len(choices)].lower()}]"
    opening = rf"\W*({capital})[).:,\]*]"
    for text, capital_opening in ((_after_marker(response), rf"\W*({capital})\b"), (response, opening)):
        if text is None:
            continue
        found = (
            _letter(re.fullmatch(rf"[\W_]*({any_case})[\W_]*", text))
            or _letter(re.match(capital_opening, text) or re.match(rf"[\s*\"']*\(?({any_case})[).:](?=\s|$)", text))
            or _only(re.findall(rf"\b(?:[Oo]ption|[Cc]hoice)\s+\(?({capital})\b", text))
            or _only(re.findall(rf"[(\[{{]({any_case})[)\]}}]", text))
            or _by_text(text, choices)
            or _only(re.findall(rf"(?<![\w'])({capital})(?![\w'])", text), words="AI")
        )
        if found:
            return found
    return None


def extract_yes_no(response: str) -> str | None:
    """`yes` or `no`: the one that comes first (NaturalBench); with neither, `not` means no (POPE)."""
    for text in (_after_marker(response), response):
        words = re.findall(r"\b(yes|no|not)\b", (text or "").lower())
        polar = [word for word in words if word != "not"]
        if polar:
            return str(polar[0])
        if words:
            return "no"
    return None


def extract_number(response: str) -> str | None:
    """A number without thousands separators: the first after a marker, else the only one. Words up to ten count."""
    marked = _after_marker(response)
    if marked is not None and (numbers := _numbers(marked)):
        return numbers[0]
    numbers = sorted(set(_numbers(response)))
    return numbers[0] if len(numbers) == 1 else None


def extract_integer(response: str) -> str | None:
    """A number cut to an integer, as MathVista does."""
    number = extract_number(response)
    return None if number is None else str(int(float(number)))


def extract_list(response: str) -> str | None:
    """The last bracketed list of numbers, written as JSON."""
    for text in reversed(re.findall(r"\[[^\[\]]*\]", response)):
        try:
            return json.dumps(json.loads(text))
        except ValueError:
            continue
    return None


def extract_text(response: str) -> str | None:
    """The first line after a marker, else of the response, normalised."""
    marked = _after_marker(response)
    lines = (response if marked is None else marked).strip().splitlines()
    return normalise(lines[0]) or None if lines else None


def extract_directions(response: str) -> str | None:
    """Directions, sorted, at the start of what follows the marker or of the response: `above,left`."""
    word = "(?:above|below|left|right)"
    for text in (_after_marker(response), response):
        if text and (found := re.match(rf"[\W_]*{word}(?:(?:\W|\band\b)+{word})*\b", text.lower())):
            return ",".join(sorted(set(re.findall(word, found[0]))))
    return None


def extract_maze_plan(response: str) -> str | None:
    """Moves L, R, U, D with commas, at the start of what follows the marker or of the response."""
    for text in (_after_marker(response), response):
        if text is not None and (found := re.match(r"[\W_]*([LRUD](?:[\s\"']*,[\s\"']*[LRUD])*)(?!\w)", text)):
            return ",".join(re.findall("[LRUD]", found[1]))
    return None


def extract_block_plan(response: str) -> str | None:
    """All `move(block,target)`, by the initials of the colours: `r>table o>b`."""
    for text in (_after_marker(response), response):
        if moves := _MOVE.findall(text or ""):
            return " ".join(f"{block.lower()}>{target.lower()}" for block, target in moves)
    return None


def likelihood_answer(
    record: BenchmarkRecord, log_probabilities_C: Sequence[float], n_tokens_C: Sequence[int] | None = None
) -> str:
    """The candidate with the highest log-probability, the first one of equals; no decoding, nothing to parse.

    log_probabilities_C: log p of each of `record.candidates`, summed over its tokens, in nats.
    n_tokens_C: number of tokens of each; if given, the mean per token decides (V*: vstar_bench_eval.py).
    Raises DataError if the record has no candidates, the lengths differ or a value is NaN.
    """
    candidates = record.candidates
    n_tokens_C = [1] * len(log_probabilities_C) if n_tokens_C is None else n_tokens_C
    if not candidates or not len(candidates) == len(log_probabilities_C) == len(n_tokens_C):
        raise DataError(
            f"record {record.record_id}: {len(log_probabilities_C)} log-probabilities, {len(n_tokens_C)} lengths, "
            f"{len(candidates)} candidates; score each of record.candidates"
        )
    scores_C = [value / length for value, length in zip(log_probabilities_C, n_tokens_C, strict=True)]
    if any(math.isnan(score) for score in scores_C):
        raise DataError(f"record {record.record_id}: a log-probability is NaN; check the anchor's reply")
    return candidates[scores_C.index(max(scores_C))]


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, digits for number words up to ten.

    After the VQA evaluation (Antol et al. 2015; VQAEval.processPunctuation, processDigitArticle), without its table of
    contractions.
    """
    words = re.sub(r"[^\w\s.'-]|\.(?!\d)", " ", text.lower()).split()
    digits = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
    return " ".join(digits.get(word, word) for word in words if word not in ("a", "an", "the"))


_EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "yes_no": extract_yes_no,
    "integer": extract_integer,
    "float": extract_number,
    "list": extract_list,
    "text": extract_text,
    "directions": extract_directions,
    "maze_plan": extract_maze_plan,
    "block_plan": extract_block_plan,
}


def _after_marker(response: str) -> str | None:
    """What follows the last marker; None if there is none or nothing follows."""
    ends = [match.end() for match in _MARKER.finditer(response)]
    return response[ends[-1] :].strip() or None if ends else None


def _letter(match: re.Match[str] | None) -> str | None:
    return match[1].upper() if match else None


def _only(letters: list[str], words: str = "") -> str | None:
    """The one letter of the list, unless it is among those that are words, too."""
    distinct = {letter.upper() for letter in letters}
    return distinct.pop() if len(distinct) == 1 and not distinct & set(words) else None


def _by_text(text: str, choices: Sequence[str]) -> str | None:
    words = f" {normalise(text)} "
    named = {letter: f" {normalise(choice)} " for letter, choice in zip(LETTERS, choices, strict=False)}
    found = {letter: choice for letter, choice in named.items() if choice.strip() and choice in words}
    longest = [
        letter
        for letter, choice in found.items()
        if not any(choice != other and choice in other for other in found.values())
    ]
    return longest[0] if len(longest) == 1 else None


def _numbers(text: str) -> list[str]:
    words = "|".join(_NUMBER_WORDS)
    digits = re.sub(
        rf"\b({words})\b", lambda match: str(_NUMBER_WORDS.index(match[0].lower())), text, flags=re.IGNORECASE
    )
    return [number.replace(",", "") for number in _NUMBER.findall(digits) if len(number) <= _MAX_NUMBER_CHARS]
