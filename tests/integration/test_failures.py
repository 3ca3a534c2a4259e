"""Anchors that die, hang, answer nonsense or never start: the run goes on unchanged, or ends with a clear line.

A kill is made to fall into a call by stopping the process, sending the call, and killing the stopped process; so
the call is under way when its process dies, at the same place in every run of the test.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch

from anchor_service.cluster import ray_if_needed
from anchor_service.frozen_anchor import FrozenAnchor
from anchor_service.pool import AnchorPool
from anchor_service.ray_handle import RayHandle
from shared.config import Config, parse_config
from shared.errors import (
    AnchorLostError,
    HandshakeError,
    ModelError,
    NonFiniteError,
    ResourceError,
)
from shared.messages import PROTOCOL_VERSION, Gradient, ReadRequest
from shared.vlm.generator import Generator
from tests.integration.helpers import (
    LATENTS,
    QUESTIONS,
    WIDTH,
    anchor_config,
    fused_request,
    generator_side,
    is_running,
    pool_config,
    training_tree,
    wait_until,
)
from trainer.data import training_records
from trainer.data.sampling import Sampler
from trainer.loop import Trainer, train_run
from trainer.metrics import read_metrics

FolderOf = Callable[[str], Path]
Strike = tuple[str, Gradient, int]
"""Anchor, kind of call, and the how-manieth call of this kind its process is struck in."""


class Striker:
    """Strikes the first replica's process of an anchor while a chosen call is under way."""

    def __init__(self, strikes: Iterable[Strike], signals: tuple[int, ...]):
        self.struck: list[int] = []
        self._left = set(strikes)
        self._signals = signals
        self._seen: Counter[tuple[str, Gradient]] = Counter()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Striker:
        submit = RayHandle.submit

        def submit_and_strike(handle: RayHandle, request: ReadRequest, shared_latents: dict[int, Any]) -> Any:
            kind = (handle.name, request.gradient)
            strike = (*kind, self._seen[kind])
            self._seen[kind] += 1
            if strike not in self._left:
                return submit(handle, request, shared_latents)
            self._left.remove(strike)
            pid = handle.facts(time.monotonic() + 30)[0].pid
            os.kill(pid, signal.SIGSTOP)
            call = submit(handle, request, shared_latents)
            for number in self._signals:
                os.kill(pid, number)
            self.struck.append(pid)
            return call

        monkeypatch.setattr(RayHandle, "submit", submit_and_strike)
        return self


def kill_at(monkeypatch: pytest.MonkeyPatch, *strikes: Strike) -> Striker:
    return Striker(strikes, (signal.SIGKILL,)).install(monkeypatch)


def hang_at(monkeypatch: pytest.MonkeyPatch, *strikes: Strike) -> Striker:
    return Striker(strikes, ()).install(monkeypatch)


def run_config(toy: Path, run_dir: Path, **pool: Any) -> Config:
    limits = {"start_timeout_s": 120, "deadline_s": 60}
    tree = training_tree(toy, run_dir, "ray", pool={**limits, **pool}, train={"steps": 4, "checkpoint_every": 4})
    return parse_config(tree, "test")


def losses(run_dir: Path) -> list[dict[str, float]]:
    """What must be the same in every undisturbed run: losses and gradient norms, not times."""
    exact = ("loss", "nll", "concept", "norm", "grad_norm", "validation_loss", "anchors")
    return [
        {name: value for name, value in entry.items() if name in exact or name.startswith("nll/")}
        for entry in read_metrics(run_dir)
    ]


@pytest.mark.parametrize(
    ("mode", "strikes"),
    [
        ("fused", [("B", Gradient.FUSED, 1)]),
        ("vjp", [("A", Gradient.NONE, 1), ("B", Gradient.VJP, 2)]),
    ],
    ids=["fused", "vjp: one in forward, one in backward"],
)
def test_killed_anchor_leaves_the_loss_curve_bit_identical(
    clean_ray: None, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, strikes: list[Strike]
) -> None:
    train_run(run_config(toy_folder, tmp_path / "quiet", mode=mode), resume=False)
    striker = kill_at(monkeypatch, *strikes)
    train_run(run_config(toy_folder, tmp_path / "struck", mode=mode), resume=False)
    assert len(striker.struck) == len(strikes)
    assert len(losses(tmp_path / "quiet")) == 4
    assert losses(tmp_path / "struck") == losses(tmp_path / "quiet")


