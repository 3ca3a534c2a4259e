"""What a model's config says about its size. The model is built on the meta device, so nothing is loaded."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from shared.config import Config, LoraConfig
from shared.flops import DecoderSize, TowerSize, decoder_size
from shared.vlm import Prompt, load_prompt, vlm_config
from shared.vlm.families import family_of
from shared.vlm.generator import lora_target_pattern
from trainer.toy.world import IMAGE_PX

_CLEVR_PX = (320, 480)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Sizes of one model. linears: (in, out) of every linear layer, by name; query_norm: Qwen3 normalises q and k."""

    decoder_name: str
    parameters: int
    decoder: DecoderSize
    tower: TowerSize
    linears: Mapping[str, tuple[int, int]]
    query_norm: bool
    prompt: Prompt


def models_of(config: Config) -> dict[str, ModelFacts]:
    """Facts of every model that a run loads, by path. Raises ModelError where a config or processor is missing."""
    image_px = (IMAGE_PX, IMAGE_PX) if config.data.source == "toy" else _CLEVR_PX
    paths = {a.model for a in config.all_anchors if a.placement != "shared_base"} | {config.generator.model}
    return {path: model_facts(path, image_px) for path in sorted(paths)}


def model_facts(path: str, image_px: tuple[int, int] = _CLEVR_PX) -> ModelFacts:
    """Build the model on the meta device and count. image_px: height and width of the images to come."""
    config = vlm_config(path)
    with torch.device("meta"):
        model: nn.Module = AutoModelForImageTextToText.from_config(config)
    decoder_name = family_of(config.model_type, path).decoder
    return ModelFacts(
        decoder_name=decoder_name,
        parameters=sum(p.numel() for p in model.parameters()),
        decoder=decoder_size(config),
        tower=_tower_size(config, model, decoder_name, image_px),
        linears={n: (m.in_features, m.out_features) for n, m in model.named_modules() if isinstance(m, nn.Linear)},
        query_norm=any(name.endswith(".q_norm") for name, _ in model.named_modules()),
        prompt=load_prompt(path),
    )


def lora_parameters(facts: ModelFacts, lora: LoraConfig) -> int:
    """Weights of the LoRA matrices: rank · (in + out) for each adapted layer."""
    pattern = re.compile(lora_target_pattern(facts.decoder_name, lora.targets))
    return sum(lora.rank * sum(sizes) for name, sizes in facts.linears.items() if pattern.fullmatch(name))


def _tower_size(config: Any, model: nn.Module, decoder_name: str, image_px: tuple[int, int]) -> TowerSize:
    vision = config.vision_config
    per_patch = per_token = 0
    for name, module in model.named_modules():
        if f".{decoder_name}." in name or not isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            continue
        if re.search(r"merger|projector|connector", name):
            per_token += module.weight.numel()
        elif name != "lm_head":
            per_patch += module.weight.numel()
    rows, columns, patches_per_token = _image_grid(config, image_px)
    patches = rows * columns * patches_per_token
    layers = getattr(vision, "depth", None) or vision.num_hidden_layers
    pairs = layers * patches**2
    if hasattr(vision, "fullatt_block_indexes"):  # Qwen2.5-VL: all other layers look at square windows
        side = vision.window_size // (vision.patch_size * vision.spatial_merge_size)
        windows = itertools.product(_cut(rows, side), _cut(columns, side))
        in_windows = sum((n_rows * n_columns * patches_per_token) ** 2 for n_rows, n_columns in windows)
        n_full = len(vision.fullatt_block_indexes)
        pairs = n_full * patches**2 + (layers - n_full) * in_windows
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    return TowerSize(patches, rows * columns, per_patch, per_token, width, pairs)


def _image_grid(config: Any, image_px: tuple[int, int]) -> tuple[int, int, int]:
    """Rows and columns of an image's tokens, and patches that make one of them.

    Families with a grid follow the image's size (bounds of the processor aside); the others resize to their own, of
    which one tile is counted.
    """
    vision = config.vision_config
    if hasattr(vision, "spatial_merge_size"):
        merge = vision.spatial_merge_size
        rows, columns = (max(1, round(px / (vision.patch_size * merge))) for px in image_px)
        return rows, columns, merge**2
    merge = getattr(config, "scale_factor", 1)
    per_side = vision.image_size // vision.patch_size // merge
    return per_side, per_side, merge**2


def _cut(length: int, size: int) -> list[int]:
    """Lengths of the pieces of a line cut into `size`; the last one may be shorter."""
    return [min(size, length - start) for start in range(0, length, size)]
