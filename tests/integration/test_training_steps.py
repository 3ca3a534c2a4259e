"""Training changes the generator's adapter and nothing else: anchors stay what they were, bit for bit."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from anchor_service.frozen_anchor import FrozenAnchor
from anchor_service.pool import AnchorPool
from shared.config import Config, parse_config
from shared.messages import ReadRequest
from shared.vlm import VisionLanguageModel, load_vlm
from shared.vlm.generator import Generator
from tests.integration.helpers import QUESTIONS, training_tree
from trainer.data import training_records
from trainer.data.sampling import Sampler
from trainer.loop import Trainer

STEPS = 20


def digest(model: VisionLanguageModel) -> str:
    """SHA-256 of every parameter and buffer that a base model has, under the names of an unwrapped one."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.hf_model.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def train(config: Config, generator: Generator, pool: AnchorPool) -> None:
    """STEPS steps that must move the adapter."""
    records = training_records(config.data, config.train.seed)
    trainer = Trainer(config, generator, pool, Sampler(records, config.train.batch_images, 2, config.train.seed))
    before = [parameter.clone() for parameter in generator.parameters()]
    try:
        for step in range(STEPS):
            generator.train()
            trainer.step(step)
    finally:
        trainer.close()
    assert not any(torch.equal(a, b) for a, b in zip(before, generator.parameters(), strict=True))


def config_of(toy: Path, run_dir: Path, placement: str, mode: str) -> Config:
    tree = training_tree(toy, run_dir, placement, pool={"mode": mode}, train={"steps": STEPS, "batch_images": 4})
    return parse_config(tree, "test")


def shown_images(config: Config) -> list[bytes]:
    return [record.images[0].read() for record in training_records(config.data, 0)[:2]]


@pytest.mark.parametrize("mode", ["fused", "vjp"])
def test_local_anchor_is_bit_identical_after_training(toy_folder: Path, tmp_path: Path, mode: str) -> None:
    config = config_of(toy_folder, tmp_path, "local", mode)
    generator = Generator(config.generator, seed=0)
    with AnchorPool.start(config, generator.handshake(), probe_images=shown_images(config)) as pool:
        models = [handle._started().model for handle in pool._handles.values()]
        before = [digest(model) for model in models]
        train(config, generator, pool)
        assert [digest(model) for model in models] == before
        assert before == [digest(load_vlm(str(toy_folder / name))) for name in ("A", "B")]
        assert all(parameter.grad is None for model in models for parameter in model.hf_model.parameters())


def test_ray_anchor_answers_bit_identically_after_training(clean_ray: None, toy_folder: Path, tmp_path: Path) -> None:
    """The weights are out of reach in the actor, so its answers to latents and to images are compared."""
    config = config_of(toy_folder, tmp_path, "ray", "fused")
    generator = Generator(config.generator, seed=0)
    request = ReadRequest("same", QUESTIONS[:2], torch.randn(2, 9, generator.model.width))
    images, questions = [[image] for image in shown_images(config)], QUESTIONS[:2]
    with AnchorPool.start(config, generator.handshake(), probe_images=shown_images(config)) as pool:
        answers = []
        for _ in range(2):
            replies = pool.read(dict.fromkeys(pool.names, request))
            ceilings = pool.read_images(images, questions, pool.names)
            answers.append([(replies[name].logprobs, ceilings[name].logprobs) for name in pool.names])
            if len(answers) == 1:
                train(config, generator, pool)
        assert answers[1] == answers[0]


@pytest.mark.parametrize("mode", ["fused", "vjp"])
def test_shared_base_is_the_base_model_bit_for_bit_after_training(toy_folder: Path, tmp_path: Path, mode: str) -> None:
    """Logits with the adapter off against those of a model that never had one, with latents and with images."""
    config = config_of(toy_folder, tmp_path, "shared_base", mode)
    generator = Generator(config.generator, seed=0)
    images, questions = [[image] for image in shown_images(config)], QUESTIONS[:2]
    untouched = load_vlm(str(toy_folder / "A")).freeze()
    positions = config.pool.latent_positions
    base = FrozenAnchor("base", untouched, 9, positions)
    request = ReadRequest("same", questions, torch.randn(2, 9, untouched.width))
    expected = (base.read(request).logprobs, base.read_images("images", images, questions).logprobs)
    shared_base = (generator.model, generator.adapter_off)
    with AnchorPool.start(config, generator.handshake(), shared_base, probe_images=shown_images(config)) as pool:
        train(config, generator, pool)
        shared = FrozenAnchor("shared", generator.model, 9, positions, generator.adapter_off)
        assert shared.read(request).logprobs == expected[0]
        assert shared.read_images("images", images, questions).logprobs == expected[1]
        hidden_ND = torch.randn(5, untouched.width)
        with generator.adapter_off():
            logits_NV = F.linear(hidden_ND, *generator.model.head())
        assert torch.equal(logits_NV, F.linear(hidden_ND, *untouched.head()))
    trained = {id(parameter) for parameter in generator.parameters()}
    frozen = [p for p in generator.model.hf_model.parameters() if id(p) not in trained]
    assert all(parameter.grad is None for parameter in frozen)
    with_adapter = FrozenAnchor("adapted", generator.model, 9, positions)
    assert with_adapter.read(request).logprobs != expected[0], "the test must notice an adapter that is left on"