def test_call_that_computes_when_its_process_dies_is_answered_by_the_next_incarnation(
    clean_ray: None, tiny_folder: FolderOf
) -> None:
    folder = tiny_folder("qwen2_5_vl")
    many = QUESTIONS * 100
    latents_BKD = torch.randn(len(many), LATENTS, WIDTH)
    with AnchorPool.start(pool_config([anchor_config("a", folder)]), generator_side()) as pool:
        undisturbed = pool.read({"a": ReadRequest("0", many, latents_BKD, Gradient.FUSED)})["a"]
        handle = pool._handles["a"]
        process = psutil.Process(pool.facts()["a"][0].pid)
        busy_before = process.cpu_times().user
        call = handle.submit(ReadRequest("1", many, latents_BKD, Gradient.FUSED), {})
        wait_until(lambda: process.cpu_times().user > busy_before + 0.1, 20, "the call does not compute")
        process.kill()
        reply = call.result(time.monotonic() + 60)
        again = pool.read({"a": ReadRequest("2", many, latents_BKD, Gradient.FUSED)})["a"]
    assert (undisturbed.incarnation, reply.incarnation, again.incarnation) == (0, 1, 1)
    assert reply.logprobs == undisturbed.logprobs
    assert torch.equal(reply.latents_grad, undisturbed.latents_grad)


