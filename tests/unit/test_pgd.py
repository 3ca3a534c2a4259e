"""The attack raises the anchors' NLL within its bound, and more than chance does."""

from __future__ import annotations

import pytest
import torch

from anchor_service.pool import AnchorPool
from shared.config import parse_config
from shared.vlm.generator import Generator
from tests.unit.test_generator import disturb, make_generator
from trainer.evaluation.pgd import adversarial_latents
from trainer.evaluation.reading import Reader, latents_of
from trainer.image_features import ImageFeatures

LEVELS = 1.0
"""Small, because a random model is linear only nearby."""


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "idefics3"])
def test_the_attack_stays_within_its_bound_and_costs_more_than_noise_of_its_size(
    tiny_folder, picture_records, monkeypatch, family
):
    folder, records = tiny_folder(family), picture_records
    tree = {
        "run": {"dir": "unused"},
        "generator": {"model": folder, "latents": 4},
        "anchors": [{"name": "A", "model": folder, "placement": "local"}],
        "data": {"path": "unused"},
    }
    config = parse_config(tree, "test")
    generator = make_generator(folder)
    disturb(generator)
    original = generator.model.image_inputs([image for record in records for image in record.load_images()])
    most = LEVELS / 255 / max(generator.model.processor.image_processor.image_std)
    seen: list[torch.Tensor] = []
    image_tokens_from = Generator.image_tokens_from

    def noting(self: Generator, inputs: dict[str, torch.Tensor]) -> object:
        seen.append(inputs["pixel_values"])
        return image_tokens_from(self, inputs)

    with AnchorPool.start(config, generator.handshake()) as pool:
        reader = Reader(pool, records, config)

        def nll(latents_BKD: torch.Tensor) -> float:
            return float(reader.latents(latents_BKD.detach())["A"].nll_N.mean())

        plain = nll(latents_of(generator, ImageFeatures(generator, None), records, 3))
        signs = torch.randn(original["pixel_values"].shape, generator=torch.Generator().manual_seed(1)).sign()
        noisy = {**original, "pixel_values": original["pixel_values"] + most * signs}
        by_noise = nll(generator.emit(generator.image_tokens_from(noisy))) - plain
        monkeypatch.setattr(Generator, "image_tokens_from", noting)
        by_attack = nll(adversarial_latents(generator, pool, records, 3, LEVELS)) - plain
    assert by_attack > 0
    assert by_attack > 3 * by_noise
    (changed,) = seen
    assert 0.9 * most < (changed - original["pixel_values"]).abs().max() <= most * 1.001
