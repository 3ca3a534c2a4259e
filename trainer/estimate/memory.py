"""Bytes that each process of a run needs at the peak of a training step.

Weights, gradients and moments are counted exactly. Activations are the tensors that autograd keeps for backward.
With T tokens computed in a row over S keys, width D, attention width A, key width A_k, feed-forward width F, e bytes
of the dtype, each layer keeps per token

    8·D                      inputs of both norms, as float32
    e · (2·A + 2·A·S/T)      queries, keys and values (repeated for every head), the attention's output
    e · S                    the mask, which attention turns into numbers of its own dtype
    3·e·F                    the gate, its activation, the up projection
    4 · (A + A_k)            Qwen3 only: inputs of the norms of queries and keys

and with LoRA what its matrices need for their own gradients: their inputs (once per input in float32, a cast for each
matrix in bfloat16), their rank-wide outputs and, in bfloat16, a cast of the weights. Gradient checkpointing keeps the
input of every layer, and all of the above for one layer at a time. At the start of backward, gradients of the last
layer come on top: `_GRADIENTS`, measured. Logits exist for answer tokens alone and one block of the vocabulary at
a time (`shared.likelihood`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from shared.config import Config, LoraConfig
from shared.likelihood import BLOCK
from trainer.estimate.models import ModelFacts, lora_parameters
from trainer.estimate.rows import Questions, Rows, anchor_rows, generator_rows
from trainer.losses import ConceptHead

BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
_FLOAT32 = 4
_TRAINABLE_BYTES = {"adapter, latent rows and concept head": 4, "their gradients": 4, "AdamW moments": 8}
_GRADIENTS = {True: {"float32": 2, "bfloat16": 5}, False: {"float32": 3, "bfloat16": 4, "float64": 3}}
"""Gradients on their way through a layer, in units of T·F values; by whether LoRA trains."""
IN_FLIGHT = 2
"""Microbatches whose activations the generator holds while remote anchors read: the one out and the next."""


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """One process (or `replicas` equal ones): bytes by what they are for.

    otherwise: for a part that follows a choice of the config, what it would be the other way: (name, bytes).
    """

    name: str
    on_gpu: bool
    replicas: int
    parts: Mapping[str, int]
    otherwise: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of one replica."""
        return sum(self.parts.values())


def estimate_memory(config: Config, models: Mapping[str, ModelFacts], questions: Questions) -> list[ProcessMemory]:
    """Bytes per process: the trainer's with its local anchors first, then each Ray anchor. models: by path."""
    generator = config.generator
    facts = models[generator.model]
    parts = {"generator weights": facts.parameters * BYTES[generator.dtype]}
    n_trainable = trainable_parameters(config, facts)
    parts |= {what: n_trainable * n for what, n in _TRAINABLE_BYTES.items()}
    remote = any(anchor.placement == "ray" for anchor in config.anchors)
    in_flight = min(IN_FLIGHT, config.train.fewest_microbatches) if remote else 1
    rows, name = generator_rows(config, facts), "generator activations, checkpointing "
    by_choice = {
        name + ("on" if checkpointing else "off"): in_flight
        * activation_bytes(facts, rows, generator.dtype, generator.lora, checkpointing)
        for checkpointing in (generator.gradient_checkpointing, not generator.gradient_checkpointing)
    }
    (chosen, n_bytes), other = by_choice.items()
    parts[chosen] = n_bytes

    processes: list[ProcessMemory] = []
    reads: list[dict[str, int]] = [{}]
    for anchor in config.all_anchors:
        shared = anchor.placement == "shared_base"
        own = facts if shared else models[anchor.model]
        dtype = generator.dtype if shared else anchor.dtype
        weights = 0 if shared else own.parameters * BYTES[dtype]
        read = read_bytes(own, anchor_rows(config, own, questions, anchor.replicas), dtype)
        if anchor.placement == "ray":
            memory = {"weights": weights, **read}
            processes.append(ProcessMemory(f"anchor {anchor.name}", anchor.gpus > 0, anchor.replicas, memory))
        else:
            parts[f"anchor {anchor.name} weights" + (" (the generator's)" if shared else "")] = weights
            reads.append(read)
    # Local anchors read one after the other, each while the generator's activations wait for backward.
    parts |= {f"anchor {what}": n for what, n in max(reads, key=lambda read: sum(read.values())).items()}
    local = "".join(f" + {a.name}" for a in config.anchors if a.placement != "ray")
    trainer = ProcessMemory(f"trainer (generator{local})", generator.device != "cpu", 1, parts, {chosen: other})
    return [trainer, *processes]


