"""The estimate against real, loaded models: counts must be exact, memory within 10 % of what a call allocates."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText

from shared.config import Config, GeneratorConfig, LoraConfig, load_config, parse_config
from shared.errors import ConfigError, ModelError
from shared.messages import Question
from shared.packing import latent_media
from shared.reading import pack_questions, score_answers
from shared.vlm import ImageTokens, VisionLanguageModel, load_processor, load_vlm
from shared.vlm.generator import Generator
from shared.vlm.model import DTYPES
from tests.sized_models import peak_bytes, sized_config, write_sized
from tests.tiny_models import build_tiny
from trainer.estimate import print_estimate
from trainer.estimate.memory import ProcessMemory, activation_bytes, estimate_memory, kept_per_layer, read_bytes
from trainer.estimate.models import lora_parameters, model_facts, models_of
from trainer.estimate.rows import Rows, typical_questions
from trainer.toy.tiny_vlms import new_model, save_folder
from trainer.toy.world import IMAGE_PX

ROOT = Path(__file__).parents[2]
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
        "generator": {"model": model, "latents": 9, "device": "cpu", "lora": {"rank": 4, "alpha": 8}},
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
    assert facts.decoder.width == loaded.width
    assert facts.tower.tokens == len(loaded.image_tokens(IMAGES).tokens[0])


def test_tied_embeddings_are_counted_once(folders: dict[str, str], tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(folders["qwen2_5_vl"])
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    load_processor(folders["qwen2_5_vl"]).tokenizer.save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(folders["qwen2_5_vl"]).save_pretrained(tmp_path)
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
    n_lora, n_rows = lora_parameters(facts, lora), (1 + 9) * facts.decoder.width
    assert n_trainable == n_lora + n_rows
    assert n_lora == sum(p.numel() for p in generator.lora_parameters) > 0
    assert n_all == facts.parameters + n_trainable


def bytes_kept(forward: Callable[[], torch.Tensor], weights: Iterable[torch.Tensor]) -> int:
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


SHAPES = [{"hidden_size": 128, "intermediate_size": 352}, {"hidden_size": 256, "intermediate_size": 512}]
LORA = LoraConfig(rank=8)


def sized_folder(root: Path, family: str, layers: int, shape: dict[str, int], dtype: str = "float32") -> str:
    config = sized_config(family, root, num_hidden_layers=layers, num_attention_heads=4, **shape)
    return write_sized(root, config, DTYPES[dtype])


def emitting(folder: str, dtype: str, checkpointing: bool = False) -> tuple[Generator, ImageTokens, Rows]:
    """A generator, three images' tokens, and the rows that it computes for them."""
    config = GeneratorConfig(
        model=folder, latents=9, dtype=dtype, device="cpu", gradient_checkpointing=checkpointing, lora=LORA
    )
    generator = Generator(config, seed=0)
    generator.train()
    tokens = ImageTokens([torch.randn(64, generator.model.width).to(generator.model.dtype)] * 3, [(8, 8)] * 3)
    prompt = generator.model.prompt
    n_tokens = len(prompt.prefix_ids) + 64 + len(prompt.after_image_ids) + 1 + 9
    return generator, tokens, Rows(3, n_tokens, n_tokens)


