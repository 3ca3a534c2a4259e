"""Qwen2.5-VL models of any size with random weights, and questions of an exact number of tokens, for benchmarks.

    folder = build_folder(PROPORTIONS_7B, tmp / "model")       # load_vlm(str(folder)) loads it
    questions = make_questions(n_images=4, n_questions=3)

Speed and memory do not depend on what a model knows. The prompt has the lengths of the real one: 14 tokens before the
image's start token, 5 between question and answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from shared.messages import Question
from shared.vlm import VisionLanguageModel, load_processor
from shared.vlm.model import DTYPES

QUESTION_TOKENS, ANSWER_TOKENS = 12, 3
HEADER_TOKENS = 14
"""Before the image's start token, as with Qwen2.5-VL's default system line."""
BRANCH_TOKENS = 1 + QUESTION_TOKENS + 5 + ANSWER_TOKENS + 1
"""End of the image, question, end of turn and assistant header, answer, end of turn."""

_PATCH_PX, _MERGE = 14, 2
_SPECIALS = (
    *("<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'system' %}You are a helpful assistant .{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_N_WORDS = 200


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes of a Qwen2.5-VL: language model first, vision tower second."""

    layers: int
    width: int
    ffn_width: int
    heads: int
    kv_heads: int
    vocabulary: int
    vision_layers: int
    vision_width: int
    vision_ffn_width: int
    vision_heads: int


PROPORTIONS_7B = ModelSize(8, 512, 1536, 8, 2, 4096, 8, 160, 432, 4)
"""lm_head takes 8 % and the vision tower's weights a tenth of the language model's, as in the 7B."""
REAL_VOCABULARY = ModelSize(4, 256, 768, 4, 1, 152_064, 4, 80, 216, 2)
TINY = ModelSize(2, 32, 64, 4, 2, 512, 2, 32, 64, 2)
QWEN_7B = ModelSize(28, 3584, 18_944, 28, 4, 152_064, 32, 1280, 3420, 16)


def build_folder(size: ModelSize, folder: Path, *, seed: int = 0, with_weights: bool = True) -> Path:
    """Write a model as the folder that a hub model would be; without weights it serves `random_weights` alone."""
    tokenizer = _tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=_PATCH_PX, temporal_patch_size=2, merge_size=_MERGE).save_pretrained(folder)
    config = _config(size, tokenizer)
    if with_weights:
        torch.manual_seed(seed)
        Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    return folder


def make_questions(n_images: int, n_questions: int, question_tokens: int = QUESTION_TOKENS) -> list[list[Question]]:
    """Questions of so many and answers of ANSWER_TOKENS tokens, all different."""
    rng = np.random.default_rng(0)

    def words(n: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(0, _N_WORDS, n))

    return [
        [Question(words(question_tokens), words(ANSWER_TOKENS)) for _ in range(n_questions)] for _ in range(n_images)
    ]


@contextlib.contextmanager
def random_weights() -> Iterator[None]:
    """While it lasts, generator and anchors of this process make their weights on their device instead of reading.

    A model of 16 GB then needs neither a download nor a place on disk.
    """
    with (
        mock.patch("shared.vlm.generator.load_vlm", _load_random),
        mock.patch("anchor_service.frozen_anchor.load_vlm", _load_random),
    ):
        yield


def _load_random(path: str, dtype: str = "float32", device: str = "cpu") -> VisionLanguageModel:
    """`shared.vlm.load_vlm` for a folder without weights."""
    with torch.device(device):
        hf_model = AutoModelForImageTextToText.from_config(
            AutoConfig.from_pretrained(path), dtype=DTYPES[dtype], attn_implementation="sdpa"
        )
    return VisionLanguageModel(hf_model, load_processor(path), path)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Numbered words; a line break is a token, as in the real vocabulary."""
    words = [
        "\n",
        "system",
        "user",
        "assistant",
        *["You", "are", "a", "helpful", "."],
        *(f"w{i}" for i in range(_N_WORDS)),
    ]
    vocabulary = {token: i for i, token in enumerate((*_SPECIALS, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("\n|[^ \n]+"), behavior="removed", invert=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|im_end|>",
        extra_special_tokens=[token for token in _SPECIALS[2:] if token != "<|im_end|>"],
    )
    fast.chat_template = _TEMPLATE
    return fast


def _config(size: ModelSize, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    head_width = size.width // size.heads
    # Half of a head's frequencies belong to time, height and width in the proportions 16 : 24 : 24.
    height = 3 * head_width // 16
    text = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "intermediate_size": size.ffn_width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        # By fan-in, so that outputs depend visibly on inputs at every width.
        "initializer_range": size.width**-0.5,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [head_width // 2 - 2 * height, height, height],
        },
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": size.vision_layers,
        "hidden_size": size.vision_width,
        "intermediate_size": size.vision_ffn_width,
        "num_heads": size.vision_heads,
        "patch_size": _PATCH_PX,
        "spatial_merge_size": _MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": size.width,
        # Every eighth layer attends over the whole image, the others over windows; a short tower in its last layer.
        "fullatt_block_indexes": list(range(7, size.vision_layers, 8)) or [size.vision_layers - 1],
        "initializer_range": size.vision_width**-0.5,
    }
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image", "<|image_pad|>"),
            ("video", "<|video_pad|>"),
            ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>"),
        )
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        initializer_range=size.width**-0.5,
        **ids,
    )