def trainable_parameters(config: Config, facts: ModelFacts) -> int:
    """LoRA, the rows of the latent tokens, the concept head."""
    with torch.device("meta"):
        head: nn.Module = ConceptHead(facts.decoder.width)
    rows = (1 + config.generator.latents) * facts.decoder.width
    return lora_parameters(facts, config.generator.lora) + rows + sum(p.numel() for p in head.parameters())


def activation_bytes(
    facts: ModelFacts, rows: Rows, dtype: str, lora: LoraConfig | None = None, checkpointing: bool = False
) -> int:
    """What a pass with gradient holds at its peak, logits aside. lora: of the generator; None for anchors."""
    size, n_bytes = facts.decoder, BYTES[dtype]
    layer = kept_per_layer(facts, rows, dtype, lora)
    gradients = rows.all_tokens * _GRADIENTS[lora is not None][dtype] * size.ffn_width * n_bytes
    ends = rows.all_tokens * size.width * (n_bytes + _FLOAT32)  # embeddings, input of the final norm
    if checkpointing:
        return size.layers * rows.all_tokens * size.width * n_bytes + layer + gradients + ends
    return size.layers * layer + gradients + ends


def kept_per_layer(facts: ModelFacts, rows: Rows, dtype: str, lora: LoraConfig | None = None) -> int:
    """Bytes of the tensors that one layer keeps for backward; the formula at the head of this file."""
    size, n_bytes = facts.decoder, BYTES[dtype]
    attention = 2 * size.attention_width * (1 + rows.n_keys / rows.n_tokens) + rows.n_keys
    per_token = 2 * size.width * _FLOAT32 + (attention + 3 * size.ffn_width) * n_bytes
    if facts.query_norm:
        per_token += (size.attention_width + size.kv_width) * _FLOAT32
    if lora is None:
        return round(rows.all_tokens * per_token)
    inputs = lora.rank * len(lora.targets) + _lora_inputs(facts, lora, shared=dtype == "float32")
    casts = 0 if dtype == "float32" else lora_parameters(facts, lora) // size.layers * n_bytes
    return round(rows.all_tokens * (per_token + inputs * n_bytes)) + casts


def read_bytes(facts: ModelFacts, rows: Rows, dtype: str) -> dict[str, int]:
    """Activations and logits of one read with gradient. Gradients of a layer come after those of the logits."""
    # In the dtype of the weights before and after, in float32 between.
    bytes_per_logit = BYTES[dtype] if dtype != "bfloat16" else _FLOAT32 + 2 * BYTES[dtype]
    logits = rows.n_predictions * min(facts.decoder.vocabulary, BLOCK) * bytes_per_logit
    gradients = rows.all_tokens * _GRADIENTS[False][dtype] * facts.decoder.ffn_width * BYTES[dtype]
    return {
        "activations": activation_bytes(facts, rows, dtype) - min(gradients, logits),
        "logits of answer tokens": logits,
    }


def _lora_inputs(facts: ModelFacts, lora: LoraConfig, shared: bool) -> int:
    """Values per token that LoRA keeps of its inputs. shared: layers with one input keep it once (no casts)."""
    size = facts.decoder
    widths = {"q_proj": size.width, "k_proj": size.width, "v_proj": size.width, "o_proj": size.attention_width}
    widths |= {"gate_proj": size.width, "up_proj": size.width, "down_proj": size.ffn_width}
    if not shared:
        return sum(widths[target] for target in lora.targets)
    # The output projection's input is the attention's output, which is kept anyway.
    source = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "gate_proj": "mlp", "up_proj": "mlp"}
    kept = {source.get(target, target): widths[target] for target in lora.targets if target != "o_proj"}
    return sum(kept.values())