def test_anchor_killed_for_good_ends_the_run_by_name(
    clean_ray: None, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at(monkeypatch, ("B", Gradient.FUSED, 2))
    started = time.monotonic()
    with pytest.raises(AnchorLostError, match=r"^anchor B: its process died .* raise pool.max_restarts$"):
        train_run(run_config(toy_folder, tmp_path / "run", max_restarts=0), resume=False)
    assert time.monotonic() - started < 60
    assert len(losses(tmp_path / "run")) == 2


def test_anchor_that_hangs_ends_the_run_within_the_deadline(
    clean_ray: None, tiny_folder: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    striker = hang_at(monkeypatch, ("a", Gradient.FUSED, 0))
    config = pool_config([anchor_config("a", tiny_folder("qwen2_5_vl"))], deadline_s=3)
    with AnchorPool.start(config, generator_side()) as pool:
        started = time.monotonic()
        with pytest.raises(AnchorLostError, match=r"^anchor a: no answer within pool.deadline_s"):
            pool.read({"a": fused_request("0", 2)})
        assert 2.5 < time.monotonic() - started < 6
        assert is_running(striker.struck[0])
    wait_until(lambda: not is_running(striker.struck[0]), 20, "closing the pool left the hanging process")


@pytest.mark.parametrize("how", [kill_at, hang_at], ids=["killed", "hanging"])
def test_dropped_anchor_renormalises_the_weights_and_shows_in_metrics(
    clean_ray: None, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Any
) -> None:
    how(monkeypatch, ("B", Gradient.FUSED, 2))
    config = run_config(toy_folder, tmp_path / "run", max_restarts=0, on_loss="drop", deadline_s=6)
    train_run(config, resume=False)
    entries = losses(tmp_path / "run")
    assert [entry["anchors"] for entry in entries] == [2, 2, 1, 1]
    assert ["nll/B" in entry for entry in entries] == [True, True, False, False]
    for entry in entries[:2]:
        assert entry["nll"] == pytest.approx((entry["nll/A"] + 2 * entry["nll/B"]) / 3, rel=1e-6)
    for entry in entries[2:]:
        assert entry["nll"] == pytest.approx(entry["nll/A"], rel=1e-6)


def test_drop_in_backward_takes_the_step_again(
    clean_ray: None, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropped in backward is dropped in forward of the same step: nothing of the first try may remain."""
    for name, gradient in (("forward", Gradient.NONE), ("backward", Gradient.VJP)):
        with monkeypatch.context() as patch:
            kill_at(patch, ("B", gradient, 2))
            config = run_config(toy_folder, tmp_path / name, mode="vjp", max_restarts=0, on_loss="drop")
            train_run(config, resume=False)
    assert [entry["anchors"] for entry in losses(tmp_path / "backward")] == [2, 2, 1, 1]
    assert losses(tmp_path / "backward") == losses(tmp_path / "forward")


def test_replica_takes_over_the_share_of_a_dead_one(
    clean_ray: None, tiny_folder: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pool_config([anchor_config("a", tiny_folder("qwen2_5_vl"), replicas=2)], max_restarts=0)
    with AnchorPool.start(config, generator_side()) as pool:
        whole = pool.read({"a": fused_request("0", 5)})["a"]
        striker = kill_at(monkeypatch, ("a", Gradient.FUSED, 0))
        for number in ("1", "2"):
            reply = pool.read({"a": fused_request(number, 5)})["a"]
            assert reply.logprobs == whole.logprobs
            assert torch.equal(reply.latents_grad, whole.latents_grad)
        (survivor,) = pool.facts()["a"]
        assert survivor.pid not in striker.struck
        os.kill(survivor.pid, signal.SIGKILL)
        with pytest.raises(AnchorLostError, match=r"^anchor a: its process died"):
            pool.read({"a": fused_request("3", 5)})


@pytest.mark.parametrize(
    ("field", "ours", "theirs"),
    [
        ("latents", 9, LATENTS),
        ("width", 64, WIDTH),
        ("dtype", "bfloat16", "float32"),
        ("protocol", 99, PROTOCOL_VERSION),
    ],
)
def test_handshake_refuses_a_misfit_and_names_both_sides(tiny_folder: FolderOf, field: str, ours: Any, theirs: Any):
    config = pool_config([anchor_config("reader", tiny_folder("llava"), placement="local")])
    with pytest.raises(HandshakeError) as caught:
        AnchorPool.start(config, generator_side(**{field: ours}))
    assert f"generator generator has {field} {ours}, anchor reader has {field} {theirs}; " in str(caught.value)


def test_remote_misfit_leaves_nothing_running(clean_ray: None, tiny_folder: FolderOf) -> None:
    config = pool_config([anchor_config("reader", tiny_folder("llava"))])
    with pytest.raises(HandshakeError, match=f"generator generator has width 64, anchor reader has width {WIDTH}"):
        AnchorPool.start(config, generator_side(width=64))


def test_model_without_processor_is_one_line_from_a_remote_anchor(
    clean_ray: None, tiny_folder: FolderOf, tmp_path: Path
) -> None:
    """The second of two anchors cannot start: the error is that of a local one, and the first is ended too."""
    broken = shutil.copytree(tiny_folder("qwen2_5_vl"), tmp_path / "broken")
    (broken / "preprocessor_config.json").unlink()
    messages = []
    for placement in ("local", "ray"):
        anchors = [anchor_config("whole", tiny_folder("llava"), placement=placement)]
        anchors.append(anchor_config("broken", broken, placement=placement))
        with pytest.raises(ModelError) as caught:
            AnchorPool.start(pool_config(anchors), generator_side())
        messages.append(str(caught.value))
    assert messages[0].startswith(f"{broken}: no processor")
    assert "save_pretrained" in messages[0]
    assert "\n" not in messages[0]
    assert messages[1] == messages[0]


@pytest.mark.parametrize(
    ("anchor", "pool", "message"),
    [
        ({"gpus": 3}, {}, r"^the anchors need 3 GPU but the cluster has 0; lower anchors"),
        ({"cpus": 2, "replicas": 3}, {}, r"^the anchors need 6 CPU but the cluster has 4; "),
        ({}, {"resources": {"reader": 1}}, r"^the anchors need 1 reader but the cluster has 0; "),
    ],
    ids=["GPUs", "CPUs", "custom"],
)
def test_too_few_resources_are_noticed_at_once(
    clean_ray: None, tiny_folder: FolderOf, anchor: dict[str, Any], pool: dict[str, Any], message: str
) -> None:
    config = pool_config([anchor_config("a", tiny_folder("llava"), **anchor)], **pool)
    started = time.monotonic()
    with pytest.raises(ResourceError, match=message):
        AnchorPool.start(config, generator_side())
    with pytest.raises(ResourceError, match=message), ray_if_needed(config, config.anchors):
        pytest.fail("the run must not begin to load models")
    assert time.monotonic() - started < 5


def test_taken_places_end_the_start_within_its_timeout(clean_ray: None, tiny_folder: FolderOf) -> None:
    others = ray.util.placement_group([{"CPU": 4}])
    assert others.wait(30)
    try:
        config = pool_config([anchor_config("a", tiny_folder("llava"))], start_timeout_s=2)
        started = time.monotonic()
        with pytest.raises(ResourceError, match=r"^anchor a: the cluster gave no place within pool.start_timeout_s"):
            AnchorPool.start(config, generator_side())
        assert 1.9 < time.monotonic() - started < 10
    finally:
        ray.util.remove_placement_group(others)


def test_anchor_that_loads_for_too_long_ends_the_start(clean_ray: None, tiny_folder: FolderOf) -> None:
    """On a busy machine even the placement takes longer than this; the limit that is named is the same."""
    config = pool_config([anchor_config("a", tiny_folder("llava"))], start_timeout_s=0.2)
    with pytest.raises((AnchorLostError, ResourceError), match=r"^anchor a: .* within pool.start_timeout_s"):
        AnchorPool.start(config, generator_side())


@pytest.mark.parametrize("mode", ["fused", "vjp"])
def test_non_finite_gradient_reply_names_the_record(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """One image's gradient turns to NaN on the anchor's side; the step is not taken."""
    read = FrozenAnchor.read

    def poisoned(anchor: FrozenAnchor, request: ReadRequest) -> Any:
        reply = read(anchor, request)
        if reply.latents_grad is not None:
            reply.latents_grad[2, 0, 0] = float("nan")
        return reply

    monkeypatch.setattr(FrozenAnchor, "read", poisoned)
    config = parse_config(training_tree(toy_folder, tmp_path, pool={"mode": mode}), "test")
    _check_refused(config, lambda trainer: None, [2])


def test_non_finite_latents_name_the_records(toy_folder: Path, tmp_path: Path) -> None:
    config = parse_config(training_tree(toy_folder, tmp_path), "test")

    def poison(trainer: Trainer) -> None:
        with torch.no_grad():
            trainer.generator.token_parameters[0].fill_(float("nan"))

    _check_refused(config, poison, [0, 1, 2, 3])


def _check_refused(config: Config, poison: Callable[[Trainer], None], images: list[int]) -> None:
    """Step 0 raises NonFiniteError that names exactly these images' records, and changes no parameter."""
    generator = Generator(config.generator, seed=0)
    shown = [record.images[0].read() for record in training_records(config.data, 0)[:2]]
    sampler = Sampler(training_records(config.data, 0), config.train.batch_images, 2, seed=0)
    ids = [record.record_id for record in sampler.batch(0).records]
    with AnchorPool.start(config, generator.handshake(), probe_images=shown) as pool:
        trainer = Trainer(config, generator, pool, sampler)
        try:
            poison(trainer)
            before = [parameter.clone() for parameter in generator.parameters()]
            with pytest.raises(NonFiniteError) as caught:
                trainer.step(0)
        finally:
            trainer.close()
    assert [record_id in str(caught.value) for record_id in ids] == [i in images for i in range(len(ids))]
    after = generator.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True) if not a.isnan().any())
