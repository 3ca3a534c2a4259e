"""The generator: its latents equal an ordinary forward's, and its base model stays what it was, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shared.config import GeneratorConfig
from shared.errors import CheckpointError
from shared.messages import Question
from shared.reading import pack_questions, score_answers
from shared.vlm import VisionLanguageModel, load_vlm
from shared.vlm.generator import LATENT_END, LATENT_START, Generator
from tests.reference import max_relative_error, plain_prompt
from tests.tiny_models import FAMILY_NAMES, VOCABULARY, WIDTH

K = 4


def make_generator(
    folder: str, dropout: float = 0.0, rank: int = 4, latents: int = K, seed: int = 0, dtype: str = "float32"
) -> Generator:
    lora = {"rank": rank, "alpha": 8.0, "dropout": dropout}
    config = GeneratorConfig(model=folder, latents=latents, dtype=dtype, device="cpu", lora=lora)
    return Generator(config, seed)


def disturb(generator: Generator) -> None:
    """As if trained: LoRA's B matrices start at zero, where the adapter would do nothing."""
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=noise)


def plain_latents(generator: Generator, row, n_image_tokens, words_after: str) -> Tensor:
    """(K, D) of a row of pictures through the adapted model's own forward with input_ids, new rows embedded by peft."""
    model = generator.model
    tokenizer = model.processor.tokenizer
    prompt_ids = plain_prompt(model, Question("?", "yes"), *n_image_tokens).input_ids[0].tolist()
    question_at = len(prompt_ids) - prompt_ids[::-1].index(tokenizer.convert_tokens_to_ids("?")) - 1
    latent_tokens = "".join([LATENT_START, *(f"<|latent_{k}|>" for k in range(K)), LATENT_END])
    latent_ids = tokenizer(latent_tokens + words_after, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prompt_ids[:question_at] + latent_ids])
    images = [row] if model.family.name == "idefics3" else row
    inputs = dict(model.processor.image_processor(images=images, return_tensors="pt"))
    inputs = {name: value for name, value in inputs.items() if name not in ("rows", "cols")}
    if model.family.uses_mrope:
        inputs["mm_token_type_ids"] = (ids == model.image_token_id).int()
    hidden_1TD = generator.peft_model.get_base_model().model(input_ids=ids, **inputs).last_hidden_state
    first = question_at + 1
    return hidden_1TD[0, first : first + K]


@pytest.mark.parametrize("family", FAMILY_NAMES)
@torch.no_grad()
def test_emit_equals_the_ordinary_forward(tiny_folder, pictures, family):
    generator = make_generator(tiny_folder(family))
    disturb(generator)
    generator.train(False)
    tokens = generator.image_tokens_from(generator.model.image_inputs(pictures))
    latents_BKD = generator.emit(tokens)
    assert latents_BKD.shape == (len(pictures), K, WIDTH)
    for b, picture in enumerate(pictures):
        reference = plain_latents(generator, [picture], [len(tokens.tokens[b])], words_after="")
        assert max_relative_error(latents_BKD[b], reference) <= 1e-5
        # What comes after the latents, such as a question, cannot change them.
        asked = plain_latents(generator, [picture], [len(tokens.tokens[b])], "what color is the red square?")
        assert max_relative_error(latents_BKD[b], asked) <= 1e-5
    assert max_relative_error(latents_BKD[1], latents_BKD[0]) > 1e-2


@pytest.mark.parametrize("family", FAMILY_NAMES)
@torch.no_grad()
def test_latents_of_several_images_equal_the_ordinary_forward(tiny_folder, pictures, family):
    """Rows of one and of three images, in one batch."""
    generator = make_generator(tiny_folder(family))
    disturb(generator)
    generator.train(False)
    shown = [pictures[1:2], [pictures[2], pictures[0], pictures[1]]]
    inputs = generator.model.image_inputs([picture for row in shown for picture in row])
    tokens = generator.image_tokens_from(inputs).in_rows([1, 3])
    latents_BKD = generator.emit(tokens)
    assert latents_BKD.shape == (2, K, WIDTH)
    for b, images in enumerate(tokens.rows):
        reference = plain_latents(generator, shown[b], [len(t) for t in tokens.tokens[images]], words_after="")
        assert max_relative_error(latents_BKD[b], reference) <= 1e-5


def test_gradients_reach_lora_and_token_rows_as_in_the_ordinary_forward(tiny_folder, pictures):
    generator = make_generator(tiny_folder("qwen3_vl"))
    disturb(generator)
    tokens = generator.image_tokens_from(generator.model.image_inputs(pictures[:1]))
    weights_KD = torch.randn(K, WIDTH, generator=torch.Generator().manual_seed(4))
    gradients = torch.autograd.grad((generator.emit(tokens)[0] * weights_KD).sum(), generator.parameters())
    plain = plain_latents(generator, pictures[:1], [len(tokens.tokens[0])], "")
    references = torch.autograd.grad((plain * weights_KD).sum(), generator.parameters())
    for gradient, reference in zip(gradients, references, strict=True):
        assert reference.abs().max() > 1e-4
        assert max_relative_error(gradient, reference) <= 1e-5


