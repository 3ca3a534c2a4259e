"""Score answers: the one forward pass that anchors, ceilings, floors and the toy builder share.

Legend: B rows, Q questions per row, I media embeddings of all rows together, D width, N answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from shared.likelihood import token_logprobs
from shared.messages import Question
from shared.packing import Media, PackedRows, pack_rows
from shared.vlm.lean import last_layer_at
from shared.vlm.model import VisionLanguageModel
from shared.vlm.prefix import CachedPrefix


@dataclass(frozen=True, slots=True)
class AnswerScores:
    """Log-probabilities of answer tokens, ordered by image, question, token.

    logprobs_N: float32 (float64 for float64 models), differentiable if the media are.
    best_N: the most probable token at each place. matches_N: whether it is the answer's.
    counts: answer tokens per image and question.
    """

    logprobs_N: Tensor
    best_N: Tensor
    matches_N: Tensor
    counts: list[list[int]]


def pack_questions(
    model: VisionLanguageModel,
    media: Sequence[Sequence[Media]],
    questions: Sequence[Sequence[Question]],
    cache_prefix: bool = False,
) -> PackedRows:
    """Packed rows of `questions` behind each row's `media`, on the model's device; see `pack_rows` for cache_prefix."""
    prompt = model.prompt
    rows = pack_rows(prompt.prefix_ids, media, prompt.branches(questions), prompt.between_images_ids, cache_prefix)
    return rows.to(model.device)


def pack_questions_without_image(model: VisionLanguageModel, questions: Sequence[Sequence[Question]]) -> PackedRows:
    """Packed rows of a conversation that never had an image: no media, and none of the markers around them."""
    prompt = model.prompt_without_image
    rows = pack_rows(prompt.prefix_ids, [[]] * len(questions), prompt.branches(questions))
    return rows.to(model.device)


def score_answers(
    model: VisionLanguageModel,
    rows: PackedRows,
    media_ID: Tensor | None,
    deepstack: Sequence[Tensor] = (),
    prefix: CachedPrefix | None = None,
) -> AnswerScores:
    """One forward pass. What follows the last attention, logits too, is made only where an answer token is predicted.

    prefix: needed for rows that leave their prefix out.
    """
    cache = None if prefix is None else prefix.for_rows(len(rows.token_ids_BT))
    with last_layer_at(model.decoder, rows.predict_N2):
        hidden_BTD = model.decode(rows, media_ID, deepstack, cache)
    hidden_ND = hidden_BTD[rows.predict_N2.unbind(1)]
    logprobs_N, best_N = token_logprobs(hidden_ND, *model.head(), rows.targets_N)
    return AnswerScores(logprobs_N, best_N, best_N == rows.targets_N, rows.counts)


def mean_answer_weights(counts: Sequence[Sequence[int]], count_end_of_turn: bool) -> list[float]:
    """Weight of each answer token in NLL_b = mean over questions of the mean over tokens, flat over N.

    counts include the end-of-turn token, which gets weight 0 unless it counts.
    """
    weights: list[float] = []
    for row in counts:
        for n in row:
            n_counted = n if count_end_of_turn else n - 1
            weights += [1.0 / (len(row) * n_counted)] * n_counted + [0.0] * (n - n_counted)
    return weights


def nll_per_image(logprobs: Sequence[Sequence[Sequence[float]]], count_end_of_turn: bool) -> list[float]:
    """NLL_b of each image from a reply's log-probabilities: mean over questions of the mean over tokens."""
    nll = []
    for row in logprobs:
        means = [sum(counted) / len(counted) for counted in (t if count_end_of_turn else t[:-1] for t in row)]
        nll.append(-sum(means) / len(means))
    return nll
