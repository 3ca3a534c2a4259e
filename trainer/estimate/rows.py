"""How many tokens the calls of one microbatch compute, from the models' own prompts and typical questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared.config import Config
from shared.messages import Question
from trainer.estimate.models import ModelFacts
from trainer.toy.questions import all_questions
from trainer.toy.world import sample_scene

Questions = Sequence[Sequence[Question]]

_CLEVR_LIKE = (
    Question("Is there a small metal sphere behind the red cube?", "yes"),
    Question("How many other things have the same colour as the tiny rubber cylinder?", "3"),
    Question("What is the shape of the large thing that is left of the shiny yellow block?", "cylinder"),
    Question("Are there more blue cubes than big matte objects that are in front of the purple ball?", "no"),
    Question(
        "What material is the cube that is both to the right of the green rubber thing and behind the tiny sphere?",
        "rubber",
    ),
    Question(
        "Does the big object that is in front of the brown ball have the same colour as the cylinder on the left "
        "side of the metal cube?",
        "yes",
    ),
)
"""As long as CLEVR's own questions are: ten to thirty words."""


@dataclass(frozen=True, slots=True)
class Rows:
    """One call: n_rows rows of n_tokens computed columns, each over n_keys keys; logits for n_predictions."""

    n_rows: int
    n_tokens: int
    n_keys: int
    n_predictions: int = 0

    @property
    def all_tokens(self) -> int:
        """Columns of all rows together."""
        return self.n_rows * self.n_tokens


def typical_questions(config: Config) -> list[list[Question]]:
    """Questions for one microbatch: toy scenes' own, or sentences as long as CLEVR's."""
    n_images, per_image = microbatch_images(config), config.data.questions_per_image
    if config.data.source != "toy":
        return [[_CLEVR_LIKE[(b + q) % len(_CLEVR_LIKE)] for q in range(per_image)] for b in range(n_images)]
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(n_images):
        candidates = all_questions(sample_scene(rng))
        chosen = rng.choice(len(candidates), size=min(per_image, len(candidates)), replace=False)
        drawn.append([Question(candidates[i].text, candidates[i].answer) for i in chosen])
    return drawn


def microbatch_images(config: Config) -> int:
    """Images of one microbatch."""
    return config.train.batch_images // config.train.fewest_microbatches


def generator_rows(config: Config, facts: ModelFacts) -> Rows:
    """The generator's rows: prompt around the image, image tokens, latent_start and K latent tokens."""
    n_prompt = len(facts.prompt.prefix_ids) + len(facts.prompt.after_image_ids)
    n_tokens = n_prompt + facts.tower.tokens + 1 + config.generator.latents
    return Rows(microbatch_images(config), n_tokens, n_tokens)


def anchor_rows(config: Config, facts: ModelFacts, questions: Questions, replicas: int) -> Rows:
    """The rows of the fullest replica: K latents and the branches, over those and the cached prefix."""
    branches = facts.prompt.branches(questions[: -(-len(questions) // replicas)])
    # As in pack_rows: the last token of a branch is only a target, and all rows are as long as the longest.
    n_columns = max(sum(len(branch.token_ids) - 1 for branch in row) for row in branches)
    n_tokens = config.generator.latents + n_columns
    n_predictions = sum(branch.n_answer for row in branches for branch in row)
    return Rows(len(branches), n_tokens, len(facts.prompt.prefix_ids) + n_tokens, n_predictions)
