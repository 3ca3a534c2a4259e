"""Vision-language models as this project sees them: one class, one small table of family facts."""

from shared.vlm.growing import GrowingRows
from shared.vlm.model import (
    ImageTokens,
    Processor,
    VisionLanguageModel,
    load_processor,
    load_prompt,
    load_vlm,
    vlm_config,
)
from shared.vlm.pooling import nearly_square, pooled_image_tokens
from shared.vlm.prefix import CachedPrefix
from shared.vlm.prompt import Prompt

__all__ = [
    "CachedPrefix",
    "GrowingRows",
    "ImageTokens",
    "Processor",
    "Prompt",
    "VisionLanguageModel",
    "load_processor",
    "load_prompt",
    "load_vlm",
    "nearly_square",
    "pooled_image_tokens",
    "vlm_config",
]
