"""Operations of one read with gradient, counted for both sides by the formulas of `shared.flops`.

Legend: B images, T tokens of a row, S keys of a row, K latents, Q questions per image.
"""

from __future__ import annotations

from shared.flops import DecoderSize, forward_flops, head_flops, input_gradient_flops
from tests.benchmarks.models import ANSWER_TOKENS, BRANCH_TOKENS, HEADER_TOKENS

_PREFIX = HEADER_TOKENS + 1


def packed_read_flops(size: DecoderSize, n_images: int, n_latents: int, n_questions: int) -> int:
    """The project's read: latents and branches in one row, the prefix known, logits of answer tokens alone."""
    # The last token of a branch is only ever a target.
    n_tokens = n_latents + n_questions * (BRANCH_TOKENS - 1)
    n_predictions = n_images * n_questions * (ANSWER_TOKENS + 1)
    return _pass_flops(size, n_images, n_tokens, _PREFIX + n_tokens, n_predictions)


def loop_read_flops(size: DecoderSize, n_images: int, n_latents: int, n_questions: int) -> int:
    """The baseline loop: a pass per question over whole rows, with logits at every position."""
    n_tokens = _PREFIX + n_latents + BRANCH_TOKENS
    return n_questions * _pass_flops(size, n_images, n_tokens, n_tokens, n_images * n_tokens)


def _pass_flops(size: DecoderSize, n_rows: int, n_tokens: int, n_keys: int, n_predictions: int) -> int:
    stack = forward_flops(size, n_rows, n_tokens, n_keys) + input_gradient_flops(size, n_rows, n_tokens, n_keys)
    return stack + 2 * head_flops(size, n_predictions)
