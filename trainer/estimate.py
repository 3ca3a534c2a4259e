"""Memory that a run will need, per process, before any weight is loaded: `python -m trainer estimate`.

Models are built on the meta device from their configs alone, so parameter counts are exact. Activations are an
estimate by one formula. With T tokens in the rows of one call, L layers, width D and feed-forward width F,

    kept for backward   (L + 1) · T · (a·D + c·F) values        without gradient checkpointing
                        (L·D + 2 · (a·D + c·F)) · T values      with it: layer inputs, and one layer at a time

(the additional layer stands for embeddings, final norm and the gradients on their way). The weights a and c were
measured on small models by counting the tensors that autograd keeps; see `_KEPT`. Anchors keep less than the
generator, because frozen layers need no inputs for weight gradients. Logits exist only for answer rows:

    N · V · (2 · bytes of the dtype + 12)      logits and gradient; float32 copy, log-softmax and gradient
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForImageTextToText

from shared.config import AnchorConfig, Config, LoraConfig
from shared.vlm import vlm_config
from shared.vlm.families import family_of
from trainer.generator import lora_target_pattern
from trainer.losses import ConceptHead
from trainer.toy.world import IMAGE_PX

GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
_KEPT: dict[tuple[str, bool], tuple[float, float]] = {
    # (dtype, is the generator) → (a, c). bfloat16 keeps float32 norms and, under autocast, casts.
    ("float32", True): (9.0, 4.0),
    ("bfloat16", True): (17.0, 4.5),
    ("float32", False): (7.0, 3.0),
    ("bfloat16", False): (9.5, 3.0),
    ("float64", False): (7.0, 3.0),
}
_PROMPT_TOKENS, _QUESTION_TOKENS, _ANSWER_TOKENS = 48, 40, 4
_CLEVR_PX = (320, 480)
_TRAINABLE_BYTES = {"parameters": 4, "gradients": 4, "AdamW moments": 8}
NOTE = (
    f"Activations are an estimate: a prompt of {_PROMPT_TOKENS} tokens, questions of {_QUESTION_TOKENS} and answers of "
    f"{_ANSWER_TOKENS}, one training step. Not counted: the CUDA context and fragmentation (plan 2 GiB per GPU), the "
    "vision tower's passing activations, evaluation."
)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model's config says about its size. linears: (in, out) of every linear layer, by name."""

    decoder: str
    parameters: int
    layers: int
    width: int
    ffn_width: int
    vocabulary: int
    image_tokens: int
    linears: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """One process (or `replicas` equal ones): bytes by what they are for."""

    name: str
    device: str
    replicas: int
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes of one replica."""
        return sum(self.parts.values())


def print_estimate(config: Config, console: Console) -> None:
    """Print one table per process. Raises ModelError where a model's config cannot be read."""
    anchors = [a for a in (*config.anchors, *config.evaluation.unseen) if a.placement != "shared_base"]
    image_px = (IMAGE_PX, IMAGE_PX) if config.data.source == "toy" else _CLEVR_PX
    paths = {config.generator.model, *(anchor.model for anchor in anchors)}
    for process in estimate_memory(config, {path: model_facts(path, image_px) for path in sorted(paths)}):
        table = Table("part", "GiB", title=f"{process.name} on {process.device}", title_justify="left", min_width=48)
        table.columns[1].justify = "right"
        for part, n_bytes in process.parts.items():
            table.add_row(part, f"{n_bytes / GIB:.3f}")
        table.add_section()
        times = f" (each of {process.replicas} replicas)" if process.replicas > 1 else ""
        table.add_row(f"total{times}", f"{process.total / GIB:.3f}")
        console.print(table)
    console.print(NOTE, style="dim")


def model_facts(path: str, image_px: tuple[int, int] = _CLEVR_PX) -> ModelFacts:
    """Build the model on the meta device and count. image_px: height and width of the images to come."""
    config = vlm_config(path)
    with torch.device("meta"):
        model: nn.Module = AutoModelForImageTextToText.from_config(config)
    text = config.get_text_config()
    return ModelFacts(
        decoder=family_of(config.model_type, path).decoder,
        parameters=sum(p.numel() for p in model.parameters()),
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        ffn_width=text.intermediate_size,
        vocabulary=text.vocab_size,
        image_tokens=_image_tokens(config, image_px),
        linears={n: (m.in_features, m.out_features) for n, m in model.named_modules() if isinstance(m, nn.Linear)},
    )


