"""Step time: the overlap against a simulated schedule, seconds against the formula's terms, what balances a run."""

from __future__ import annotations

import itertools

import pytest
import torch

from shared.config import Config, parse_config
from tests.conftest import TinyFolder
from trainer.estimate import step_time as module
from trainer.estimate.devices import GPUS, Device, gpu_named, this_cpu
from trainer.estimate.models import models_of
from trainer.estimate.report import verdict
from trainer.estimate.rows import typical_questions
from trainer.estimate.step_time import StepTime, overlapped_s, step_time


def config_of(model: str, anchors: list[dict], **train: int) -> Config:
    tree = {
        "run": {"dir": "unused"},
        "generator": {"model": model, "latents": 4, "device": "cuda"},
        "anchors": [{"model": model, "gpus": 1, **anchor} for anchor in anchors],
        "data": {"source": "toy", "path": "unused", "questions_per_image": 8},
        "train": {"batch_images": 16, **train},
    }
    return parse_config(tree, "test")


def times(config: Config, gpu: Device | None = GPUS["A100"]) -> StepTime | None:
    return step_time(config, models_of(config), typical_questions(config), gpu)


def simulated_s(m: int, forward_s: float, backward_s: float, anchor_s: float) -> float:
    """The schedule, event by event: the next latents are written while the anchor reads, then its reply is awaited."""
    now = forward_s
    reply = now + anchor_s
    for i in range(m):
        last = i + 1 == m
        if not last:
            now += forward_s
            next_reply = max(now, reply) + anchor_s
        now = max(now, reply) + backward_s
        if not last:
            reply = next_reply
    return now


@pytest.mark.parametrize("m", [1, 2, 3, 8])
def test_overlap_follows_the_schedule(m: int) -> None:
    for forward_s, backward_s, anchor_s in itertools.product((1.0, 2.0), (1.0, 2.0, 3.0), (0.1, 0.5, 1.0, 3.0, 9.0)):
        simulated = simulated_s(m, forward_s, backward_s, anchor_s)
        predicted = overlapped_s(m, forward_s + backward_s, anchor_s)
        assert predicted == pytest.approx(simulated, rel=0.15), (m, forward_s, backward_s, anchor_s)


def test_without_microbatches_the_two_sides_take_turns(tiny_folder: TinyFolder) -> None:
    t = times(config_of(tiny_folder("qwen2_5_vl"), [{"name": "x"}]))
    assert t is not None
    assert t.step_s == pytest.approx(t.generator_s + t.remote_s["x"])


def test_local_anchors_add_to_the_generators_process(tiny_folder: TinyFolder) -> None:
    model = tiny_folder("qwen2_5_vl")
    local = {"name": "here", "placement": "shared_base"}
    t = times(config_of(model, [local], microbatches=2))
    assert t is not None
    assert t.step_s == pytest.approx(2 * (t.forward_s + t.backward_s + t.local_s["here"]))
    assert t.balance == {}


def test_replicas_share_images_and_the_balance_is_the_smallest_that_keeps_up(tiny_folder: TinyFolder) -> None:
    model = tiny_folder("qwen2_5_vl")
    one = times(config_of(model, [{"name": "x"}]))
    assert one is not None
    n = one.balance["x"]
    assert n is not None
    assert n > 1, "eight questions per image are more than one image of nine tokens"
    enough = times(config_of(model, [{"name": "x", "replicas": n}]))
    too_few = times(config_of(model, [{"name": "x", "replicas": n - 1}]))
    assert enough is not None
    assert too_few is not None
    assert enough.remote_s["x"] <= enough.generator_s < too_few.remote_s["x"] <= one.remote_s["x"]


def test_vjp_mode_and_checkpointing_compute_forward_again(tiny_folder: TinyFolder) -> None:
    config = config_of(tiny_folder("qwen2_5_vl"), [{"name": "x"}])
    fused = times(config)
    vjp = times(config.model_copy(update={"pool": config.pool.model_copy(update={"mode": "vjp"})}))
    saving = config.generator.model_copy(update={"gradient_checkpointing": True})
    recomputed = times(config.model_copy(update={"generator": saving}))
    assert fused is not None
    assert vjp is not None
    assert recomputed is not None
    assert 1.2 * fused.remote_s["x"] < vjp.remote_s["x"] < 1.5 * fused.remote_s["x"]
    assert recomputed.forward_s == fused.forward_s
    assert fused.backward_s < recomputed.backward_s <= fused.backward_s + fused.forward_s


def test_seconds_are_products_plus_moved_bytes_plus_overhead(tiny_folder: TinyFolder) -> None:
    config = config_of(tiny_folder("qwen2_5_vl"), [{"name": "x"}])
    models = models_of(config)
    facts = models[config.generator.model]
    device = Device("slow", {"float32": 1e9}, 1e9, 1e9, 0.5, 3.0, 0.25)
    kept = 1000
    weights = facts.decoder.linear_weights * 4
    seconds = module.pass_seconds(facts, device, "float32", 10**8, kept, backward=True)
    assert seconds == pytest.approx(10**8 / 5e8 + (2 * 3.0 * 2 * kept + weights) / 1e9 + 2 * 2 * 0.25)


def test_the_verdict_names_the_slower_side(tiny_folder: TinyFolder) -> None:
    config = config_of(tiny_folder("qwen2_5_vl"), [{"name": "x"}, {"name": "y"}], microbatches=4)
    slow_anchor = StepTime(1.0, 1.0, {}, {"x": 3.0, "y": 6.0}, {"x": 2, "y": None}, 26.0)
    lines = "\n".join(verdict(config, slow_anchor, GPUS["H100"]))
    assert "anchor y, 6 s per microbatch against 2 s" in lines
    assert "(3.0 ×)" in lines
    assert "x 2, y cannot" in lines
    slow_generator = StepTime(1.0, 5.0, {}, {"x": 3.0, "y": 2.0}, {"x": 1, "y": 1}, 24.0)
    assert "the generator's process, 6 s per microbatch against 3 s" in "\n".join(verdict(config, slow_generator, None))


def test_a_missing_gpu_gives_no_time_rather_than_a_wrong_one(tiny_folder: TinyFolder) -> None:
    model = tiny_folder("qwen2_5_vl")
    config = config_of(model, [{"name": "x"}])
    assert times(config, gpu=None) is None
    on_cpu = config.model_copy(update={"generator": config.generator.model_copy(update={"device": "cpu"})})
    assert times(on_cpu, gpu=None) is None, "the anchor still wants one"


def test_this_cpu_is_measured_with_the_threads_asked_for() -> None:
    before = torch.get_num_threads()
    cpu = this_cpu("float32", 1)
    assert torch.get_num_threads() == before
    assert 1e8 < cpu.peak["float32"] < 1e13
    assert 1e8 < cpu.bandwidth < 1e13
    assert gpu_named("L40S") is GPUS["L40S"]
