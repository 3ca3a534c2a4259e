"""Random models of a chosen size, and the memory that a call takes on them: what the estimate is checked against."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.tiny_models import build_tiny


def write_sized(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> str:
    """Save random weights for a config that `sized_config` made."""
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).to(dtype).save_pretrained(folder)
    return str(folder)


def sized_config(family: str, folder: Path, **text: int) -> Any:
    """Write a tiny model of `family` and return its config with the decoder's sizes changed."""
    build_tiny(family, folder, vocabulary=text.get("vocab_size", 512))
    config = AutoConfig.from_pretrained(folder)
    decoder = config.text_config
    for name, value in text.items():
        setattr(decoder, name, value)
    head_width = decoder.hidden_size // decoder.num_attention_heads
    if hasattr(decoder, "head_dim"):
        decoder.head_dim = head_width
    if "mrope_section" in (decoder.rope_parameters or {}):
        third = head_width // 6
        decoder.rope_parameters["mrope_section"] = [head_width // 2 - 2 * third, third, third]
    if getattr(decoder, "layer_types", None):
        decoder.layer_types = ["full_attention"] * decoder.num_hidden_layers
    if hasattr(config.vision_config, "out_hidden_size"):
        config.vision_config.out_hidden_size = decoder.hidden_size
    elif config.model_type == "qwen2_vl":
        config.vision_config.hidden_size = decoder.hidden_size
    return config


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that a call on the CPU had allocated at once, above what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    changes: list[tuple[int, int]] = []
    nodes = list(profiled.profiler.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.tag == _EventType.Allocation:
            changes.append((node.start_time_ns, node.extra_fields.alloc_size))
    allocated = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        allocated += change
        peak = max(peak, allocated)
    return peak
