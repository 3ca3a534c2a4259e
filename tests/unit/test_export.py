"""An exported language model is the anchor's own function of text and latents, whatever family it came from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from anchor_service.cli import app
from anchor_service.export import language_model, with_padded_heads
from shared.messages import Question
from shared.packing import Media
from shared.reading import pack_questions
from shared.vlm import VisionLanguageModel, load_vlm
from tests.integration.helpers import training_tree, write_config
from tests.tiny_models import TINY, build_tiny

K = 4
QUESTION = Question("what color is the circle?", "red")


def prompt_embeddings(vlm: VisionLanguageModel) -> tuple[Tensor, Tensor]:
    """(1, T, D) embeddings of a question about K latents, and the anchor's own logits (1, T, V) for them."""
    torch.manual_seed(0)
    latents_KD = torch.randn(K, vlm.width)
    rows = pack_questions(vlm, [[Media(K)]], [[QUESTION]])
    embeds_BTD = vlm.row_embeddings(rows, latents_KD)
    head_VD, _ = vlm.head()
    return embeds_BTD, vlm.decode(rows, latents_KD) @ head_VD.T


@pytest.mark.parametrize("family", TINY)
@torch.no_grad()
def test_logits_are_the_anchors(family: str, tmp_path: Path) -> None:
    vlm = load_vlm(str(build_tiny(family, tmp_path / "model"))).freeze()
    embeds_BTD, expected_BTV = prompt_embeddings(vlm)
    language_model(vlm).save_pretrained(tmp_path / "language")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "language")
    assert not any("vis" in name for name, _ in loaded.named_parameters())
    torch.testing.assert_close(loaded(inputs_embeds=embeds_BTD).logits, expected_BTV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [f for f in TINY if f != "qwen3_vl"])
@torch.no_grad()
def test_padded_heads_change_nothing(family: str, tmp_path: Path) -> None:
    vlm = load_vlm(str(build_tiny(family, tmp_path / "model"))).freeze()
    embeds_BTD, expected_BTV = prompt_embeddings(vlm)
    wide = with_padded_heads(language_model(vlm), 32)
    assert wide.config.head_dim == 32
    torch.testing.assert_close(wide(inputs_embeds=embeds_BTD).logits, expected_BTV, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_command_writes_a_checkpoint_that_loads_by_itself(toy_folder: Path, tmp_path: Path) -> None:
    config = write_config(training_tree(toy_folder, tmp_path / "run"), tmp_path / "config.yaml")
    arguments = ["export", "--config", str(config), "--anchor", "A", "--to", str(tmp_path / "A")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    vlm = load_vlm(str(toy_folder / "A")).freeze()
    embeds_BTD, expected_BTV = prompt_embeddings(vlm)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "A")
    torch.testing.assert_close(loaded(inputs_embeds=embeds_BTD).logits, expected_BTV, rtol=1e-5, atol=2e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "A").eos_token == vlm.processor.tokenizer.eos_token

    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert "the folder is not empty; name a new one" in again.output
    unknown = CliRunner().invoke(app, [*arguments[:4], "Z", *arguments[5:]])
    assert "--anchor Z: the config has" in unknown.output
    grid = CliRunner().invoke(app, [*arguments[:6], str(tmp_path / "B"), "--set", "pool.latent_positions=grid"])
    assert "use text" in grid.output
