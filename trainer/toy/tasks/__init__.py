"""Toy versions of the nine tasks of Latent Implicit Visual Reasoning, and two with auxiliary images.

Each of the nine keeps what makes the real one hard: an answer that takes looking, often at several images, and no prior
in words.
"""

from __future__ import annotations

from trainer.toy.tasks.example import Example, Task
from trainer.toy.tasks.one_image import MAX_COUNT, counting, object_localization, relative_reflectance
from trainer.toy.tasks.points import functional_correspondence, semantic_correspondence, visual_correspondence
from trainer.toy.tasks.two_steps import named_shape, two_steps
from trainer.toy.tasks.whole_images import art_style, jigsaw, visual_similarity
from trainer.toy.world import SHAPES

_TWO, _FOUR = ("a", "b"), ("a", "b", "c", "d")
TASKS = {
    task.name: task
    for task in (
        Task("counting", tuple(str(n) for n in range(MAX_COUNT + 1)), counting),
        Task("jigsaw", _TWO, jigsaw),
        Task("object_localization", _TWO, object_localization),
        Task("visual_correspondence", _FOUR, visual_correspondence),
        Task("art_style", _TWO, art_style),
        Task("semantic_correspondence", _FOUR, semantic_correspondence),
        Task("functional_correspondence", _FOUR, functional_correspondence),
        Task("relative_reflectance", ("a", "b", "none"), relative_reflectance),
        Task("visual_similarity", _TWO, visual_similarity),
        Task("named_shape", SHAPES, named_shape),
        Task("two_steps", SHAPES, two_steps),
    )
}

__all__ = ["TASKS", "Example", "Task"]
