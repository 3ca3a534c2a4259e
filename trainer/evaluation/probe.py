"""Linear probes: can a linear classifier read the answer from given features?

Legend: N questions, P and Q features.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from shared.errors import DataError
from trainer.evaluation.statistics import Figure, ImageBootstrap

N_FOLDS = 5


def probe_hits(features_NP: np.ndarray, answers_N: Sequence[str], images_N: np.ndarray, seed: int) -> np.ndarray:
    """(N,) whether a probe that never saw the question's image gives its answer (0 or 1).

    5-fold cross-validation with all questions of an image in one fold and answers spread evenly. The probe is a
    logistic regression with L2 penalty (C = 1) on features standardised on its training folds. Latents hold no
    question, so for a probe of latents all rows should ask the same one.
    Raises DataError unless two answers occur for 5 images each.
    """
    n_images = Counter(answer for answer, _ in set(zip(answers_N, images_N.tolist(), strict=True)))
    if sum(n >= N_FOLDS for n in n_images.values()) < 2:
        raise DataError(
            f"linear probe: fewer than two answers occur for {N_FOLDS} images or more "
            f"(most frequent: {n_images.most_common(2)}); probe a question that more images answer"
        )
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    folds = StratifiedGroupKFold(N_FOLDS, shuffle=True, random_state=seed)
    answers = np.array(answers_N)
    with warnings.catch_warnings():
        # Answers rarer than the folds are counted as they fall.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        predicted = cross_val_predict(probe, features_NP, answers, groups=images_N, cv=folds)
    return (predicted == answers).astype(float)


def linear_probes(
    bootstrap: ImageBootstrap,
    latents_NP: np.ndarray,
    answer_states_NQ: np.ndarray,
    answers_N: Sequence[str],
    images_N: np.ndarray,
    seed: int,
) -> dict[str, Figure]:
    """Probe accuracy from latents and from an anchor's hidden state where it predicts the answer, and their gap.

    gap = answer_state − latents, paired: what the anchor made of the latents beyond what lies open in them.
    Both probes see the same folds. Raises DataError as `probe_hits` does.
    """
    latents_hits_N = probe_hits(latents_NP, answers_N, images_N, seed)
    state_hits_N = probe_hits(answer_states_NQ, answers_N, images_N, seed)
    values = {"latents": latents_hits_N, "answer_state": state_hits_N, "gap": state_hits_N - latents_hits_N}
    return {name: bootstrap.mean(*bootstrap.per_image(images_N, values_N)) for name, values_N in values.items()}
