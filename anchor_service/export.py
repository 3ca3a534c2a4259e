"""An anchor's language model alone, as an ordinary checkpoint that any engine loads.

An anchor never sees pixels, so its vision tower is dead weight to an engine that answers. With latents at text
positions all three axes of a multimodal RoPE count the same, and what is left is the plain RoPE of the text family: a
Qwen2.5-VL decoder is a Qwen2, a Qwen3-VL decoder a Qwen3 (whose visual side inputs, the deepstack, latents lack).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from shared.config import Config
from shared.errors import ConfigError, ModelError
from shared.messages import LatentPositions
from shared.vlm import VisionLanguageModel, load_vlm

SMALLEST_HEAD = 32
"""Size that attention kernels of engines start at (vLLM's on the CPU); smaller heads are padded."""

_TEXT_FAMILY: dict[str, type[Any]] = {
    "qwen2_vl_text": Qwen2Config,
    "qwen2_5_vl_text": Qwen2Config,
    "qwen3_vl_text": Qwen3Config,
}
_PADDED = ("llama", "qwen2")
"""A norm over a head, as in Qwen3, would count the padding."""


def export_anchor(config: Config, name: str, to: Path) -> None:
    """Write the language model of an anchor of a config into an empty folder.

    Raises ConfigError for an anchor that the config lacks, latents on a grid, or a folder that is not empty.
    """
    anchors = {anchor.name: anchor for anchor in config.all_anchors}
    if name not in anchors:
        raise ConfigError(f"--anchor {name}: the config has {', '.join(anchors)}")
    if config.pool.latent_positions is LatentPositions.GRID:
        raise ConfigError("pool.latent_positions: grid has no language model without a grid; use text")
    if to.exists() and any(to.iterdir()):
        raise ConfigError(f"--to {to}: the folder is not empty; name a new one")
    vlm = load_vlm(anchors[name].model, anchors[name].dtype).freeze()
    causal = language_model(vlm)
    if causal.config.model_type in _PADDED and _head_size(causal.config) < SMALLEST_HEAD:
        causal = with_padded_heads(causal)
    causal.save_pretrained(to)
    vlm.processor.tokenizer.save_pretrained(to)


def language_model(vlm: VisionLanguageModel) -> Any:
    """The decoder and head of a VLM as a causal language model of its text family, with copies of the weights."""
    config: Any = vlm.hf_model.config
    text = config.get_text_config()
    plain = _TEXT_FAMILY[text.model_type](**_shared_fields(text)) if text.model_type in _TEXT_FAMILY else text
    plain.tie_word_embeddings = False
    causal = AutoModelForCausalLM.from_config(plain, dtype=vlm.dtype)
    causal.model.load_state_dict(vlm.decoder.state_dict())
    head_weight, head_bias = vlm.head()
    if head_bias is not None:
        raise ModelError(f"{vlm.path}: its output head has a bias, which no text family's checkpoint holds")
    causal.lm_head.weight.data.copy_(head_weight)
    return causal.eval()


def _shared_fields(text: Any) -> dict[str, Any]:
    """The fields of a multimodal text config that its text family has too; of its RoPE what all axes share."""
    names = _TEXT_FAMILY[text.model_type]().to_dict().keys() - {"model_type", "architectures", "rope_parameters"}
    fields = {name: value for name, value in text.to_dict().items() if name in names}
    rope = {name: value for name, value in text.rope_parameters.items() if not name.startswith("mrope_")}
    return {**fields, "rope_parameters": rope}


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def with_padded_heads(causal: Any, size: int = SMALLEST_HEAD) -> Any:
    """The same function with attention heads of `size`, the added dimensions zero, as a Llama checkpoint.

    RoPE turns dimension i with dimension i + size/2 by base^(-2i/size), so either half keeps its beginning and the base
    is raised to the power size/old; scores are divided by √size instead of √old, so queries grow by √(size/old).
    """
    config = causal.config
    old = _head_size(config)
    rope = {**config.rope_parameters, "rope_theta": config.rope_parameters["rope_theta"] ** (size / old)}
    fields = LlamaConfig().to_dict().keys() - {"model_type", "architectures", "head_dim", "rope_parameters"}
    shared = {name: value for name, value in config.to_dict().items() if name in fields}
    has_bias = causal.model.layers[0].self_attn.q_proj.bias is not None
    wide_config = LlamaConfig(**{**shared, "attention_bias": has_bias}, head_dim=size, rope_parameters=rope)
    wide = AutoModelForCausalLM.from_config(wide_config, dtype=causal.dtype).eval()
    with torch.no_grad():
        for target in wide.parameters():
            target.zero_()
        wide.load_state_dict(
            {name: _padded(name, value, old, size) for name, value in causal.state_dict().items()},
            strict=False,  # a Llama with biases has one at the output of attention, too; it stays zero
        )
    return wide


def _padded(name: str, value: Tensor, old: int, size: int) -> Tensor:
    """One tensor of a state dict; only those of attention change."""
    module = name.split(".")[-2]
    if module == "o_proj":
        return _spread(value.T, old, size).T.contiguous()
    if module not in ("q_proj", "k_proj", "v_proj"):
        return value
    return _spread(value * math.sqrt(size / old) if module == "q_proj" else value, old, size)


def _spread(rows: Tensor, old: int, size: int) -> Tensor:
    """Rows of heads (heads × old, …) with either half of a head at the beginning of a half of (heads × size, …)."""
    by_head = rows.unflatten(0, (-1, 2, old // 2))
    padding = [0, 0] * (by_head.dim() - 3) + [0, (size - old) // 2]
    return nn.functional.pad(by_head, padding).flatten(0, 2)
