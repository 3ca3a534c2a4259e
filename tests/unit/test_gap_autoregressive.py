"""Latents fed back one by one, with cached keys and values, against a recomputation of everything at every step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shared.config import NormCalibrationConfig
from shared.errors import ConfigError, ModelError
from shared.messages import Question
from shared.vlm import GrowingRows, VisionLanguageModel, load_vlm
from tests.reference import max_relative_error, plain_prompt
from tests.tiny_models import FAMILY_NAMES, WIDTH
from trainer.gap.autoregressive import TOKEN_BUDGETS, generate_latents, latent_positions
from trainer.gap.heads import IdentityHead, MlpHead, PcaHead
from trainer.gap.pca import IncrementalPca
from trainer.norm_calibration import NormCalibration

FAMILIES = ["qwen2_5_vl", "qwen3_vl", "llava_onevision"]
QUESTIONS = [
    Question("what color is the square?", "red"),
    Question("how many?", "4"),
    Question("is there a red thing?", "no"),
]
K = 4


def head_of(kind: str) -> torch.nn.Module:
    torch.manual_seed(7)
    if kind == "pca":
        pca = IncrementalPca(WIDTH)
        pca.update(torch.randn(60, WIDTH) + 0.5)
        return PcaHead(pca.fit(n_components=5)).double()
    return (MlpHead(WIDTH) if kind == "mlp" else IdentityHead()).double()


def question_ids(model: VisionLanguageModel, question: Question) -> list[int]:
    """Everything after the image up to where the answer begins."""
    ((branch,),) = model.prompt.branches([[question]])
    return list(branch.token_ids[: branch.answer_start])


def plain_generate(model, picture, question, head, n_latents, on_grid=False, norm=None) -> tuple[Tensor, Tensor]:
    """Latents (K, D) and the hidden state after the last one (D,): the model's own forward over all inputs, every time.

    The prompt is that of the chat template, the positions are Hugging Face's, as if the latents were an image's tokens.
    """
    tokens = model.image_tokens([picture])
    n_image, grid = len(tokens.tokens[0]), tokens.grids[0]
    prompt = plain_prompt(model, question, n_image)
    ids = prompt.input_ids[:, : -prompt.n_answer]
    is_image = ids == model.image_token_id
    embeds_1TD = model.hf_model.get_input_embeddings()(ids).masked_scatter(is_image.unsqueeze(-1), tokens.tokens[0])
    positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
    if model.family.uses_mrope:
        merge = model.inner.visual.spatial_merge_size
        thw = torch.tensor([[1, grid[0] * merge, grid[1] * merge]])
        positions, _ = model.inner.get_rope_index(ids, is_image.int(), thw)
    start, side = int(positions.max()) + 1, round(n_latents**0.5)
    latents: list[Tensor] = []
    while True:
        extra = {}
        if tokens.deepstack:
            seen = torch.cat([is_image, torch.zeros(1, len(latents), dtype=torch.bool)], dim=1)
            extra = {"visual_pos_masks": seen, "deepstack_visual_embeds": tokens.deepstack}
        hidden_D = model.decoder(
            inputs_embeds=torch.cat([embeds_1TD, *(latent[None, None] for latent in latents)], dim=1),
            position_ids=positions if model.family.uses_mrope else positions[0],
            use_cache=False,
            **extra,
        ).last_hidden_state[0, -1]
        if len(latents) == n_latents:
            return torch.stack(latents), hidden_D
        latent_D = head(hidden_D)
        latents.append(latent_D if norm is None else latent_D / latent_D.norm() * norm)
        k = len(latents) - 1
        place = [0, k // side, k % side] if on_grid else [k] * 3
        positions = torch.cat([positions, start + torch.tensor(place).reshape(3, 1, 1)], dim=2)


def grown(model, pictures, questions) -> GrowingRows:
    rows = GrowingRows.after_images(model, model.image_tokens(pictures))
    rows.append_tokens([question_ids(model, question) for question in questions])
    return rows


@pytest.mark.parametrize("kind", ["identity", "mlp", "pca"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
@torch.no_grad()
def test_equals_the_full_recomputation(tiny_model, pictures, family, kind):
    """Three rows of different pictures and questions in one batch."""
    model, head = tiny_model(family, "float64"), head_of(kind)
    rows = grown(model, pictures, QUESTIONS)
    latents_BKD = generate_latents(rows, K, head)
    for b, picture in enumerate(pictures):
        reference_KD, after_D = plain_generate(model, picture, QUESTIONS[b], head, K)
        assert max_relative_error(latents_BKD[b], reference_KD) <= 1e-9
        assert max_relative_error(rows.hidden_BD[b], after_D) <= 1e-9
    assert max_relative_error(latents_BKD[0], latents_BKD[1]) > 1e-3


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_on_a_grid_latents_stand_like_an_image(tiny_model, pictures, family):
    model, head = tiny_model(family, "float64"), head_of("pca")
    rows = grown(model, pictures, QUESTIONS)
    before_B = rows.next_B
    latents_BKD = generate_latents(rows, 9, head, on_grid=True)
    assert torch.equal(rows.next_B, before_B + 3)
    reference_KD, after_D = plain_generate(model, pictures[1], QUESTIONS[1], head, 9, on_grid=True)
    assert max_relative_error(latents_BKD[1], reference_KD) <= 1e-9
    assert max_relative_error(rows.hidden_BD[1], after_D) <= 1e-9
    plain_KD, _ = plain_generate(model, pictures[1], QUESTIONS[1], head, 9)
    assert max_relative_error(latents_BKD[1], plain_KD) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_the_full_recomputation(tiny_folder, pictures, family):
    """With respect to the head and to layers of the decoder, through all latents and their caches."""
    model, head = load_vlm(tiny_folder(family, "float64"), "float64").freeze(), head_of("pca")
    weights = [model.decoder.layers[i].self_attn.k_proj.weight.requires_grad_() for i in (0, -1)]
    weights += [model.decoder.layers[0].mlp.down_proj.weight.requires_grad_(), *head.parameters()]
    noise = torch.Generator().manual_seed(3)
    probe_BKD = torch.randn(2, K, WIDTH, generator=noise, dtype=torch.float64)
    probe_BD = torch.randn(2, WIDTH, generator=noise, dtype=torch.float64)

    rows = grown(model, pictures[:2], QUESTIONS[:2])
    latents_BKD = generate_latents(rows, K, head)
    objective = (latents_BKD * probe_BKD).sum() + (rows.hidden_BD * probe_BD).sum()
    gradients = torch.autograd.grad(objective, weights)

    plain = torch.zeros(())
    for b in range(2):
        reference_KD, after_D = plain_generate(model, pictures[b], QUESTIONS[b], head, K)
        plain = plain + (reference_KD * probe_BKD[b]).sum() + (after_D * probe_BD[b]).sum()
    references = torch.autograd.grad(plain, weights)
    assert objective.item() == pytest.approx(plain.item(), rel=1e-9)
    for gradient, reference in zip(gradients, references, strict=True):
        assert reference.abs().max() > 1e-3
        # The models' RMS norms compute in float32 whatever the dtype.
        assert max_relative_error(gradient, reference) <= 2e-6


@torch.no_grad()
def test_calibrated_latents_are_fed_back_calibrated(tiny_model, pictures):
    model, head = tiny_model("qwen2_5_vl", "float64"), head_of("identity")
    tokens = model.image_tokens(pictures)
    norms_B = NormCalibration(NormCalibrationConfig(decay=0.5)).observe(tokens)
    latents_BKD = generate_latents(grown(model, pictures, QUESTIONS), K, head, norms_B=norms_B)
    for b, picture in enumerate(pictures):
        reference_KD, _ = plain_generate(model, picture, QUESTIONS[b], head, K, norm=float(norms_B[b]))
        assert max_relative_error(latents_BKD[b], reference_KD) <= 1e-9


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_latent_costs_one_position(tiny_model, pictures, family):
    model = tiny_model(family)
    rows = grown(model, pictures, QUESTIONS)
    columns: list[int] = []
    hook = model.decoder.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: columns.append(args[0].shape[1]), with_kwargs=True
    )
    generate_latents(rows, 6, IdentityHead())
    hook.remove()
    assert columns == [1] * 6


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_selected_rows_go_on_as_they_would_alone(tiny_model, pictures, family):
    """Branching: one image read once, three questions behind it, one of them twice; then a row is dropped."""
    model, head = tiny_model(family, "float64"), head_of("mlp")
    images = GrowingRows.after_images(model, model.image_tokens(pictures))
    branches = images.select([1, 1, 0, 1])
    questions = [QUESTIONS[0], QUESTIONS[2], QUESTIONS[1], QUESTIONS[2]]
    branches.append_tokens([question_ids(model, question) for question in questions])
    assert len(images) == 3
    assert len(branches) == 4
    kept = branches.select([3, 0])
    latents_BKD = generate_latents(kept, K, head)
    for row, b in enumerate((3, 0)):
        reference_KD, _ = plain_generate(model, pictures[1], questions[b], head, K)
        assert max_relative_error(latents_BKD[row], reference_KD) <= 1e-9


@torch.no_grad()
def test_several_images_a_row(tiny_model, pictures):
    """Rows of one and of two images equal the same rows alone."""
    model, head = tiny_model("qwen2_5_vl", "float64"), head_of("mlp")
    tokens = model.image_tokens(pictures).in_rows([1, 2])
    rows = GrowingRows.after_images(model, tokens)
    rows.append_tokens([question_ids(model, question) for question in QUESTIONS[:2]])
    latents_BKD = generate_latents(rows, K, head)
    alone = GrowingRows.after_images(model, model.image_tokens(pictures[1:]).in_rows([2]))
    alone.append_tokens([question_ids(model, QUESTIONS[1])])
    assert max_relative_error(latents_BKD[1:], generate_latents(alone, K, head)) <= 1e-9


def test_positions_of_token_budgets():
    for n in TOKEN_BUDGETS:
        side = round(n**0.5)
        expected = [[0, k // side, k % side] for k in range(n)]
        assert latent_positions(n, on_grid=True).T.tolist() == expected
    assert latent_positions(3, on_grid=False).tolist() == [[0, 1, 2]] * 3
    with pytest.raises(ConfigError, match="a grid of 12 latents is no square; use one of the token budgets 4, 9, 16"):
        latent_positions(12, on_grid=True)


@torch.no_grad()
def test_a_model_without_a_grid_refuses_one(tiny_model, pictures):
    rows = grown(tiny_model("llava_onevision"), pictures, QUESTIONS)
    with pytest.raises(ModelError, match="family llava_onevision has no image grid"):
        generate_latents(rows, 4, IdentityHead(), on_grid=True)


def test_gradient_checkpointing_is_refused(tiny_folder, pictures):
    """It would drop the cache in silence, and every latent would be predicted from nothing but the one before it."""
    model = load_vlm(tiny_folder("qwen2_5_vl"))
    model.decoder.gradient_checkpointing_enable({"use_reentrant": False})
    model.hf_model.train()
    with pytest.raises(ConfigError, match=r"generator.gradient_checkpointing: .* set it to false"):
        GrowingRows.after_images(model, model.image_tokens(pictures))
