"""Each optimisation of the anchor path, switched off: what it alone brings is measured against the whole.

For benchmarks only; a run's config has no such switches. Numbers stay the same with every one of them.

Legend: B images, T row length, Q questions per image, K latents, D width, V vocabulary, N answer tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from anchor_service.frozen_anchor import FrozenAnchor
from shared.messages import Gradient, ReadReply, ReadRequest
from shared.packing import PackedRows
from shared.reading import AnswerScores, mean_answer_weights, pack_questions, score_answers
from shared.vlm import CachedPrefix, ImageTokens, VisionLanguageModel
from shared.vlm.generator import Generator
from shared.vlm.lean import ATTENTION

Read = Callable[[FrozenAnchor, ReadRequest], ReadReply]
_ANCHOR = "anchor_service.frozen_anchor"


def without_packing(anchor: FrozenAnchor, request: ReadRequest) -> ReadReply:
    """Every question in a row of its own, all rows in one pass."""
    assert request.latents is not None
    counts = torch.tensor([len(row) for row in request.questions], device=request.latents.device)
    rows_QKD = request.latents.repeat_interleave(counts, dim=0)
    alone = replace(request, questions=[[question] for row in request.questions for question in row], latents=rows_QKD)
    reply = anchor.read(alone)
    assert reply.latents_grad is not None
    parts, flat = reply.latents_grad.split(counts.tolist()), iter(reply.logprobs)
    matches = iter(reply.matches)
    return replace(
        reply,
        logprobs=[[next(flat)[0] for _ in row] for row in request.questions],
        matches=[[next(matches)[0] for _ in row] for row in request.questions],
        latents_grad=torch.stack([part.mean(0) for part in parts]),
    )


def without_fusion(anchor: FrozenAnchor, request: ReadRequest) -> ReadReply:
    """Forward, then forward and backward again with the weights of the answer tokens: two calls instead of one."""
    scores = anchor.read(replace(request, gradient=Gradient.NONE))
    counts = [[len(tokens) for tokens in row] for row in scores.logprobs]
    flat = iter(mean_answer_weights(counts, request.count_end_of_turn))
    weights = [[[-next(flat) for _ in range(n)] for n in row] for row in counts]
    return anchor.read(replace(request, gradient=Gradient.VJP, token_weights=weights))


def without_cached_prefix(anchor: FrozenAnchor, request: ReadRequest) -> ReadReply:
    """The prompt before the latents computed in every row of every call."""

    def whole_rows(*arguments: Any, cache_prefix: bool) -> PackedRows:
        return pack_questions(*arguments)

    def score(model: VisionLanguageModel, rows: PackedRows, media: Tensor | None, prefix: CachedPrefix) -> AnswerScores:
        return score_answers(model, rows, media)

    with mock.patch(f"{_ANCHOR}.pack_questions", whole_rows), mock.patch(f"{_ANCHOR}.score_answers", score):
        return anchor.read(request)


def without_answer_rows(anchor: FrozenAnchor, request: ReadRequest) -> ReadReply:
    """Logits at every position, in float32, of which the answer's are used."""
    with mock.patch(f"{_ANCHOR}.score_answers", _score_with_all_logits):
        return anchor.read(request)


def without_chunks(anchor: FrozenAnchor, request: ReadRequest) -> ReadReply:
    """The answer's logits all at once, under plain autograd."""
    with mock.patch("shared.reading.token_logprobs", _plain_logprobs):
        return anchor.read(request)


def without_last_layer_cut(anchor: FrozenAnchor, request: ReadRequest) -> ReadReply:
    """What follows the last attention, at every column."""
    with mock.patch("shared.reading.last_layer_at", return_value=contextlib.nullcontext()):
        return anchor.read(request)


def without_gated_product(anchor: FrozenAnchor, request: ReadRequest) -> ReadReply:
    """silu(gate) · up under plain autograd, which keeps three tensors instead of two."""
    with mock.patch("shared.vlm.lean.gated_product", lambda gate, up: F.silu(gate) * up):
        return anchor.read(request)


def without_grouped_attention(anchor: FrozenAnchor, request: ReadRequest) -> ReadReply:
    """Keys and values repeated for every head."""
    decoder = anchor.model.decoder
    decoder.set_attn_implementation("sdpa")
    try:
        return anchor.read(request)
    finally:
        decoder.set_attn_implementation(ATTENTION)


READ_SWITCHES: dict[str, Read] = {
    "packing": without_packing,
    "one fused pass": without_fusion,
    "cached prefix": without_cached_prefix,
    "answer-only logits": without_answer_rows,
    "chunked cross entropy": without_chunks,
    "last layer cut to answers": without_last_layer_cut,
    "gated product": without_gated_product,
    "grouped attention": without_grouped_attention,
}
"""What is switched off, and the read without it."""


@contextlib.contextmanager
def with_generator_logits(generator: Generator) -> Iterator[None]:
    """The generator's pass makes logits at every position and keeps all layers' hidden states."""
    model, decode = generator.model, generator.model.decode_embeddings

    def emit(tokens: ImageTokens) -> Tensor:
        def with_logits(embeds_BTD: Tensor, mask: Tensor, positions: Tensor, **extra: Any) -> Tensor:
            hidden_BTD = decode(embeds_BTD, mask, positions, output_hidden_states=True, **extra)
            F.linear(hidden_BTD, *model.head())
            return hidden_BTD

        with mock.patch.object(model, "decode_embeddings", with_logits):
            return Generator.emit(generator, tokens)

    with mock.patch.object(generator, "emit", emit):
        yield


@contextlib.contextmanager
def with_second_tower_pass(generator: Generator) -> Iterator[None]:
    """The vision tower runs twice per image, as if generator and concept term shared nothing."""

    def twice(inputs: dict[str, Tensor]) -> ImageTokens:
        Generator.image_tokens_from(generator, inputs)
        return Generator.image_tokens_from(generator, inputs)

    with mock.patch.object(generator, "image_tokens_from", twice):
        yield


STEP_SWITCHES: dict[str, Callable[[Generator], contextlib.AbstractContextManager[None]]] = {
    "generator pass without logits": with_generator_logits,
    "vision features once": with_second_tower_pass,
}


def _score_with_all_logits(
    model: VisionLanguageModel,
    rows: PackedRows,
    media_ID: Tensor | None,
    deepstack: Sequence[Tensor] = (),
    prefix: CachedPrefix | None = None,
) -> AnswerScores:
    cache = None if prefix is None else prefix.for_rows(len(rows.token_ids_BT))
    hidden_BTD = model.decode(rows, media_ID, deepstack, cache)
    logits_BTV = F.linear(hidden_BTD, *model.head()).float()
    images_N, columns_N = rows.predict_N2.unbind(1)
    labels_BT = torch.full_like(rows.token_ids_BT, -100)
    labels_BT[images_N, columns_N] = rows.targets_N
    nll_BT = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), reduction="none").view_as(labels_BT)
    best_N = logits_BTV.argmax(-1)[images_N, columns_N]
    return AnswerScores(-nll_BT[images_N, columns_N], best_N, best_N == rows.targets_N, rows.counts)


def _plain_logprobs(
    hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor
) -> tuple[Tensor, Tensor]:
    logits_NV = F.linear(hidden_ND, head_VD, bias_V).float()
    return -F.cross_entropy(logits_NV, targets_N, reduction="none"), logits_NV.argmax(-1)
