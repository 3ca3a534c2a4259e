"""Attention of the latents over the image against eager attention of single images; rules against whole matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shared.errors import ModelError
from shared.vlm.generator import Generator
from shared.vlm.latent_attention import LatentAttention, attention_map, latent_attention
from shared.vlm.lean import ATTENTION
from tests.tiny_models import FAMILY_NAMES
from tests.unit.test_generator import K, disturb, make_generator

GRID_FAMILIES = [name for name in FAMILY_NAMES if name != "llava_onevision"]
"""LLaVA-OneVision's tiles and line ends lie on no single grid."""


def eager_attention(generator: Generator, picture) -> Tensor:
    """(L, H, T, T) of one image from transformers' own eager attention."""
    seen: list[Tensor] = []
    decoder = generator.model.decoder

    hooks = [
        layer.self_attn.register_forward_hook(lambda m, a, out: seen.append(out[1][0])) for layer in decoder.layers
    ]
    decoder.set_attn_implementation("eager")
    generator.emit(generator.image_tokens_from(generator.model.image_inputs([picture])))
    decoder.set_attn_implementation(ATTENTION)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


@pytest.mark.parametrize("family", GRID_FAMILIES)
@torch.no_grad()
def test_maps_equal_eager_attention(tiny_folder, pictures, family):
    generator = make_generator(tiny_folder(family))
    disturb(generator)
    generator.train(False)
    attentions = latent_attention(generator, pictures)
    for picture, attention in zip(pictures, attentions, strict=True):
        whole_LTT = eager_attention(generator, picture).mean(dim=1)
        first, n_image = attention.first_image_column, attention.grid[0] * attention.grid[1]
        image_LKI = whole_LTT[:, -K:, first : first + n_image]
        assert 0.05 < image_LKI.sum(-1).mean() < 0.99, "the reference must put visible weight on image and text"
        reference = {"mean": image_LKI.mean(0), "last": image_LKI[-1]}
        for rule, expected_KI in reference.items():
            torch.testing.assert_close(attention_map(attention, rule).flatten(1), expected_KI, rtol=0, atol=1e-5)
        rollout_KI = whole_matrix_rollout(whole_LTT)[:, first : first + n_image]
        torch.testing.assert_close(attention_map(attention, "rollout").flatten(1), rollout_KI, rtol=0, atol=1e-5)


def whole_matrix_rollout(whole_LTT: Tensor) -> Tensor:
    """(K, T) product of T×T matrices ½ I + ½ A, in which rows of other positions than the latents are those of I."""
    n = whole_LTT.shape[1]
    product_TT = torch.eye(n)
    for layer_TT in whole_LTT:
        mixed_TT = torch.eye(n)
        mixed_TT[-K:] = 0.5 * torch.eye(n)[-K:] + 0.5 * layer_TT[-K:]
        product_TT = mixed_TT @ product_TT
    return product_TT[-K:]


@torch.no_grad()
def test_extraction_changes_neither_latents_nor_the_attention_function(tiny_folder, pictures):
    generator = make_generator(tiny_folder("qwen2_5_vl"))
    disturb(generator)
    generator.train(False)
    tokens = generator.image_tokens_from(generator.model.image_inputs(pictures))
    before = generator.emit(tokens)
    latent_attention(generator, pictures)
    assert generator.model.decoder.config._attn_implementation == ATTENTION
    assert torch.equal(generator.emit(tokens), before)


def test_the_attention_function_is_restored_after_a_failure(tiny_folder, pictures, monkeypatch):
    generator = make_generator(tiny_folder("qwen2_5_vl"))
    monkeypatch.setattr(generator, "emit", lambda tokens: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        latent_attention(generator, pictures)
    assert generator.model.decoder.config._attn_implementation == ATTENTION


def test_tokens_on_no_grid_are_refused_by_name(tiny_folder, pictures):
    generator = make_generator(tiny_folder("llava_onevision"))
    with pytest.raises(ModelError, match=r"llava_onevision.* lie on no single grid"):
        latent_attention(generator, pictures[1:2])


def test_rows_of_all_rules_are_shares():
    weights_LKT = torch.rand(3, 2, 9).softmax(dim=-1)
    for rule in ("mean", "last", "rollout"):
        whole = LatentAttention(weights_LKT, first_image_column=0, grid=(1, 9))
        torch.testing.assert_close(attention_map(whole, rule).sum(dim=(1, 2)), torch.ones(2))
