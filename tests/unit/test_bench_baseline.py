"""The benchmark's peer computes what the project computes, and both are counted rightly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from anchor_service.frozen_anchor import FrozenAnchor
from shared.flops import decoder_size
from shared.messages import Gradient, LatentPositions, ReadRequest
from shared.reading import nll_per_image
from shared.vlm import load_vlm
from shared.vlm.generator import Generator
from tests.benchmarks import baseline_loop
from tests.benchmarks.models import (
    ANSWER_TOKENS,
    BRANCH_TOKENS,
    HEADER_TOKENS,
    PROPORTIONS_7B,
    TINY,
    build_folder,
    make_questions,
    random_weights,
)
from tests.benchmarks.read_flops import loop_read_flops, packed_read_flops
from tests.benchmarks.runs import make_records, open_baseline, open_trainer, run_config
from tests.benchmarks.switches import READ_SWITCHES, STEP_SWITCHES
from tests.reference import max_relative_error

N_IMAGES, N_LATENTS, N_QUESTIONS = 3, 16, 2
LATENTS_BKD = torch.randn(N_IMAGES, N_LATENTS, TINY.width, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_folder(TINY, tmp_path_factory.mktemp("bench") / "model")


@pytest.fixture(scope="module")
def anchor(folder: Path) -> FrozenAnchor:
    return FrozenAnchor("A", load_vlm(str(folder)).freeze(), N_LATENTS, LatentPositions.TEXT)


@pytest.fixture(scope="module")
def request_to_read() -> ReadRequest:
    return ReadRequest("r", make_questions(N_IMAGES, N_QUESTIONS), LATENTS_BKD, Gradient.FUSED)


def test_tokens_are_as_many_as_the_figures_say(anchor: FrozenAnchor) -> None:
    prompt = anchor.model.prompt
    assert len(prompt.prefix_ids) == HEADER_TOKENS + 1
    for branch in prompt.branches(make_questions(2, 3))[0]:
        assert (len(branch.token_ids), branch.n_answer) == (BRANCH_TOKENS, ANSWER_TOKENS + 1)


def test_head_has_its_share_of_the_operations() -> None:
    size = PROPORTIONS_7B
    per_layer = 2 * size.width**2 * (1 + size.kv_heads / size.heads) + 3 * size.width * size.ffn_width
    head = size.vocabulary * size.width
    assert head / (head + size.layers * per_layer) == pytest.approx(0.08, abs=0.005)


def test_baseline_read_equals_ours(anchor: FrozenAnchor, request_to_read: ReadRequest) -> None:
    nll, gradient_BKD = baseline_loop.read(anchor.model, LATENTS_BKD, request_to_read.questions)
    reply = anchor.read(request_to_read)
    ours = sum(nll_per_image(reply.logprobs, count_end_of_turn=True)) / N_IMAGES
    assert ours == pytest.approx(nll, rel=1e-5)
    assert max_relative_error(reply.latents_grad / N_IMAGES, gradient_BKD) <= 1e-5
    assert float(gradient_BKD.abs().max()) > 1e-4


@pytest.mark.parametrize("switch", READ_SWITCHES)
def test_no_switch_changes_a_number(anchor: FrozenAnchor, request_to_read: ReadRequest, switch: str) -> None:
    expected, reply = anchor.read(request_to_read), READ_SWITCHES[switch](anchor, request_to_read)
    assert max_relative_error(torch.tensor(reply.logprobs), torch.tensor(expected.logprobs)) <= 1e-5
    assert max_relative_error(reply.latents_grad, expected.latents_grad) <= 1e-5


def test_reads_are_counted_as_they_are_computed(anchor: FrozenAnchor, request_to_read: ReadRequest) -> None:
    size = decoder_size(anchor.model.hf_model.config)
    shape = (size, N_IMAGES, N_LATENTS, N_QUESTIONS)
    anchor.read(request_to_read)  # computes the prefix
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as ours:
        anchor.read(request_to_read)
    assert ours.get_total_flops() == packed_read_flops(*shape)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as loop:
        baseline_loop.read(anchor.model, LATENTS_BKD, request_to_read.questions)
    assert loop.get_total_flops() == loop_read_flops(*shape)


def test_baseline_latents_and_their_gradients_equal_ours(folder: Path, tmp_path: Path) -> None:
    config = run_config({"model": str(folder)}, [{"name": "base", "model": "-", "placement": "shared_base"}])
    generator = Generator(config.generator, seed=0)
    for name, parameter in generator.peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    images = [image for record in make_records(tmp_path, 2, (112, 84), 1) for image in record.load_images()]
    inputs = generator.model.image_inputs(images)
    latents, gradients = [], []
    for emit in (
        lambda: generator.emit(generator.image_tokens_from(inputs)),
        lambda: baseline_loop.generator_pass(generator, inputs),
    ):
        latents.append(emit())
        # The final norm fixes the latents' length, so the gradient of their squares would be rounding alone.
        objective = (latents[-1] * LATENTS_BKD[:2]).sum()
        gradients.append(torch.autograd.grad(objective, generator.parameters()))
    assert latents[1].shape == (2, 16, TINY.width)
    assert max_relative_error(latents[1], latents[0]) <= 1e-5
    for value, reference in zip(gradients[1], gradients[0], strict=True):
        assert max_relative_error(value, reference) <= 1e-4


def test_whole_steps_of_both_sides_train(folder: Path, tmp_path: Path) -> None:
    records = make_records(tmp_path, 2, (112, 84), 3)
    anchors = [
        {"name": "base", "model": "-", "placement": "shared_base"},
        {"name": "other", "model": str(folder), "placement": "local"},
    ]
    generator = {"model": str(folder), "gradient_checkpointing": True}
    config = run_config(generator, anchors, train={"batch_images": 2})
    baseline = open_baseline(config, records)
    with open_trainer(config, records) as trainer:
        # Before the first update the adapter is zero, so both read the same latents with the same anchors.
        ours, theirs = trainer.step(0), baseline.step(0)
        assert ours["nll"] == pytest.approx(theirs["nll"], rel=1e-5)
        for switch in STEP_SWITCHES.values():
            with switch(trainer.generator):
                assert trainer.step(1)["nll"] > 0
        assert baseline.step(1)["nll"] != theirs["nll"]


def test_switches_of_the_generator_change_no_number(folder: Path, tmp_path: Path) -> None:
    config = run_config({"model": str(folder)}, [{"name": "base", "model": "-", "placement": "shared_base"}])
    generator = Generator(config.generator, seed=0)
    inputs = generator.model.image_inputs([r.load_images()[0] for r in make_records(tmp_path, 2, (112, 84), 1)])
    expected = generator.emit(generator.image_tokens_from(inputs))
    for switch in STEP_SWITCHES.values():
        with switch(generator):
            assert torch.equal(generator.emit(generator.image_tokens_from(inputs)), expected)


def test_a_folder_without_weights_serves_random_ones(tmp_path: Path) -> None:
    folder = build_folder(TINY, tmp_path / "empty", with_weights=False)
    assert not list(folder.glob("*.safetensors"))
    config = run_config(
        {"model": str(folder), "dtype": "bfloat16"},
        [{"name": "other", "model": str(folder), "placement": "local", "dtype": "bfloat16"}],
        train={"batch_images": 2},
    )
    with random_weights(), open_trainer(config, make_records(tmp_path, 2, (112, 84), 3)) as trainer:
        assert trainer.generator.model.dtype is torch.bfloat16
        assert trainer.step(0)["nll"] > 0
