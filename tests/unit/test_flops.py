"""The counts against PyTorch's own counter of operations, on real tiny models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shared.config import GeneratorConfig, LoraConfig
from shared.flops import (
    decoder_size,
    forward_flops,
    head_flops,
    input_gradient_flops,
    lora_backward_flops,
    lora_forward_flops,
    tower_flops,
)
from shared.messages import Question
from shared.packing import Media, block_mask
from shared.reading import pack_questions
from shared.vlm import ImageTokens
from shared.vlm.generator import Generator
from tests.conftest import TinyFolder, TinyModel
from tests.tiny_models import FAMILY_NAMES
from trainer.estimate.models import lora_parameters, model_facts


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_counts_are_those_of_the_computed_products(
    tiny_model: TinyModel, questions: list[list[Question]], family: str
) -> None:
    """With the plain kernel, whose products the counter sees one by one, the counts are equal, not just near."""
    model = tiny_model(family)
    rows = pack_questions(model, [[Media(4)]] * len(questions), questions)
    embeds_BTD = model.row_embeddings(rows, torch.randn(4 * len(questions), model.width)).requires_grad_()
    n_rows, n_tokens = rows.token_ids_BT.shape
    size = decoder_size(model.hf_model.config)

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        hidden_BTD = model.decode_embeddings(embeds_BTD, block_mask(rows.segments_BT), rows.positions_3BT)
    assert forward.get_total_flops() == forward_flops(size, n_rows, n_tokens, n_tokens)

    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(hidden_BTD.sum(), embeds_BTD)
    assert backward.get_total_flops() == input_gradient_flops(size, n_rows, n_tokens, n_tokens)

    with FlopCounterMode(display=False) as head:
        F.linear(hidden_BTD[0, :3], *model.head())
    assert head.get_total_flops() == head_flops(size, 3)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_lora_adds_two_small_products_and_twice_as_many_backward(tiny_folder: TinyFolder, family: str) -> None:
    config = GeneratorConfig(model=tiny_folder(family), latents=4, device="cpu", lora=LoraConfig(rank=3))
    generator = Generator(config, seed=0)
    tokens = ImageTokens([torch.randn(9, generator.model.width)] * 2, [(3, 3)] * 2)
    facts = model_facts(config.model)
    n_lora = lora_parameters(facts, config.lora)
    n_tokens = len(facts.prompt.prefix_ids) + 9 + len(facts.prompt.after_image_ids) + 1 + 4

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        latents_BKD = generator.emit(tokens)
    stack = forward_flops(facts.decoder, 2, n_tokens, n_tokens)
    assert forward.get_total_flops() == stack + lora_forward_flops(n_lora, 2 * n_tokens)

    with FlopCounterMode(display=False) as backward:
        latents_BKD.sum().backward()
    stack = input_gradient_flops(facts.decoder, 2, n_tokens, n_tokens)
    assert backward.get_total_flops() == stack + lora_backward_flops(n_lora, 2 * n_tokens)


@pytest.mark.parametrize("family", sorted(set(FAMILY_NAMES) - {"llava_onevision"}))
def test_a_towers_operations_are_counted(tiny_model: TinyModel, family: str) -> None:
    """Exactly for grids; class tokens of the others are a few percent. LLaVA-OneVision cuts images into tiles, of
    which the estimate counts one.
    """
    model = tiny_model(family)
    inputs = model.image_inputs([Image.new("RGB", (48, 48))] * 2)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.image_tokens_from(inputs)
    predicted = tower_flops(model_facts(model.path, (48, 48)).tower, 2)
    assert predicted == pytest.approx(counter.get_total_flops(), rel=0 if model.family.uses_mrope else 0.1)
