"""Tiny VLMs of the toy world as ordinary Hugging Face folders: config, safetensors, tokenizer, processor.

A, B, C: Qwen2.5-VL, width 64, one merged image token per cell. E: the same with the words of the tasks.
D: LLaVA (CLIP tower, Llama decoder), width 80, four image tokens per cell.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trainer.toy.world import CELL_PX, COLORS, COLUMNS, IMAGE_PX, MAX_OBJECTS, ROWS, SHAPES

VOCABULARY = 128
"""Padded like a real model's: the spare rows take the generator's latent tokens without any resizing."""

_PATCH_PX = CELL_PX // 2
"""Four patches a cell: a tower that sees a cell as one patch learned colours and places, but no shapes."""

_ROPE = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 6]}
"""Of the 8 frequencies of a head the time axis takes the fastest, rows the next, columns the rest: with the usual
sections and base, columns turn too slowly to be told apart, with a small base nothing is left for content."""

_SPECIALS = (
    "<|pad|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|unk|>",
)
_WORDS = (
    *("system", "user", "assistant", "what", "color", "shape", "is", "the", "there", "a", "are", "in"),
    *("how", "many", "things", "thing", "more", "fewer", "than", "left", "of", "right", "above", "below"),
    *("where", "row", "column", "yes", "no", "nothing", "?", ","),
    *COLORS,
    *SHAPES,
    *(f"{shape}s" for shape in SHAPES),
    *ROWS,
    *(c for c in COLUMNS if c not in ("left", "right")),
    *(str(n) for n in range(MAX_OBJECTS + 1)),
)
TASK_WORDS = (
    *(
        "image",
        "first",
        "second",
        "third",
        "which",
        "has",
        "same",
        "as",
        "at",
        "point",
        "box",
        "b",
        "c",
        "d",
        "one",
        "or",
    ),
    *("bar", "rails", "wedge", "ring", "frame", "gray", "pale", "dark", "bright", "plain", "stripes", "checks"),
    *("none", "black", "white", "style", "piece", "fits", "similar", "to", "around", "darker", "6", "not"),
)
"""What model E reads and says beyond the words of A to D, which keep the vocabulary that they were trained with."""
_TEMPLATE = (
    "{% for message in messages %}{% if message.role != 'system' %}<|im_start|>{{ message.role }} "
    "{% for part in message.content %}{% if part.type == 'image' %}%IMAGE%{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


@dataclass(frozen=True, slots=True)
class QwenSize:
    """Of a tiny Qwen2.5-VL. image_px: (height, width), which 2 · patch_px divides; heads are 16 wide."""

    width: int = 64
    layers: int = 3
    tower_layers: int = 1
    patch_px: int = _PATCH_PX
    image_px: tuple[int, int] = (IMAGE_PX, IMAGE_PX)
    vocabulary: int = VOCABULARY


def toy_tokenizer(more_words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer that knows the words of the toy world, and some more."""
    return word_tokenizer((*_WORDS, *more_words))


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with the special tokens of Qwen2.5-VL."""
    vocabulary = {token: i for i, token in enumerate((*_SPECIALS, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
        extra_special_tokens=list(_SPECIALS[1:7]),
    )


def new_model(family: str, seed: int) -> nn.Module:
    """A fresh tiny model of the toy world."""
    if family == "qwen2_5_vl":
        return new_qwen(toy_tokenizer(), QwenSize(), seed)
    torch.manual_seed(seed)
    return _with_scaled_weights(_llava(toy_tokenizer()))


def new_qwen(tokenizer: PreTrainedTokenizerFast, size: QwenSize, seed: int) -> nn.Module:
    """A fresh Qwen2.5-VL of this size."""
    torch.manual_seed(seed)
    return _with_scaled_weights(_qwen(tokenizer, size))


def _with_scaled_weights(model: nn.Module) -> nn.Module:
    """Fan-in scaled weights (std 0.8/√fan_in), without which these models do not learn to see."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=0.8 / math.sqrt(fan_in))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
    return model


def _qwen(tokenizer: PreTrainedTokenizerFast, size: QwenSize) -> nn.Module:
    token_id = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": size.vocabulary,
            "hidden_size": size.width,
            "intermediate_size": 3 * size.width,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.width // 16,
            "num_key_value_heads": size.width // 16,
            "max_position_embeddings": 1024,
            "rope_parameters": _ROPE,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": token_id("<|pad|>"),
        },
        vision_config={
            "depth": size.tower_layers,
            "hidden_size": size.width,
            "intermediate_size": 2 * size.width,
            "num_heads": size.width // 16,
            "patch_size": size.patch_px,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
            "out_hidden_size": size.width,
            "window_size": max(size.image_px),
            "fullatt_block_indexes": list(range(size.tower_layers)),
            "tokens_per_second": 1,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _llava(tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    token_id = tokenizer.convert_tokens_to_ids
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=IMAGE_PX,
            patch_size=_PATCH_PX,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=80,
            intermediate_size=208,
            num_hidden_layers=3,
            num_attention_heads=5,
            num_key_value_heads=5,
            max_position_embeddings=1024,
            bos_token_id=None,
            eos_token_id=token_id("<|im_end|>"),
            pad_token_id=token_id("<|pad|>"),
        ),
        image_token_id=token_id("<|image_pad|>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_PX // _PATCH_PX) ** 2,
    )
    return LlavaForConditionalGeneration(config)


def save_folder(model: Any, folder: Path, more_words: Sequence[str] = ()) -> None:
    """Write a model of the toy world so that `from_pretrained` loads it as it would a hub model."""
    if model.config.model_type == "qwen2_5_vl":
        save_qwen(model, folder, toy_tokenizer(more_words), (IMAGE_PX, IMAGE_PX))
        return
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_PX}, crop_size={"height": IMAGE_PX, "width": IMAGE_PX}
    )
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": _PATCH_PX,
        "vision_feature_select_strategy": "default",
        "image_token": "<|image_pad|>",
        "num_additional_image_tokens": 1,
    }
    _save(model, folder, toy_tokenizer(more_words), "<|image_pad|>", image_processor, processor)


def save_qwen(model: Any, folder: Path, tokenizer: PreTrainedTokenizerFast, image_px: tuple[int, int]) -> None:
    """Write a Qwen2.5-VL with its tokenizer; its processor brings every image to as many pixels as image_px has."""
    n_px = image_px[0] * image_px[1]
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=model.config.vision_config.patch_size,
        temporal_patch_size=1,
        merge_size=2,
        size={"shortest_edge": n_px, "longest_edge": n_px},
    )
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    _save(model, folder, tokenizer, image, image_processor, {"processor_class": "Qwen2_5_VLProcessor"})


def _save(
    model: Any,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    image: str,
    image_processor: Any,
    processor: dict[str, Any],
) -> None:
    """image: what stands for an image in the chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.chat_template = _TEMPLATE.replace("%IMAGE%", image)
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
