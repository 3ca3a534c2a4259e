"""The README.md of a checkpoint folder."""

from __future__ import annotations

from typing import Any

from shared.config import Config


def model_card(config: Config, steps_done: int, values: dict[str, Any]) -> str:
    """A Hugging Face model card: what the adapter is, what it was trained against, how to use it."""
    anchors = "\n".join(
        f"| {a.name} | `{a.model}` | {a.placement} | {a.replicas} | {a.weight:g} |" for a in config.anchors
    )
    losses = "\n".join(
        f"| {name} | {value:.4f} |" for name, value in values.items() if name in ("loss", "nll", "validation_loss")
    )
    return f"""---
base_model: {config.generator.model}
library_name: peft
tags: [visual-latents, {config.method}]
---
# Visual latents for frozen readers

A LoRA adapter for `{config.generator.model}` that writes {config.generator.latents} continuous visual latents per
image, trained with method `{config.method}` for {steps_done} of {config.train.steps} steps (seed {config.train.seed}).
Load it with `python -m trainer evaluate RUN`, or with peft after adding the latent tokens of this folder's tokenizer.

| anchor | model | placement | replicas | weight |
|---|---|---|---|---|
{anchors}

| last step | nats |
|---|---|
{losses}

The full config is in `config.yaml` beside this file. Whether the latents carry the answer is what
`evaluation.json` of the run says; a low loss alone does not.
"""
