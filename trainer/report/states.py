"""What pictures need beside the figures: states, norms and attention of a few test images.

They are measured with the evaluated checkpoint when the report is written; no anchor is started.

Legend: B images, K latents, D width, L layers, T row length, I × J the grid of image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from shared.config import Config
from shared.errors import CheckpointError
from shared.run_folder import Checkpoints
from shared.vlm.generator import Generator
from shared.vlm.hidden import hidden_states
from shared.vlm.latent_attention import AttentionRule, attention_map, latent_attention
from trainer.data import load_records
from trainer.data.records import Record
from trainer.evaluation.reading import batched
from trainer.evaluation.suites import answer_states
from trainer.image_features import ImageFeatures

_STATE_IMAGES = 64
_NORM_IMAGES = 16
_ATTENTION_IMAGES = 4


@dataclass(frozen=True, slots=True)
class States:
    """Of the first test images.

    points_ND: plain states (N, D) by name. norms_L: mean norm of the generator's hidden states by kind of position,
    from the input embeddings (0) to the last layer. attention: records with their maps (K, I, J). Norms and attention
    are those of records with one image.
    """

    points_ND: dict[str, np.ndarray]
    norms_L: dict[str, list[float]]
    attention: list[tuple[Record, np.ndarray]]


def measure_states(config: Config, rule: AttentionRule) -> States:
    """Load the evaluated checkpoint and look at a few images.

    Raises CheckpointError, DataError or ModelError where checkpoint, images or model are missing.
    """
    records = load_records(config.data, config.data.test_split)[:_STATE_IMAGES]
    checkpoint = Checkpoints(config.run.dir).best()
    if checkpoint is None:
        raise CheckpointError(f"{config.run.dir}: no checkpoint is left to take states from")
    generator = Generator(config.generator, config.train.seed)
    generator.load_adapter(checkpoint.folder)
    single = [record for record in records if len(record.images) == 1][:_NORM_IMAGES]
    images = [image for record in single for image in record.load_images()]
    attentions = latent_attention(generator, images[:_ATTENTION_IMAGES]) if images else []
    maps = [attention_map(attention, rule).numpy() for attention in attentions]
    return States(
        points_ND=_points(generator, config, records),
        norms_L=hidden_norms(generator, images) if images else {},
        attention=list(zip(single, maps, strict=False)),
    )


@torch.no_grad()
def _points(generator: Generator, config: Config, records: Sequence[Record]) -> dict[str, np.ndarray]:
    """All latents; each image's mean image token; where each first answer is predicted by a reader of the latents."""
    generator.train(False)
    latents, image_tokens, text = [], [], []
    features = ImageFeatures(generator, None)
    for chunk in batched(records, config.evaluation.batch_images):
        tokens = features.of_records(chunk)
        latents_BKD = generator.emit(tokens)
        questions = [record.questions[0].message for record in chunk]
        latents.append(latents_BKD.flatten(0, 1))
        image_tokens += [tokens_ID.mean(dim=0, keepdim=True) for tokens_ID in tokens.tokens]
        text.append(answer_states(generator, config, latents_BKD, questions))
    named = {"latents": latents, "image tokens": image_tokens, "text states": text}
    return {name: torch.cat(parts).float().cpu().numpy() for name, parts in named.items()}


@torch.no_grad()
def hidden_norms(generator: Generator, images: Sequence[Image.Image]) -> dict[str, list[float]]:
    """Mean norm of hidden states at latent, image and text positions: input embeddings, then after every layer."""
    generator.train(False)
    first = len(generator.model.prompt.prefix_ids)
    per_image = []
    for image in images:  # one by one: no padding stands among the text positions
        tokens = generator.image_tokens_from(generator.model.image_inputs([image]))
        with hidden_states(generator.model.decoder) as layers:
            generator.emit(tokens)
        norms_LT = torch.stack([hidden_1TD[0].float().norm(dim=-1) for hidden_1TD in layers])
        kinds_T = np.full(norms_LT.shape[1], "text", dtype=object)
        kinds_T[first : first + len(tokens.tokens[0])] = "image tokens"
        kinds_T[-generator.n_latents :] = "latents"
        per_image.append({kind: norms_LT[:, kinds_T == kind].mean(dim=1) for kind in dict.fromkeys(kinds_T[::-1])})
    return {kind: torch.stack([norms[kind] for norms in per_image]).mean(dim=0).tolist() for kind in per_image[0]}