def lora_parameters(facts: ModelFacts, lora: LoraConfig) -> int:
    """Weights of the LoRA matrices: rank · (in + out) for each adapted layer."""
    pattern = re.compile(lora_target_pattern(facts.decoder, lora.targets))
    return sum(lora.rank * sum(sizes) for name, sizes in facts.linears.items() if pattern.fullmatch(name))


def estimate_memory(config: Config, models: Mapping[str, ModelFacts]) -> list[ProcessMemory]:
    """Bytes per process: the trainer's with its local anchors first, then each Ray anchor. models: by path."""
    generator, train = config.generator, config.train
    facts = models[generator.model]
    n_images = train.batch_images // train.fewest_microbatches
    head = sum(p.numel() for p in _meta_head(facts.width).parameters())
    n_trainable = lora_parameters(facts, generator.lora) + (1 + generator.latents) * facts.width + head
    n_tokens = n_images * (_PROMPT_TOKENS + facts.image_tokens + 1 + generator.latents)
    parts = {"generator weights": facts.parameters * _BYTES[generator.dtype]}
    parts |= {f"trained: {what}": n_trainable * n for what, n in _TRAINABLE_BYTES.items()}
    parts["generator activations"] = activation_bytes(
        facts, n_tokens, generator.dtype, trains=True, checkpointing=generator.gradient_checkpointing
    )
    processes = []
    reads = [(0, 0)]
    for anchor in (*config.anchors, *config.evaluation.unseen):
        shared = anchor.placement == "shared_base"
        own = facts if shared else models[anchor.model]
        dtype = generator.dtype if shared else anchor.dtype
        weights = 0 if shared else own.parameters * _BYTES[dtype]
        read = _read_bytes(config, anchor, own, dtype)
        if anchor.placement == "ray":
            memory = {"weights": weights, "activations": read[0], "logits of answer rows": read[1]}
            processes.append(ProcessMemory(f"anchor {anchor.name}", _device(anchor), anchor.replicas, memory))
        else:
            parts[f"anchor {anchor.name} weights" + (" (the generator's)" if shared else "")] = weights
            reads.append(read)
    # Local anchors read one after the other, each while the generator's activations wait for backward.
    parts["anchor activations"], parts["logits of answer rows"] = max(reads, key=sum)
    local = "".join(f" + {a.name}" for a in config.anchors if a.placement != "ray")
    return [ProcessMemory(f"trainer (generator{local})", generator.device, 1, parts), *processes]


def activation_bytes(facts: ModelFacts, n_tokens: int, dtype: str, trains: bool, checkpointing: bool = False) -> int:
    """The formula at the head of this file."""
    a, c = _KEPT[dtype, trains]
    layer = a * facts.width + c * facts.ffn_width
    values = facts.layers * facts.width + 2 * layer if checkpointing else (facts.layers + 1) * layer
    return int(n_tokens * values * _BYTES[dtype])


def _read_bytes(config: Config, anchor: AnchorConfig, facts: ModelFacts, dtype: str) -> tuple[int, int]:
    """Activations and logits of one read with gradient, of the images that one replica gets."""
    n_images = -(-(config.train.batch_images // config.train.fewest_microbatches) // anchor.replicas)
    n_questions = config.data.questions_per_image
    branch = _QUESTION_TOKENS + _ANSWER_TOKENS
    n_tokens = n_images * (_PROMPT_TOKENS + config.generator.latents + n_questions * branch)
    n_answer_rows = n_images * n_questions * _ANSWER_TOKENS
    logits = n_answer_rows * facts.vocabulary * (2 * _BYTES[dtype] + 12)
    return activation_bytes(facts, n_tokens, dtype, trains=False), logits


def _image_tokens(config: Any, image_px: tuple[int, int]) -> int:
    """Tokens of one image. Families with a grid follow the image's size (bounds of the processor aside); the
    others resize to their own, of which one tile is counted.
    """
    vision = config.vision_config
    if hasattr(vision, "spatial_merge_size"):
        cell_px = vision.patch_size * vision.spatial_merge_size
        return max(1, round(image_px[0] / cell_px)) * max(1, round(image_px[1] / cell_px))
    per_side = vision.image_size // vision.patch_size
    return int(per_side**2 // getattr(config, "scale_factor", 1) ** 2)


def _meta_head(width: int) -> nn.Module:
    with torch.device("meta"):
        return ConceptHead(width)


def _device(anchor: AnchorConfig) -> str:
    return f"{anchor.gpus:g} GPU" if anchor.gpus > 0 else "CPU"