def scoring(folder: str, dtype: str) -> tuple[VisionLanguageModel, Callable[[], torch.Tensor], Rows]:
    """A frozen model, a call that reads latents, and its rows."""
    model = load_vlm(folder, dtype).freeze()
    questions = [[Question("what color is the circle?", "red"), Question("is it red?", "yes")] * 3] * 3
    packed = pack_questions(model, [[latent_media(9, False)]] * 3, questions)
    latents_ID = torch.randn(27, model.width).to(model.dtype).requires_grad_()
    n_tokens = packed.token_ids_BT.shape[1]
    return (
        model,
        lambda: score_answers(model, packed, latents_ID).logprobs_N,
        Rows(3, n_tokens, n_tokens, len(packed.targets_N)),
    )


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_layer_keeps_what_the_formula_says(tmp_path: Path, family: str, dtype: str) -> None:
    """One layer more against what autograd keeps more for it: equal up to the norms' and softmax's row sums."""
    generated, read = [], []
    for layers in (2, 3):
        folder = sized_folder(tmp_path / str(layers), family, layers, SHAPES[0], dtype)
        facts = model_facts(folder)
        generator, tokens, rows = emitting(folder, dtype)
        generated.append(bytes_kept(lambda g=generator, t=tokens: g.emit(t), generator.peft_model.parameters()))
        model, score, read_rows = scoring(folder, dtype)
        read.append(bytes_kept(score, model.hf_model.parameters()))
    assert kept_per_layer(facts, rows, dtype, LORA) == pytest.approx(generated[1] - generated[0], rel=0.02)
    assert kept_per_layer(facts, read_rows, dtype) == pytest.approx(read[1] - read[0], rel=0.02)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"width {shape['hidden_size']}")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_predicted_within_ten_percent(tmp_path: Path, shape: dict[str, int], dtype: str) -> None:
    """Of a generator's forward and backward, with and without checkpointing, and of an anchor's read."""
    folder = sized_folder(tmp_path / "model", "qwen2_5_vl", 6, shape, dtype)
    facts = model_facts(folder)
    for checkpointing in (False, True):
        generator, tokens, rows = emitting(folder, dtype, checkpointing)

        def step(g: Generator = generator, t: ImageTokens = tokens) -> None:
            g.emit(t).float().sum().backward()

        step()  # gradients exist from here on, as from the second microbatch; they are counted apart
        predicted = activation_bytes(facts, rows, dtype, LORA, checkpointing)
        assert predicted == pytest.approx(peak_bytes(step), rel=0.1), f"checkpointing {checkpointing}"
    _, score, rows = scoring(folder, dtype)
    score().sum().backward()
    predicted = sum(read_bytes(facts, rows, dtype).values())
    assert predicted == pytest.approx(peak_bytes(lambda: score().sum().backward()), rel=0.1)


def memory(config: Config) -> list[ProcessMemory]:
    return estimate_memory(config, models_of(config), typical_questions(config))


def test_processes_and_totals(folders: dict[str, str]) -> None:
    a, d = folders["qwen2_5_vl"], folders["llava"]
    anchors = [
        {"name": "base", "model": a, "placement": "shared_base"},
        {"name": "here", "model": a, "placement": "local", "dtype": "bfloat16"},
        {"name": "there", "model": d, "placement": "ray", "replicas": 3},
    ]
    config = config_with(a, anchors)
    facts = models_of(config)
    trainer, there = memory(config)

    assert trainer.parts["generator weights"] == facts[a].parameters * 4
    assert trainer.parts["anchor base weights (the generator's)"] == 0
    assert trainer.parts["anchor here weights"] == facts[a].parameters * 2
    lora = lora_parameters(facts[a], LoraConfig(rank=4))
    head = 64 * 32 + 32 + 32 * 64 + 64
    assert trainer.parts["adapter, latent rows and concept head"] == 4 * (lora + 10 * 64 + head)
    assert trainer.parts["AdamW moments"] == 8 * (lora + 10 * 64 + head)
    assert trainer.total == sum(trainer.parts.values())

    assert (there.replicas, there.on_gpu) == (3, False)
    assert there.parts["weights"] == facts[d].parameters * 4
    # 4 images on 3 replicas: 2 on the fullest.
    asked = [question for row in typical_questions(config)[:2] for question in row]
    n_answer_tokens = sum(branch.n_answer for branch in facts[d].prompt.branches([asked])[0])
    assert there.parts["logits of answer tokens"] == n_answer_tokens * facts[d].decoder.vocabulary * 4


def test_microbatches_lower_the_estimate_unless_two_are_in_flight(folders: dict[str, str]) -> None:
    a, part = folders["qwen2_5_vl"], "generator activations, checkpointing off"
    by_placement = {}
    for placement in ("shared_base", "ray"):
        anchors = [{"name": "x", "model": a, "placement": placement}]
        by_placement[placement] = [
            memory(config_with(a, anchors, train={"microbatches": m}))[0].parts[part] for m in (1, 2, 4)
        ]
    whole, half, quarter = by_placement["shared_base"]
    assert whole == pytest.approx(2 * half, rel=1e-6)
    assert by_placement["ray"] == [whole, 2 * half, 2 * quarter]


