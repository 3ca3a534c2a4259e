"""The memory estimate against real, loaded models: counts must be exact, activations must bound what autograd keeps."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2_5_VLConfig

from shared.config import Config, GeneratorConfig, LoraConfig, parse_config
from shared.errors import ModelError
from shared.messages import Question
from shared.packing import latent_media
from shared.reading import pack_questions
from shared.vlm import load_vlm
from trainer.estimate import activation_bytes, estimate_memory, lora_parameters, model_facts, print_estimate
from trainer.generator import Generator
from trainer.toy.tiny_vlms import new_model, save_folder
from trainer.toy.world import IMAGE_PX

FAMILIES = ("qwen2_5_vl", "llava")
IMAGES = [Image.new("RGB", (IMAGE_PX, IMAGE_PX), (200, 60, 60))] * 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        save_folder(new_model(family, seed=0), root / family)
    return {family: str(root / family) for family in FAMILIES}


def config_with(model: str, anchors: list[dict], **sections: dict) -> Config:
    tree = {
        "run": {"dir": "unused"},
        "generator": {"model": model, "latents": 9, "lora": {"rank": 4, "alpha": 8}},
        "anchors": anchors,
        "data": {"source": "toy", "path": "unused", "questions_per_image": 2},
        "train": {"batch_images": 4},
    }
    for name, section in sections.items():
        tree[name] = {**tree[name], **section}
    return parse_config(tree, "test")


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_equal_the_loaded_models(folders: dict[str, str], family: str) -> None:
    loaded = load_vlm(folders[family])
    facts = model_facts(folders[family], (IMAGE_PX, IMAGE_PX))
    assert facts.parameters == sum(p.numel() for p in loaded.hf_model.parameters())
    assert facts.width == loaded.width
    assert facts.image_tokens == len(loaded.image_tokens(IMAGES).tokens[0])


def test_tied_embeddings_are_counted_once(folders: dict[str, str], tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(folders["qwen2_5_vl"])
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    saved = model_facts(str(tmp_path)).parameters
    assert saved == sum(p.numel() for p in loaded.parameters())
    assert saved == model_facts(folders["qwen2_5_vl"]).parameters - 128 * 64


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), LoraConfig().targets])
def test_lora_counts_equal_pefts_own(folders: dict[str, str], family: str, targets: tuple[str, ...]) -> None:
    lora = LoraConfig(rank=5, alpha=5.0, targets=targets)
    generator = Generator(GeneratorConfig(model=folders[family], latents=9, device="cpu", lora=lora), seed=0)
    facts = model_facts(folders[family])
    n_trainable, n_all = generator.peft_model.get_nb_trainable_parameters()
    n_lora, n_rows = lora_parameters(facts, lora), (1 + 9) * facts.width
    assert n_trainable == n_lora + n_rows
    assert n_lora == sum(p.numel() for p in generator.lora_parameters) > 0
    assert n_all == facts.parameters + n_trainable


def bytes_kept(forward, weights) -> int:
    """Bytes of the distinct storages that autograd keeps for backward, weights aside."""
    of_weights = {p.untyped_storage().data_ptr() for p in weights}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()  # must stay alive, or storages would be reused and counted once
    assert result.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_bound_what_autograd_keeps(folders: dict[str, str], family: str, dtype: str) -> None:
    """The formula leaves room for gradients on their way: at least what is kept, at most double of it."""
    config = GeneratorConfig(model=folders[family], latents=9, dtype=dtype, device="cpu", lora=LoraConfig(rank=4))
    generator = Generator(config, seed=0)
    facts = model_facts(folders[family], (IMAGE_PX, IMAGE_PX))
    weights = list(generator.peft_model.parameters())
    tokens = generator.image_tokens_from(generator.model.image_inputs(IMAGES))

    prompt = generator.model.prompt
    n_prompt = len(prompt.prefix_ids) + len(prompt.after_image_ids)
    n_tokens = len(IMAGES) * (n_prompt + facts.image_tokens + 1 + config.latents)
    kept = bytes_kept(lambda: generator.emit(tokens), weights)
    assert kept <= activation_bytes(facts, n_tokens, dtype, trains=True) <= 2 * kept

    questions = [[Question("what color is the circle?", "red"), Question("is it red?", "yes")]] * len(IMAGES)
    rows = pack_questions(generator.model, [latent_media(9, False)] * len(IMAGES), questions)
    latents_ID = torch.randn(9 * len(IMAGES), facts.width).to(generator.model.dtype).requires_grad_()
    with generator.adapter_off():
        kept = bytes_kept(lambda: generator.model.decode(rows, latents_ID), weights)
    assert kept <= activation_bytes(facts, rows.token_ids_BT.numel(), dtype, trains=False) <= 2 * kept


def test_checkpointing_keeps_less_and_bounds_what_autograd_keeps(folders: dict[str, str]) -> None:
    config = GeneratorConfig(model=folders["qwen2_5_vl"], latents=9, device="cpu", gradient_checkpointing=True)
    generator = Generator(config, seed=0)
    generator.train()
    tokens = generator.image_tokens_from(generator.model.image_inputs(IMAGES))
    facts = model_facts(folders["qwen2_5_vl"], (IMAGE_PX, IMAGE_PX))
    prompt = generator.model.prompt
    n_tokens = len(IMAGES) * (len(prompt.prefix_ids) + len(prompt.after_image_ids) + facts.image_tokens + 10)
    kept = bytes_kept(lambda: generator.emit(tokens), list(generator.peft_model.parameters()))
    with_it = activation_bytes(facts, n_tokens, "float32", trains=True, checkpointing=True)
    assert kept <= with_it < activation_bytes(facts, n_tokens, "float32", trains=True)


def test_processes_and_totals(folders: dict[str, str]) -> None:
    a, d = folders["qwen2_5_vl"], folders["llava"]
    facts = {path: model_facts(path, (IMAGE_PX, IMAGE_PX)) for path in (a, d)}
    anchors = [
        {"name": "base", "model": a, "placement": "shared_base"},
        {"name": "here", "model": a, "placement": "local", "dtype": "bfloat16"},
        {"name": "there", "model": d, "placement": "ray", "replicas": 3},
    ]
    trainer, there = estimate_memory(config_with(a, anchors), facts)

    assert trainer.parts["generator weights"] == facts[a].parameters * 4
    assert trainer.parts["anchor base weights (the generator's)"] == 0
    assert trainer.parts["anchor here weights"] == facts[a].parameters * 2
    lora = lora_parameters(facts[a], LoraConfig(rank=4))
    head = 64 * 32 + 32 + 32 * 64 + 64
    assert trainer.parts["trained: parameters"] == 4 * (lora + 10 * 64 + head)
    assert trainer.parts["trained: AdamW moments"] == 8 * (lora + 10 * 64 + head)
    assert trainer.total == sum(trainer.parts.values())

    assert (there.replicas, there.device) == (3, "CPU")
    assert there.parts["weights"] == facts[d].parameters * 4
    # 4 images on 3 replicas: 2 on the fullest; 2 questions of 4 answer tokens; logits, their float32 copies.
    assert there.parts["logits of answer rows"] == 2 * 2 * 4 * facts[d].vocabulary * (2 * 4 + 12)


def test_microbatches_and_checkpointing_lower_the_estimate(folders: dict[str, str]) -> None:
    a = folders["qwen2_5_vl"]
    facts = {a: model_facts(a, (IMAGE_PX, IMAGE_PX))}
    anchors = [{"name": "base", "model": a, "placement": "shared_base"}]
    (whole,) = estimate_memory(config_with(a, anchors), facts)
    (halves,) = estimate_memory(config_with(a, anchors, train={"microbatches": 2}), facts)
    (saving,) = estimate_memory(config_with(a, anchors, generator={"gradient_checkpointing": True}), facts)
    activations = "generator activations"
    assert halves.parts[activations] * 2 == whole.parts[activations]
    assert saving.parts[activations] < whole.parts[activations]
    assert saving.parts["anchor activations"] == whole.parts["anchor activations"]


def test_a_large_model_is_counted_without_its_weights(tmp_path: Path) -> None:
    """Qwen2.5-VL-7B-Instruct: its published weight files hold 16,584,333,312 bytes in bfloat16."""
    Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        vision_config={"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
        tie_word_embeddings=False,
    ).save_pretrained(tmp_path)
    facts = model_facts(str(tmp_path))
    assert facts.parameters * 2 == 16_584_333_312
    assert facts.image_tokens == 11 * 17


def test_printed_tables_name_every_process(folders: dict[str, str]) -> None:
    a = folders["qwen2_5_vl"]
    anchors = [{"name": name, "model": a, "placement": "ray"} for name in ("first", "second")]
    text = io.StringIO()
    print_estimate(config_with(a, anchors), Console(file=text, width=100))
    printed = text.getvalue()
    assert all(part in printed for part in ("trainer (generator)", "anchor first on CPU", "anchor second on CPU"))
    assert printed.count("total") == 3
    assert "Activations are an estimate" in printed


def test_a_model_without_config_is_one_clear_line(folders: dict[str, str], tmp_path: Path) -> None:
    for model in (str(tmp_path), str(tmp_path / "absent"), "no-such-owner/no-such-model"):
        with pytest.raises(ModelError) as caught:
            print_estimate(config_with(model, [{"name": "x", "model": model}]), Console(file=io.StringIO()))
        assert model in str(caught.value)
        assert "\n" not in str(caught.value)
