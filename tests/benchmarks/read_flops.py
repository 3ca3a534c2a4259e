"""Operations of a read on both sides and of the generator's pass, by the formulas of `shared.flops`; with gradient.

Legend: B images, T tokens of a row, S keys of a row, K latents, Q questions per image.
"""

from __future__ import annotations

from shared.flops import (
    DecoderSize,
    forward_flops,
    head_flops,
    input_gradient_flops,
    lora_backward_flops,
    lora_forward_flops,
)
from tests.benchmarks.models import ANSWER_TOKENS, BRANCH_TOKENS, HEADER_TOKENS

_PREFIX = HEADER_TOKENS + 1


def packed_read_flops(size: DecoderSize, n_images: int, n_latents: int, n_questions: int) -> int:
    """The project's read: latents and branches in one row, the prefix known; last layer and logits for answers."""
    n_tokens = packed_tokens(n_latents, n_questions)
    n_predictions = n_images * n_questions * (ANSWER_TOKENS + 1)
    shape = (size, n_images, n_tokens, _PREFIX + n_tokens, n_predictions)
    return forward_flops(*shape) + input_gradient_flops(*shape) + 2 * head_flops(size, n_predictions)


def packed_tokens(n_latents: int, n_questions: int) -> int:
    """Tokens that one image's packed row computes. The last one of a branch is only ever a target."""
    return n_latents + n_questions * (BRANCH_TOKENS - 1)


def loop_read_flops(size: DecoderSize, n_images: int, n_latents: int, n_questions: int) -> int:
    """The baseline loop: a pass per question over whole rows, with logits at every position."""
    n_tokens = _PREFIX + n_latents + BRANCH_TOKENS
    shape = (size, n_images, n_tokens, n_tokens)
    logits = 2 * head_flops(size, n_images * n_tokens)
    return n_questions * (forward_flops(*shape) + input_gradient_flops(*shape) + logits)


def generator_flops(size: DecoderSize, n_images: int, n_tokens: int, rank: int) -> int:
    """The generator's pass over rows of T = n_tokens, LoRA on every linear layer; vision tower and head not counted."""
    stack = forward_flops(size, n_images, n_tokens, n_tokens) + input_gradient_flops(size, n_images, n_tokens, n_tokens)
    attention_ends = 4 * size.width + 2 * size.attention_width + 2 * size.kv_width
    lora_weights = rank * size.layers * (attention_ends + 3 * (size.width + size.ffn_width))
    tokens = n_images * n_tokens
    return stack + lora_forward_flops(lora_weights, tokens) + lora_backward_flops(lora_weights, tokens)
