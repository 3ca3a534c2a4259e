"""A decoder's lean layers against plain autograd on transformers' own layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.messages import Question
from shared.packing import Media, PackedRows
from shared.reading import pack_questions
from shared.vlm import VisionLanguageModel
from shared.vlm.lean import ATTENTION, gated_product, last_layer_at
from tests.benchmarks.baseline_loop import plain_layers
from tests.conftest import TinyModel
from tests.reference import max_relative_error
from tests.tiny_models import FAMILY_NAMES


def kept_by_autograd(call: Callable[[], Tensor], shape: tuple[int, ...]) -> int:
    """How many distinct tensors of this shape backward keeps."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) == shape:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()
    assert result.requires_grad
    return len(kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_product_equals_autograds(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 5, 7).to(dtype).requires_grad_() for _ in range(2))
    upstream = torch.randn(3, 5, 7).to(dtype)
    plain = F.silu(gate) * up
    ours = gated_product(gate, up)
    assert torch.equal(ours, plain)
    expected = torch.autograd.grad(plain, (gate, up), upstream)
    for grad, reference in zip(torch.autograd.grad(ours, (gate, up), upstream), expected, strict=True):
        assert torch.equal(grad, reference)
    assert kept_by_autograd(lambda: gated_product(gate.exp(), up.exp()), (3, 5, 7)) == 2
    assert kept_by_autograd(lambda: F.silu(gate.exp()) * up.exp(), (3, 5, 7)) == 3


def test_gated_product_by_finite_differences() -> None:
    gate, up = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(gated_product, (gate, up))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_lean_layers_equal_transformers_own(
    tiny_model: TinyModel, questions: list[list[Question]], family: str
) -> None:
    """States where answers are predicted, and the gradient of the media, with every optimisation and with none."""
    model = tiny_model(family)
    rows = pack_questions(model, [[Media(4)]] * len(questions), questions)
    media_ID = torch.randn(4 * len(questions), model.width, generator=torch.Generator().manual_seed(0)).requires_grad_()

    lean_ND = at_answers(model, rows, media_ID)
    with plain_layers(model):
        assert "forward" not in model.decoder.layers[0].mlp.__dict__
        plain_ND = model.decode(rows, media_ID)[rows.predict_N2.unbind(1)]
    assert max_relative_error(lean_ND, plain_ND) <= 1e-5

    upstream_ND = torch.randn(lean_ND.shape, generator=torch.Generator().manual_seed(1))
    (lean_ID,) = torch.autograd.grad(lean_ND, media_ID, upstream_ND)
    (plain_ID,) = torch.autograd.grad(plain_ND, media_ID, upstream_ND)
    assert max_relative_error(lean_ID, plain_ID) <= 1e-5


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_layers_are_lean_and_come_back(tiny_model: TinyModel, questions: list[list[Question]], family: str) -> None:
    model = tiny_model(family)
    rows = pack_questions(model, [[Media(4)]] * len(questions), questions)
    whole = [module.forward for module in last_modules(model.decoder)]
    media_ID = torch.randn(4 * len(questions), model.width).requires_grad_()
    n_rows, n_tokens = rows.token_ids_BT.shape
    ffn_width = model.decoder.config.intermediate_size
    layers = len(model.decoder.layers)

    def read() -> Tensor:
        return at_answers(model, rows, media_ID)

    assert kept_by_autograd(read, (n_rows, n_tokens, ffn_width)) == 2 * (layers - 1)
    assert kept_by_autograd(read, (len(rows.targets_N), ffn_width)) == 2
    assert kept_by_autograd(read, (n_rows, 1, n_tokens, n_tokens)) == 1, "one mask for all layers"
    assert [module.forward for module in last_modules(model.decoder)] == whole
    assert model.decoder.config._attn_implementation == ATTENTION


def test_the_last_layer_is_whole_again_after_a_failure(
    tiny_model: TinyModel, questions: list[list[Question]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("qwen2_5_vl")
    rows = pack_questions(model, [[Media(4)]] * len(questions), questions)
    whole = [module.forward for module in last_modules(model.decoder)]
    monkeypatch.setattr(model, "decode", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        at_answers(model, rows, torch.zeros(4 * len(questions), model.width))
    assert [module.forward for module in last_modules(model.decoder)] == whole


def at_answers(model: VisionLanguageModel, rows: PackedRows, media_ID: Tensor) -> Tensor:
    """(N, D) last hidden states where answers are predicted, as `score_answers` takes them."""
    with last_layer_at(model.decoder, rows.predict_N2):
        hidden_BTD = model.decode(rows, media_ID)
    return hidden_BTD[rows.predict_N2.unbind(1)]


def last_modules(decoder: nn.Module) -> list[nn.Module]:
    last = decoder.layers[-1]
    return [last.post_attention_layernorm, last.mlp, decoder.norm]
