"""Tiny random models of every supported family, written as the folders that a hub model would be.

    folder = build_tiny("qwen3_vl", tmp_path / "model")      # load_vlm(str(folder)) loads it

Prompt templates follow those of the real models, quirks included (who writes the BOS token, what stands after an
answer). Weights are scaled by fan-in, so that outputs depend visibly on inputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from shared.vlm.model import DTYPES
from trainer.toy.tiny_vlms import toy_tokenizer

WIDTH = 32
VOCABULARY = 256
"""More rows than the tokenizer has tokens, as in most released models."""
_HEADS = 4
_IMAGE_PX = 48
_PATCH_PX = 8

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}%IMAGE%{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)
# LLaVA 1.5 shows no system turn, lets the tokenizer add BOS, and ends an answer with a space instead of a token.
_LLAVA = (
    "{% for message in messages %}{% if message.role != 'system' %}{{ message.role.upper() }}: "
    "{% for part in message.content %}{% if part.type == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }} {% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
)
# Idefics3 writes BOS itself, though its tokenizer adds one too.
_IDEFICS = (
    "<s>{% for message in messages %}{{ message.role | capitalize }}:{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %} {{ part.text }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}"
)
_QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_TEMPLATE = _CHATML.replace("%IMAGE%", "<|vision_start|><|image_pad|><|vision_end|>")


@dataclass(frozen=True, slots=True)
class TinyFamily:
    """One model type. special_tokens: the image token is `image_token`, the last one ends a turn."""

    model: Callable[[Any, int], Any]
    image_processor: Callable[[], Any]
    template: str
    special_tokens: tuple[str, ...]
    end_of_turn: str
    image_token: str
    bos: str | None = None
    processor: dict[str, Any] = field(default_factory=dict)


def build_tiny(
    family: str, folder: Path, dtype: str = "float32", *, seed: int = 0, vocabulary: int | None = VOCABULARY
) -> Path:
    """Write a tiny model of `family` (a key of TINY) to `folder` and return it.

    vocabulary: rows of the embedding; None leaves no spare row, so that new tokens need a resize.
    """
    tiny = TINY[family]
    tokenizer = tiny_tokenizer(tiny)
    torch.manual_seed(seed)
    hf_model = tiny.model(tokenizer, vocabulary or len(tokenizer))
    scale_weights(hf_model)
    folder.mkdir(parents=True, exist_ok=True)
    hf_model.to(DTYPES[dtype]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tiny.image_processor().save_pretrained(folder)
    if tiny.processor:
        (folder / "processor_config.json").write_text(json.dumps(tiny.processor, indent=2) + "\n")
    return folder


def scale_weights(model: nn.Module) -> None:
    """Random weights by fan-in, so that outputs depend visibly on inputs."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            nn.init.normal_(module.weight, std=1.2 / math.sqrt(module.weight[0].numel()))
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.2)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.7)


def tiny_tokenizer(tiny: TinyFamily) -> PreTrainedTokenizerFast:
    """Word-level, with the toy world's words; what it does not know becomes <unk>."""
    words = [word for word in toy_tokenizer().get_vocab() if not word.startswith("<")]
    specials = ["<pad>", "<unk>", *([tiny.bos] if tiny.bos else []), *tiny.special_tokens]
    vocabulary = {token: i for i, token in enumerate((*specials, *sorted(words), ":", ".", "answer", "from"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    if tiny.bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tiny.bos} $A", special_tokens=[(tiny.bos, vocabulary[tiny.bos])]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token=tiny.bos,
        eos_token=tiny.end_of_turn,
        extra_special_tokens=[token for token in tiny.special_tokens if token != tiny.end_of_turn],
    )
    fast.chat_template = tiny.template
    return fast


def _text_config(tokenizer: Any, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }


def _mrope(section: list[int]) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 100.0, "mrope_section": section}


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def _qwen2_vl(tokenizer: Any, vocabulary: int) -> nn.Module:
    text = _text_config(tokenizer, vocabulary, rope_parameters=_mrope([2, 1, 1]), tie_word_embeddings=True)
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": WIDTH,
        "mlp_ratio": 2,
        "num_heads": 2,
        "patch_size": _PATCH_PX,
        "temporal_patch_size": 2,
    }
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **_qwen_ids(tokenizer))
    return Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl(tokenizer: Any, vocabulary: int) -> nn.Module:
    text = _text_config(tokenizer, vocabulary, rope_parameters=_mrope([2, 1, 1]), tie_word_embeddings=False)
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": _PATCH_PX,
        "temporal_patch_size": 2,
        "out_hidden_size": WIDTH,
        "window_size": 4 * _PATCH_PX,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **_qwen_ids(tokenizer))
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl(tokenizer: Any, vocabulary: int) -> nn.Module:
    text = _text_config(
        tokenizer,
        vocabulary,
        head_dim=WIDTH // _HEADS,
        rope_parameters=_mrope([2, 1, 1]),
        tie_word_embeddings=False,
        num_hidden_layers=3,
    )
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": _PATCH_PX,
        "temporal_patch_size": 2,
        "out_hidden_size": WIDTH,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1],
    }
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **_qwen_ids(tokenizer))
    return Qwen3VLForConditionalGeneration(config)