def test_emit_makes_no_logits_and_keeps_no_hidden_states_beside_the_graph(tiny_folder, pictures):
    """Neither the head nor a list of every layer's states runs: what the pass makes is what its graph needs."""
    generator = make_generator(tiny_folder("qwen2_5_vl"))
    tokens = generator.image_tokens_from(generator.model.image_inputs(pictures))
    calls: list[dict[str, object]] = []
    decoder, head = generator.model.decoder, generator.model.hf_model.get_output_embeddings()
    hooks = [
        decoder.register_forward_hook(
            lambda module, args, kwargs, output: calls.append(dict(output)), with_kwargs=True
        ),
        head.register_forward_hook(lambda *_: pytest.fail("the generator must make no logits")),
    ]
    generator.emit(tokens)
    for hook in hooks:
        hook.remove()
    (output,) = calls
    assert set(output) == {"last_hidden_state"}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_only_the_adapter_is_trainable(tiny_folder, family):
    generator = make_generator(tiny_folder(family))
    trainable = {name: p for name, p in generator.peft_model.named_parameters() if p.requires_grad}
    lora = {name for name in trainable if "lora_" in name}
    (rows,) = [p for name, p in trainable.items() if name not in lora]
    assert rows.shape == (1 + K, WIDTH)
    n_layers = generator.model.hf_model.config.get_text_config().num_hidden_layers
    assert len(lora) == n_layers * 7 * 2
    assert all(f".{generator.model.family.decoder}." in name for name in lora)
    assert {id(p) for p in trainable.values()} == {id(p) for p in generator.parameters()}
    assert all(p.dtype is torch.float32 for p in trainable.values())


@torch.no_grad()
def base_scores(model: VisionLanguageModel, pictures, questions) -> Tensor:
    tokens = model.image_tokens(pictures)
    rows = pack_questions(model, tokens.media, questions)
    return score_answers(model, rows, torch.cat(tokens.tokens), tokens.deepstack).logprobs_N


RESIZED = ("qwen2_vl", "qwen3_vl", "llava", "smolvlm")
"""Models without spare rows; the first and the last share one matrix between embedding and head."""


@pytest.mark.parametrize(
    ("family", "vocabulary"), [(f, VOCABULARY) for f in FAMILY_NAMES] + [(f, None) for f in RESIZED]
)
def test_adapter_off_is_the_base_model_bit_for_bit(tiny_folder, pictures, questions, family, vocabulary):
    folder = tiny_folder(family, vocabulary=vocabulary)
    expected = base_scores(load_vlm(folder).freeze(), pictures, questions)
    generator = make_generator(folder, dropout=0.5)
    with generator.adapter_off():
        assert torch.equal(base_scores(generator.model, pictures, questions), expected)

    optimizer = torch.optim.AdamW(generator.parameters(), lr=0.05)
    tokens = generator.image_tokens_from(generator.model.image_inputs(pictures))
    generator.train()
    for _ in range(3):
        optimizer.zero_grad()
        generator.emit(tokens).square().mean().backward()
        optimizer.step()

    row_ids = torch.tensor([generator.token_ids[:-1]])
    trained_rows = generator.model.embed(row_ids)
    with generator.adapter_off():
        assert torch.equal(base_scores(generator.model, pictures, questions), expected)
        assert not torch.equal(generator.model.embed(row_ids), trained_rows)
        assert not generator.peft_model.training
    assert generator.peft_model.training
    assert torch.equal(generator.model.embed(row_ids), trained_rows)
    assert not torch.equal(base_scores(generator.model, pictures, questions), expected)
    generator.train(False)
    with generator.adapter_off():
        pass
    assert not generator.peft_model.training


def test_bf16_base_has_float32_masters(tiny_folder, pictures):
    generator = make_generator(tiny_folder("qwen2_5_vl", "bfloat16"), dtype="bfloat16")
    disturb(generator)
    tokens = generator.image_tokens_from(generator.model.image_inputs(pictures))
    latents_BKD = generator.emit(tokens)
    latents_BKD.float().sum().backward()
    assert latents_BKD.dtype is torch.bfloat16
    assert all(p.dtype is torch.float32 and p.grad.dtype is torch.float32 for p in generator.parameters())
    exact = make_generator(tiny_folder("qwen2_5_vl", "bfloat16"))
    disturb(exact)
    expected = exact.emit(exact.image_tokens_from(exact.model.image_inputs(pictures)))
    assert 1e-4 < max_relative_error(latents_BKD.float(), expected) < 0.1


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm"])
@torch.no_grad()
def test_adapter_folder_round_trip(tiny_folder, pictures, tmp_path, family):
    saved = make_generator(tiny_folder(family))
    disturb(saved)
    saved.save_adapter(tmp_path)
    loaded = make_generator(tiny_folder(family), seed=9)
    loaded.load_adapter(tmp_path)
    for before, after in zip(saved.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(before, after)
    inputs = saved.model.image_inputs(pictures)
    assert torch.equal(saved.emit(saved.image_tokens_from(inputs)), loaded.emit(loaded.image_tokens_from(inputs)))
    names = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * sum(
        p.numel() for p in saved.parameters()
    ) + 20_000


@pytest.mark.parametrize("changed", [{"rank": 8}, {"latents": K + 1}])
def test_an_adapter_of_another_shape_is_refused(tiny_folder, tmp_path, changed):
    make_generator(tiny_folder("llava")).save_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="rank or latents changed"):
        make_generator(tiny_folder("llava"), **changed).load_adapter(tmp_path)


def test_same_seed_same_generator(tiny_folder):
    one, two, other = (make_generator(tiny_folder("llava"), seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.token_parameters[0], other.token_parameters[0])
