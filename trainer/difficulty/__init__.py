"""How hard a question is for the base model: of n sampled answers, how many are exactly right.

Capacity alignment of GAP: latents are supervised only where the base model fails in all n samples.
"""

from trainer.difficulty.labels import Difficulty, load_difficulty

__all__ = ["Difficulty", "load_difficulty"]
