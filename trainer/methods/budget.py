"""What a training step costs the decoder of a model that answers by itself, so that comparisons can be matched."""

from __future__ import annotations

from typing import Any

from shared.flops import decoder_size, forward_flops, head_flops, input_gradient_flops
from shared.packing import PackedRows


def decoder_budget(hf_config: Any, rows: PackedRows, n_predictions: int) -> dict[str, float]:
    """tokens_per_image and flops_per_image of one forward and backward pass, per row, padding included.

    n_predictions: tokens of all rows whose logits the loss takes. Weights are frozen; LoRA and tower are left out, and
    so is the second forward pass of gradient checkpointing.
    """
    size = decoder_size(hf_config)
    n_rows, n_columns = rows.token_ids_BT.shape
    passes = forward_flops(size, n_rows, n_columns, n_columns) + input_gradient_flops(
        size, n_rows, n_columns, n_columns
    )
    head = 2 * head_flops(size, n_predictions)
    return {"tokens_per_image": float(n_columns), "flops_per_image": (passes + head) / n_rows}