def test_both_choices_of_checkpointing_are_given(folders: dict[str, str]) -> None:
    a = folders["qwen2_5_vl"]
    anchors = [{"name": "base", "model": a, "placement": "shared_base"}]
    (off,) = memory(config_with(a, anchors))
    (on,) = memory(config_with(a, anchors, generator={"gradient_checkpointing": True}))
    name = "generator activations, checkpointing "
    assert off.otherwise[name + "off"] == (name + "on", on.parts[name + "on"])
    assert on.otherwise[name + "on"] == (name + "off", off.parts[name + "off"])
    assert on.parts[name + "on"] < off.parts[name + "off"]
    assert on.parts["anchor activations"] == off.parts["anchor activations"]


@pytest.fixture(scope="module")
def folder_7b(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Config and processor of Qwen2.5-VL-7B-Instruct's size, without weights."""
    folder = build_tiny("qwen2_5_vl", tmp_path_factory.mktemp("7b") / "model")
    config = AutoConfig.from_pretrained(folder)
    sizes = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    tower = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "out_hidden_size": 3584,
        "num_heads": 16,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    for part, values in ((config.text_config, sizes), (config.vision_config, tower)):
        for name, value in values.items():
            setattr(part, name, value)
    config.text_config.layer_types = ["full_attention"] * 28
    config.save_pretrained(folder)
    return str(folder)


def test_a_large_model_is_counted_without_its_weights(folder_7b: str) -> None:
    """The published weight files of Qwen2.5-VL-7B-Instruct hold 16,584,333,312 bytes in bfloat16."""
    facts = model_facts(folder_7b)
    assert facts.parameters * 2 == 16_584_333_312
    assert facts.tower.tokens == 11 * 17


def printed(config: Config, device: str | None = None) -> str:
    text = io.StringIO()
    print_estimate(config, Console(file=text, width=160), device)
    return text.getvalue()


def test_printed_tables_name_every_process_and_say_what_limits(folders: dict[str, str]) -> None:
    a = folders["qwen2_5_vl"]
    text = printed(config_with(a, [{"name": name, "model": a, "placement": "ray"} for name in ("first", "second")]))
    assert all(part in text for part in ("trainer (generator) on CPU", "anchor first on CPU", "anchor second on CPU"))
    assert text.count("total") == 3
    assert "checkpointing off ← config" in text
    assert "Bottleneck: " in text
    assert "Replicas that keep up with the generator: first " in text


@pytest.mark.parametrize("name", ["a6000", "cluster"])
def test_shipped_gpu_configs_are_estimated(folder_7b: str, name: str) -> None:
    """With a local config of the same size in place of the hub's."""
    path = ROOT / f"deploy/configs/{name}.yaml"
    n_anchors = len(load_config(path).anchors)
    overrides = [f"generator.model={folder_7b}", *(f"anchors.{i}.model={folder_7b}" for i in range(n_anchors))]
    config = load_config(path, overrides)
    for process in memory(config):
        assert 16e9 < process.total < 45e9, process
    text = printed(config, "A6000")
    assert "A6000: efficiency assumed, not measured" in text
    assert "does not fit" not in text
    assert "name one with --device" in printed(config) or torch.cuda.is_available()


def test_a_card_that_is_too_small_is_named(folder_7b: str) -> None:
    overrides = [f"generator.model={folder_7b}", "train.batch_images=64"]
    assert "does not fit: A6000" in printed(load_config(ROOT / "deploy/configs/a6000.yaml", overrides), "A6000")


def test_wrong_devices_are_one_clear_line(folders: dict[str, str]) -> None:
    a = folders["qwen2_5_vl"]
    config = config_with(a, [{"name": "x", "model": a, "placement": "ray"}])
    with pytest.raises(ConfigError, match="use one of A6000, L40S"):
        printed(config, "abacus")
    with pytest.raises(ConfigError, match="no process of this config runs on a GPU"):
        printed(config, "H100")


def test_a_model_without_config_is_one_clear_line(folders: dict[str, str], tmp_path: Path) -> None:
    for model in (str(tmp_path), str(tmp_path / "absent"), "no-such-owner/no-such-model"):
        with pytest.raises(ModelError) as caught:
            printed(config_with(model, [{"name": "x", "model": model}]))
        assert model in str(caught.value)
        assert "\n" not in str(caught.value)
