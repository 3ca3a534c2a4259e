"""What a causal test costs, and from that whether the latents are used, partly used or inert.

Legend: N questions of all images together.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

import numpy as np

from trainer.evaluation.reading import Outcome
from trainer.evaluation.statistics import Figure, ImageBootstrap

CONTENT_TEST = "swap_images"
VERDICT_TESTS = (CONTENT_TEST, "random_same_dist", "random_model_dist")
MOST = 0.5


class Usage(enum.StrEnum):
    """The verdict on a run's latents, for one anchor."""

    USED = "used"
    PARTLY_USED = "partly used"
    INERT = "inert"


def paired_differences(
    bootstrap: ImageBootstrap, images_N: np.ndarray, plain: Outcome, swapped: Outcome
) -> dict[str, Figure]:
    """Swapped minus plain, question by question: accuracy (share), nll (nats); and the share of answers that flip.

    images_N: the image of each question. An answer flips if it becomes right or becomes wrong; a reading tells no
    wrong answer from another, so those changes are not counted.
    """
    differences = {
        "accuracy": swapped.hits_N - plain.hits_N,
        "nll": swapped.nll_N - plain.nll_N,
        "flips": np.abs(swapped.hits_N - plain.hits_N),
    }
    return {name: bootstrap.mean(*bootstrap.per_image(images_N, d_N)) for name, d_N in differences.items()}


def lost_share(
    bootstrap: ImageBootstrap, images_N: np.ndarray, plain: Outcome, swapped: Outcome, floor: Outcome
) -> Figure:
    """Share of the recovered share that a swap takes away (the ceiling cancels).

    (accuracy − max(swapped accuracy, floor)) / (accuracy − floor), and 0 where accuracy ≤ floor: what was not
    recovered cannot be lost. 0: the swap costs nothing; 1: it costs everything; negative: it helps.
    """
    parts = [bootstrap.per_image(images_N, outcome.hits_N) for outcome in (plain, swapped, floor)]
    return bootstrap.ratio(_lost_share, parts)


def verdict(lost_shares: Mapping[str, Figure]) -> Usage:
    """The verdict from `lost_share` of each of VERDICT_TESTS. Raises KeyError if one is absent.

    inert        latents of another image cost nothing: the interval of their lost share reaches 0. Whatever noise
                 costs: vectors that serve every image equally say nothing about this one.
    used         another image and both kinds of noise each cost most: their intervals lie above ½.
    partly used  everything between.
    """
    if not lost_shares[CONTENT_TEST].low > 0:
        return Usage.INERT
    return Usage.USED if all(lost_shares[test].low > MOST for test in VERDICT_TESTS) else Usage.PARTLY_USED


def _lost_share(means: list[np.ndarray]) -> np.ndarray:
    plain, swapped, floor = means
    share = (plain - np.maximum(swapped, floor)) / (plain - floor)
    return np.where(plain <= floor, 0.0, share)