def _llava(tokenizer: Any, vocabulary: int) -> nn.Module:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=_IMAGE_PX,
        patch_size=2 * _PATCH_PX,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**_text_config(tokenizer, vocabulary)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=9,
    )
    return LlavaForConditionalGeneration(config)


def _llava_onevision(tokenizer: Any, vocabulary: int) -> nn.Module:
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=_IMAGE_PX,
        patch_size=2 * _PATCH_PX,
        vision_use_head=False,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=Qwen2Config(**_text_config(tokenizer, vocabulary)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=_PINPOINTS,
    )
    return LlavaOnevisionForConditionalGeneration(config)


_PINPOINTS = [[_IMAGE_PX, _IMAGE_PX], [_IMAGE_PX, 2 * _IMAGE_PX], [2 * _IMAGE_PX, _IMAGE_PX]]


def _idefics(config_class: Any, model_class: Any, tied: bool) -> Callable[[Any, int], nn.Module]:
    def make(tokenizer: Any, vocabulary: int) -> nn.Module:
        vision = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": _IMAGE_PX,
            "patch_size": _PATCH_PX,
        }
        config = config_class(
            vision_config=vision,
            text_config=LlamaConfig(**_text_config(tokenizer, vocabulary, tie_word_embeddings=tied)),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            scale_factor=2,
            tie_word_embeddings=tied,
            pad_token_id=tokenizer.pad_token_id,
        )
        return model_class(config)

    return make


def _qwen_image_processor() -> Any:
    return Qwen2VLImageProcessorPil(
        patch_size=_PATCH_PX,
        temporal_patch_size=2,
        merge_size=2,
        size={"shortest_edge": (2 * _PATCH_PX) ** 2, "longest_edge": _IMAGE_PX**2},
    )


def _idefics_image_processor(processor_class: Any) -> Callable[[], Any]:
    return lambda: processor_class(size={"longest_edge": 2 * _IMAGE_PX}, max_image_size={"longest_edge": _IMAGE_PX})


def _qwen(model: Callable[[Any, int], Any]) -> TinyFamily:
    return TinyFamily(model, _qwen_image_processor, _QWEN_TEMPLATE, _QWEN_TOKENS, "<|im_end|>", "<|image_pad|>")


def _idefics_family(model: Callable[[Any, int], Any], processor_class: Any) -> TinyFamily:
    tokens = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    processor = _idefics_image_processor(processor_class)
    return TinyFamily(model, processor, _IDEFICS, tokens, "<end_of_utterance>", "<image>", bos="<s>")


TINY: dict[str, TinyFamily] = {
    "qwen2_vl": _qwen(_qwen2_vl),
    "qwen2_5_vl": _qwen(_qwen2_5_vl),
    "qwen3_vl": _qwen(_qwen3_vl),
    "llava": TinyFamily(
        _llava,
        lambda: CLIPImageProcessorPil(
            size={"shortest_edge": _IMAGE_PX}, crop_size={"height": _IMAGE_PX, "width": _IMAGE_PX}
        ),
        _LLAVA,
        ("<image>", "</s>"),
        "</s>",
        "<image>",
        bos="<s>",
        processor={
            "processor_class": "LlavaProcessor",
            "patch_size": 2 * _PATCH_PX,
            "vision_feature_select_strategy": "default",
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
        },
    ),
    "llava_onevision": TinyFamily(
        _llava_onevision,
        lambda: LlavaOnevisionImageProcessorPil(
            size={"height": _IMAGE_PX, "width": _IMAGE_PX}, image_grid_pinpoints=_PINPOINTS
        ),
        _CHATML.replace("%IMAGE%", "<image>\n"),
        ("<|im_start|>", "<image>", "<video>", "<|im_end|>"),
        "<|im_end|>",
        "<image>",
    ),
    "idefics3": _idefics_family(
        _idefics(Idefics3Config, Idefics3ForConditionalGeneration, tied=False), Idefics3ImageProcessorPil
    ),
    "smolvlm": _idefics_family(
        _idefics(SmolVLMConfig, SmolVLMForConditionalGeneration, tied=True), SmolVLMImageProcessorPil
    ),
}
FAMILY_NAMES = tuple(TINY)
