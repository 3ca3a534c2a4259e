"""How many floating point operations a pass of a decoder, its LoRA or a vision tower takes, from their sizes alone.

A multiplication with an addition counts as two operations. Norms, activations, softmax and rotary embeddings are
left out: they are a percent or less of a model of useful width. Attention is counted as it is computed, over every
key of the row, masked ones too (the fused kernels do not skip masked blocks of an arbitrary mask).

Legend: T tokens computed in one row, S keys that each of them is compared with (T and a cached prefix), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class DecoderSize:
    """Widths of a gated decoder (Llama, Qwen): attention_width is heads · head width, kv_width that of keys alone."""

    layers: int
    width: int
    ffn_width: int
    attention_width: int
    kv_width: int
    vocabulary: int

    @property
    def linear_weights(self) -> int:
        """Weights of the linear layers of the whole stack, head and embedding not among them."""
        attention = self.width * (2 * self.attention_width + 2 * self.kv_width)
        return self.layers * (attention + 3 * self.width * self.ffn_width)


def decoder_size(config: Any) -> DecoderSize:
    """Sizes of the language model in a `transformers` config."""
    text = config.get_text_config()
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return DecoderSize(
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        ffn_width=text.intermediate_size,
        attention_width=text.num_attention_heads * head_width,
        kv_width=text.num_key_value_heads * head_width,
        vocabulary=text.vocab_size,
    )


def forward_flops(size: DecoderSize, n_rows: int, n_tokens: int, n_keys: int, n_outputs: int | None = None) -> int:
    """One pass through the stack, without the head: n_rows rows of T = n_tokens tokens over S = n_keys keys.

    n_outputs: at how many places the last hidden state is wanted, in all rows together; None: at all of them.
    """
    per_token = 2 * size.linear_weights + 4 * size.layers * size.attention_width * n_keys
    return n_rows * n_tokens * per_token - _left_out(size, n_rows * n_tokens, n_outputs)


def input_gradient_flops(
    size: DecoderSize, n_rows: int, n_tokens: int, n_keys: int, n_outputs: int | None = None
) -> int:
    """Backward through a frozen stack: each weight once more, and twice the products of attention."""
    per_token = 2 * size.linear_weights + 8 * size.layers * size.attention_width * n_keys
    return n_rows * n_tokens * per_token - _left_out(size, n_rows * n_tokens, n_outputs)


def _left_out(size: DecoderSize, all_tokens: int, n_outputs: int | None) -> int:
    """The last layer's feed-forward where no last hidden state is wanted (`shared.vlm.lean.last_layer_at`)."""
    return 0 if n_outputs is None else 6 * size.width * size.ffn_width * (all_tokens - n_outputs)


def head_flops(size: DecoderSize, n_predictions: int) -> int:
    """Logits of so many hidden states; as many again for the gradient of those states."""
    return 2 * n_predictions * size.width * size.vocabulary


def lora_forward_flops(n_weights: int, n_tokens: int) -> int:
    """The two small products beside each adapted layer; n_weights: of all LoRA matrices together."""
    return 2 * n_weights * n_tokens


def lora_backward_flops(n_weights: int, n_tokens: int) -> int:
    """Gradients of those weights and of what went in."""
    return 4 * n_weights * n_tokens


@dataclass(frozen=True, slots=True)
class TowerSize:
    """A vision tower at one image size.

    patches, tokens: per image, before and after neighbours are merged. patch_weights, token_weights: of the layers
    that run once per patch and once per token. width: of attention. pairs: of a patch and one that it is compared
    with (in its window or the image), of all layers together.
    """

    patches: int
    tokens: int
    patch_weights: int
    token_weights: int
    width: int
    pairs: int


def tower_flops(size: TowerSize, n_images: int) -> int:
    """One pass of the images through the tower and its projection."""
    linear = 2 * (size.patches * size.patch_weights + size.tokens * size.token_weights)
    attention = 4 * size.width * size.pairs
    return n_images * (linear + attention)
