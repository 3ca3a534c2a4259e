"""Bytes that each process of a run needs at the peak of a training step.

Weights, gradients and moments are counted exactly. Activations are the tensors that autograd keeps for backward.
With T tokens computed in a row over S keys, width D, attention width A, key width A_k, feed-forward width F, e bytes
of the dtype, each layer keeps per token

    8·D                      inputs of both norms, as float32
    e · (2·A + 2·A_k·S/T)    queries, keys and values, the attention's output; on a GPU A_k is A: keys and values are
                             repeated for every head there
    2·e·F                    the gate and the up projection (`shared.vlm.lean`)
    4 · (A + A_k)            Qwen3 only: inputs of the norms of queries and keys

and with LoRA what its matrices need for their own gradients: their inputs (once per input in float32, a cast for each
matrix in bfloat16), their rank-wide outputs and, in bfloat16, a cast of the weights. Gradient checkpointing keeps the
input of every layer, and all of the above for one layer at a time. At the start of backward, gradients of the last
layer come on top: `_GRADIENTS`, measured. Logits exist for answer tokens alone and one block of the vocabulary at
a time (`shared.likelihood`), and an anchor's last layer keeps what follows its attention for them alone. The mask is
kept once, as numbers; on a GPU once per layer, since kernels pad it.
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
_GRADIENTS = {True: {"float32": 2, "bfloat16": 5}, False: {"float32": 2, "bfloat16": 3, "float64": 2}}
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
    on_gpu = generator.device != "cpu"
    by_choice = {
        name + ("on" if checkpointing else "off"): in_flight
        * activation_bytes(facts, rows, generator.dtype, generator.lora, checkpointing, on_gpu=on_gpu)
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
        reads_on_gpu = anchor.gpus > 0 if anchor.placement == "ray" else on_gpu
        read = read_bytes(own, anchor_rows(config, own, questions, anchor.replicas), dtype, on_gpu=reads_on_gpu)
        if anchor.placement == "ray":
            memory = {"weights": weights, **read}
            processes.append(ProcessMemory(f"anchor {anchor.name}", anchor.gpus > 0, anchor.replicas, memory))
        else:
            parts[f"anchor {anchor.name} weights" + (" (the generator's)" if shared else "")] = weights
            reads.append(read)
    # Local anchors read one after the other, each while the generator's activations wait for backward.
    parts |= {f"anchor {what}": n for what, n in max(reads, key=lambda read: sum(read.values())).items()}
    local = "".join(f" + {a.name}" for a in config.anchors if a.placement != "ray")
    trainer = ProcessMemory(f"trainer (generator{local})", on_gpu, 1, parts, {chosen: other})
    return [trainer, *processes]


def trainable_parameters(config: Config, facts: ModelFacts) -> int:
    """LoRA, the rows of the latent tokens, the concept head."""
    with torch.device("meta"):
        head: nn.Module = ConceptHead(facts.decoder.width)
    rows = (1 + config.generator.latents) * facts.decoder.width
    return lora_parameters(facts, config.generator.lora) + rows + sum(p.numel() for p in head.parameters())


def activation_bytes(
    facts: ModelFacts,
    rows: Rows,
    dtype: str,
    lora: LoraConfig | None = None,
    checkpointing: bool = False,
    *,
    on_gpu: bool = False,
) -> int:
    """What a pass with gradient holds at its peak, logits aside. lora: of the generator; None for anchors."""
    size, n_bytes = facts.decoder, BYTES[dtype]
    layer = kept_per_layer(facts, rows, dtype, lora, on_gpu=on_gpu)
    gradients = rows.all_tokens * _GRADIENTS[lora is not None][dtype] * size.ffn_width * n_bytes
    ends = rows.all_tokens * size.width * (n_bytes + _FLOAT32)  # embeddings, input of the final norm
    mask = rows.all_tokens * rows.n_keys * n_bytes * (size.layers if on_gpu else 1)
    if checkpointing:
        return size.layers * rows.all_tokens * size.width * n_bytes + layer + gradients + ends + mask
    return size.layers * layer + gradients + ends + mask


def kept_per_layer(
    facts: ModelFacts, rows: Rows, dtype: str, lora: LoraConfig | None = None, *, on_gpu: bool = False
) -> int:
    """Bytes of the tensors that one layer keeps for backward; the formula at the head of this file."""
    size, n_bytes = facts.decoder, BYTES[dtype]
    keys = (size.attention_width if on_gpu else size.kv_width) * rows.n_keys / rows.n_tokens
    per_token = 2 * size.width * _FLOAT32 + 2 * (size.attention_width + keys + size.ffn_width) * n_bytes
    if facts.query_norm:
        per_token += (size.attention_width + size.kv_width) * _FLOAT32
    if lora is None:
        return round(rows.all_tokens * per_token)
    inputs = lora.rank * len(lora.targets) + _lora_inputs(facts, lora, shared=dtype == "float32")
    casts = 0 if dtype == "float32" else lora_parameters(facts, lora) // size.layers * n_bytes
    return round(rows.all_tokens * (per_token + inputs * n_bytes)) + casts


def read_bytes(facts: ModelFacts, rows: Rows, dtype: str, *, on_gpu: bool = False) -> dict[str, int]:
    """Activations and logits of one read with gradient. Gradients of a layer come after those of the logits."""
    size, n_bytes = facts.decoder, BYTES[dtype]
    # In the dtype of the weights before and after, in float32 between.
    bytes_per_logit = n_bytes if dtype != "bfloat16" else _FLOAT32 + 2 * n_bytes
    logits = rows.n_predictions * min(size.vocabulary, BLOCK) * bytes_per_logit
    gradients = rows.all_tokens * _GRADIENTS[False][dtype] * size.ffn_width * n_bytes
    elsewhere = rows.all_tokens - rows.n_predictions
    left_out = elsewhere * (2 * size.width * _FLOAT32 + 2 * size.ffn_width * n_bytes)  # two norms, gate and up
    activations = activation_bytes(facts, rows, dtype, on_gpu=on_gpu) - left_out
    return {"activations": activations - min(gradients, logits), "logits of answer tokens": logits}


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
