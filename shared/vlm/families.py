"""What differs between VLM families, as facts in one table. Everything else is the same code for all of them.

A new family is one more row here and one more case in `tests/tiny_models.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shared.errors import ModelError


@dataclass(frozen=True, slots=True)
class Family:
    """Facts about one family of models.

    model_types: values of `config.model_type` that belong to it.
    decoder: attribute of `model.model` that holds the language model.
    uses_mrope: whether the decoder takes (3, B, T) positions and lays image tokens out on a grid.
    before_image, after_image: text that the processor (not the chat template) puts around the image tokens.
    image_inputs: keys of the image processor's output that `get_image_features` takes.
    nested_images: whether the image processor takes a flat list as the images of one sample.
    processor_options: overrides at load time; one tile per image keeps the number of image tokens fixed.
    """

    name: str
    model_types: tuple[str, ...]
    decoder: str = "language_model"
    uses_mrope: bool = False
    before_image: str = ""
    after_image: str = ""
    image_inputs: tuple[str, ...] = ("pixel_values",)
    nested_images: bool = False
    processor_options: tuple[tuple[str, Any], ...] = ()


FAMILIES = (
    Family("qwen2_vl", ("qwen2_vl",), uses_mrope=True, image_inputs=("pixel_values", "image_grid_thw")),
    Family("qwen2_5_vl", ("qwen2_5_vl",), uses_mrope=True, image_inputs=("pixel_values", "image_grid_thw")),
    Family("qwen3_vl", ("qwen3_vl",), uses_mrope=True, image_inputs=("pixel_values", "image_grid_thw")),
    Family("llava", ("llava",)),
    Family("llava_onevision", ("llava_onevision",), image_inputs=("pixel_values", "image_sizes")),
    Family(
        "idefics3",
        ("idefics3", "smolvlm"),
        decoder="text_model",
        before_image="<fake_token_around_image><global-img>",
        after_image="<fake_token_around_image>",
        image_inputs=("pixel_values", "pixel_attention_mask"),
        nested_images=True,
        processor_options=(("do_image_splitting", False),),
    ),
)


def family_of(model_type: str, model_path: str) -> Family:
    """The family of a `config.model_type`. Raises ModelError for one that the table lacks."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(t for family in FAMILIES for t in family.model_types)
    raise ModelError(f"{model_path}: model_type {model_type!r} is not supported; use one of: {known}")
