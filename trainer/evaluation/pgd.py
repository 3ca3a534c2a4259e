"""Adversarial images: the picture is changed a little, in the direction in which every anchor answers worse.

The gradient comes the whole way back: from the anchors through the bridge to the latents, through the generator and
its vision tower to the pixels. Projected gradient descent with signs, Madry et al. 2018, "Towards deep learning models
resistant to adversarial attacks", eq. 1; started from the picture itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anchor_service.pool import AnchorPool
from shared.messages import Gradient
from shared.vlm.generator import Generator
from trainer.bridge import AnchorBridge
from trainer.data.records import Record
from trainer.evaluation.reading import batched
from trainer.norm_calibration import NormCalibration, rescale

LEVELS = 8.0
"""Largest change of a pixel, in levels of 0 … 255."""
N_STEPS = 3
_STEP_SHARE = 0.5
"""Size of a step as a share of the largest change."""


def adversarial_latents(
    generator: Generator,
    pool: AnchorPool,
    records: Sequence[Record],
    batch_images: int,
    levels: float = LEVELS,
    calibration: NormCalibration | None = None,
) -> Tensor:
    """(B, K, D) latents of the changed images, in evaluation mode; the attack knows the calibration."""
    generator.train(False)
    bridge = AnchorBridge(pool, Gradient.FUSED, count_end_of_turn=True)
    attacked = [_attack(generator, bridge, chunk, levels, calibration) for chunk in batched(records, batch_images)]
    return torch.cat(attacked)


def _attack(
    generator: Generator,
    bridge: AnchorBridge,
    records: Sequence[Record],
    levels: float,
    calibration: NormCalibration | None,
) -> Tensor:
    rows = [record.load_images() for record in records]
    inputs, per_row = generator.model.image_inputs([image for row in rows for image in row]), [len(row) for row in rows]
    questions = [[question.message for question in record.questions] for record in records]
    original = inputs["pixel_values"]
    # Models see (level/255 − mean)/std: the largest std keeps every channel within the bound.
    most = levels / 255 / max(generator.model.processor.image_processor.image_std)
    changed = original.clone()
    norms_B = None
    for _ in range(N_STEPS):
        changed = changed.detach().requires_grad_()
        tokens = generator.model.image_tokens_from({**inputs, "pixel_values": changed}).in_rows(per_row)
        if calibration is not None and norms_B is None:
            norms_B = calibration.observe(tokens)  # of the pictures as they are
        read = bridge.read(rescale(generator.emit(tokens), norms_B), questions)
        (gradient,) = torch.autograd.grad(read.nll_RB.sum(), changed)
        stepped = changed.detach() + _STEP_SHARE * most * gradient.sign()
        changed = original + (stepped - original).clamp(-most, most)
    with torch.no_grad():
        tokens = generator.image_tokens_from({**inputs, "pixel_values": changed})
        return rescale(generator.emit(tokens.in_rows(per_row)), norms_B)
