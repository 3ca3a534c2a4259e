"""The bridge's gradient is the gradient of the same anchor in the same process.

The reference knows neither packing nor bridge nor anchor: it runs each question alone through the anchor's own
decoder, with `torch.autograd` from the log-probabilities back to the latents.

Legend: B images, R anchors, K latents, D width, T row length, N answer tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from anchor_service.pool import AnchorPool
from shared.config import GeneratorConfig
from shared.messages import Gradient, Question
from shared.vlm import VisionLanguageModel, load_vlm
from shared.vlm.generator import Generator
from tests.integration.helpers import (
    LATENTS,
    QUESTIONS,
    anchor_config,
    fused_request,
    generator_side,
    pool_config,
    random_latents,
    relative_error,
)
from tests.tiny_models import FAMILY_NAMES, build_tiny
from trainer.bridge import AnchorBridge

MAX_RELATIVE_ERROR = 1e-5
MODES = (Gradient.FUSED, Gradient.VJP)
FolderOf = Callable[[str], Path]


def reference_nll(model: VisionLanguageModel, latents_BKD: Tensor, questions: Sequence[Sequence[Question]]) -> Tensor:
    """(B,) mean over questions of the mean −log p over answer tokens, one unpadded row per question."""
    nll = []
    for latents_KD, asked in zip(latents_BKD, questions, strict=True):
        per_question = []
        for branch in model.prompt.branches([asked])[0]:
            prefix_TD = model.embed(torch.tensor(model.prompt.prefix_ids, dtype=torch.long))
            branch_TD = model.embed(torch.tensor(branch.token_ids[:-1]))
            row_1TD = torch.cat([prefix_TD, latents_KD, branch_TD]).unsqueeze(0)
            positions_1T = torch.arange(row_1TD.shape[1]).unsqueeze(0)
            positions = positions_1T.expand(3, 1, -1) if model.family.uses_mrope else positions_1T
            hidden_TD = model.decoder(inputs_embeds=row_1TD, position_ids=positions, use_cache=False)[0][0]
            logprobs_TV = model.hf_model.get_output_embeddings()(hidden_TD).log_softmax(-1)
            targets_N = torch.tensor(branch.token_ids[branch.answer_start :])
            per_question.append(-logprobs_TV[-len(targets_N) :].gather(1, targets_N.unsqueeze(1)).mean())
        nll.append(torch.stack(per_question).mean())
    return torch.stack(nll)


def loss_of(nll_B: Tensor) -> Tensor:
    """Some function of the NLLs that is neither linear nor the same for every image."""
    return (nll_B**2 * torch.linspace(0.5, 2.0, len(nll_B))).sum()


def leaf(latents_BKD: Tensor) -> Tensor:
    return latents_BKD.clone().requires_grad_()


@pytest.fixture(scope="module")
def references(tiny_folder: FolderOf) -> dict[str, tuple[Tensor, Tensor]]:
    """Per family the NLLs (B,) and the gradient of `loss_of` (B, K, D)."""
    results = {}
    for family in FAMILY_NAMES:
        latents_BKD = leaf(random_latents(len(QUESTIONS)))
        nll_B = reference_nll(load_vlm(str(tiny_folder(family))).freeze(), latents_BKD, QUESTIONS)
        (gradient_BKD,) = torch.autograd.grad(loss_of(nll_B), latents_BKD)
        results[family] = (nll_B.detach(), gradient_BKD)
    return results


@pytest.fixture(scope="module")
def ray_pool(local_ray: None, tiny_folder: FolderOf) -> Iterator[AnchorPool]:
    """One actor per family, with weights 1, 2, 3, …"""
    with _pool(tiny_folder, "ray") as pool:
        yield pool


@pytest.fixture(scope="module")
def local_pool(tiny_folder: FolderOf) -> Iterator[AnchorPool]:
    with _pool(tiny_folder, "local") as pool:
        yield pool


def _pool(tiny_folder: FolderOf, placement: str) -> AnchorPool:
    anchors = [
        anchor_config(family, tiny_folder(family), placement=placement, weight=1.0 + i)
        for i, family in enumerate(FAMILY_NAMES)
    ]
    return AnchorPool.start(pool_config(anchors), generator_side())


def _check(bridge: AnchorBridge, family: str, reference: tuple[Tensor, Tensor]) -> None:
    """One row of the bridge's output and its gradient against the reference."""
    nll_B, gradient_BKD = reference
    latents_BKD = leaf(random_latents(len(QUESTIONS)))
    output = bridge.read(latents_BKD, QUESTIONS)
    row_B = output.nll_RB[list(output.replies).index(family)]
    loss_of(row_B).backward()
    assert relative_error(row_B.detach(), nll_B) <= MAX_RELATIVE_ERROR
    assert relative_error(latents_BKD.grad, gradient_BKD) <= MAX_RELATIVE_ERROR


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("placement", ["ray", "local"])
def test_gradient_of_every_family(
    request: pytest.FixtureRequest, references: dict[str, tuple[Tensor, Tensor]], placement: str, family: str, mode
) -> None:
    pool = request.getfixturevalue(f"{placement}_pool")
    _check(AnchorBridge(pool, mode, count_end_of_turn=True), family, references[family])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_gradient_through_shared_base(
    tiny_folder: FolderOf, references: dict[str, tuple[Tensor, Tensor]], family: str, mode
) -> None:
    """The reference is the untouched base model, so an adapter that is not fully off would show."""
    generator = Generator(GeneratorConfig(model=str(tiny_folder(family)), latents=LATENTS, device="cpu"), seed=0)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    config = pool_config([anchor_config(family, tiny_folder(family), placement="shared_base")])
    with AnchorPool.start(config, generator.handshake(), (generator.model, generator.adapter_off)) as pool:
        _check(AnchorBridge(pool, mode, count_end_of_turn=True), family, references[family])
    assert all(parameter.grad is None for parameter in generator.model.hf_model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_unequal_weights(ray_pool: AnchorPool, references: dict[str, tuple[Tensor, Tensor]], mode) -> None:
    """Anchors of weights 1 … 7 together: Σ w_r loss_r / Σ w_r, one graph."""
    latents_BKD = leaf(random_latents(len(QUESTIONS)))
    output = AnchorBridge(ray_pool, mode, count_end_of_turn=True).read(latents_BKD, QUESTIONS)
    sum(weight * loss_of(row_B) for weight, row_B in zip(output.weights_R, output.nll_RB, strict=True)).backward()
    total = sum(range(1, len(FAMILY_NAMES) + 1))
    expected_BKD = sum((1 + i) / total * references[family][1] for i, family in enumerate(FAMILY_NAMES))
    assert relative_error(latents_BKD.grad, expected_BKD) <= MAX_RELATIVE_ERROR


@pytest.fixture(scope="module")
def replicas(local_ray: None, tiny_folder: FolderOf) -> Iterator[AnchorPool]:
    config = pool_config([anchor_config("qwen2_5_vl", tiny_folder("qwen2_5_vl"), replicas=2)])
    with AnchorPool.start(config, generator_side()) as pool:
        yield pool


@pytest.mark.parametrize("mode", MODES)
def test_two_replicas_share_the_images(
    replicas: AnchorPool, references: dict[str, tuple[Tensor, Tensor]], mode
) -> None:
    assert len({facts.pid for facts in replicas.facts()["qwen2_5_vl"]}) == 2
    _check(AnchorBridge(replicas, mode, count_end_of_turn=True), "qwen2_5_vl", references["qwen2_5_vl"])


def test_fewer_images_than_replicas(replicas: AnchorPool, local_pool: AnchorPool) -> None:
    request = fused_request("one", n_images=1)
    split, whole = (pool.read({"qwen2_5_vl": request})["qwen2_5_vl"] for pool in (replicas, local_pool))
    assert relative_error(split.latents_grad, whole.latents_grad) <= MAX_RELATIVE_ERROR


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_travels_bit_for_bit(local_ray: None, tmp_path: Path, mode) -> None:
    """The actor's process computes what this one computes; NumPy, which carries it, has no bfloat16."""
    folder = build_tiny("qwen2_5_vl", tmp_path / "model", dtype="bfloat16")
    gradients = []
    for placement in ("ray", "local"):
        config = pool_config([anchor_config("a", folder, placement=placement, dtype="bfloat16")])
        with AnchorPool.start(config, generator_side(dtype="bfloat16")) as pool:
            latents_BKD = leaf(random_latents(len(QUESTIONS), dtype=torch.bfloat16))
            output = AnchorBridge(pool, mode, count_end_of_turn=True).read(latents_BKD, QUESTIONS)
            loss_of(output.nll_RB[0]).backward()
            gradients.append(latents_BKD.grad)
    assert gradients[0].dtype is torch.bfloat16
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)
