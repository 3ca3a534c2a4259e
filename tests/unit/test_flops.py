"""The counts against PyTorch's own counter of operations, on real tiny models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shared.flops import decoder_size, forward_flops, head_flops, input_gradient_flops
from shared.messages import Question
from shared.packing import Media, block_mask
from shared.reading import pack_questions
from tests.conftest import TinyModel
from tests.tiny_models import FAMILY_NAMES


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_counts_are_those_of_the_computed_products(
    tiny_model: TinyModel, questions: list[list[Question]], family: str
) -> None:
    """With the plain kernel, whose products the counter sees one by one, the counts are equal, not just near."""
    model = tiny_model(family)
    rows = pack_questions(model, [Media(4)] * len(questions), questions)
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
