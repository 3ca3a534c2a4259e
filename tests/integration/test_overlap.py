"""The generator works one microbatch ahead of remote anchors, and no number shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from anchor_service.pool import AnchorPool
from shared.config import Config, parse_config
from shared.messages import Gradient
from tests.integration.helpers import training_tree
from tests.integration.test_failures import kill_at, losses
from trainer.loop import train_run
from trainer.metrics import read_metrics


def run_config(toy: Path, run_dir: Path, mode: str = "fused", microbatches: int | str = 4, **pool: Any) -> Config:
    tree = training_tree(
        toy,
        run_dir,
        "ray",
        pool={"mode": mode, **pool},
        train={"steps": 3, "batch_images": 8, "microbatches": microbatches, "checkpoint_every": 3},
        generator={"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}},
    )
    return parse_config(tree, "test")


@pytest.mark.parametrize("mode", ["fused", "vjp"])
def test_overlapped_steps_are_bit_identical_to_one_after_the_other(
    clean_ray: None, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """With dropout, so that an order of random numbers that changed would show."""
    in_hand, most = 0, []
    submit, gather = AnchorPool.submit, AnchorPool.gather

    def counting_submit(pool: AnchorPool, requests: Any) -> Any:
        nonlocal in_hand
        in_hand += 1
        most.append(in_hand)
        return submit(pool, requests)

    def counting_gather(pool: AnchorPool, pending: Any) -> Any:
        nonlocal in_hand
        in_hand -= 1
        return gather(pool, pending)

    monkeypatch.setattr(AnchorPool, "submit", counting_submit)
    monkeypatch.setattr(AnchorPool, "gather", counting_gather)
    train_run(run_config(toy_folder, tmp_path / "overlapped", mode), resume=False)
    assert max(most) == 2
    most.clear()
    monkeypatch.setattr(AnchorPool, "has_remote", False)
    train_run(run_config(toy_folder, tmp_path / "sequential", mode), resume=False)
    assert max(most) == 1
    assert len(losses(tmp_path / "overlapped")) == 3
    assert losses(tmp_path / "overlapped") == losses(tmp_path / "sequential")


def test_killed_with_two_calls_in_hand(
    clean_ray: None, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_run(run_config(toy_folder, tmp_path / "quiet"), resume=False)
    striker = kill_at(monkeypatch, ("B", Gradient.FUSED, 5))
    train_run(run_config(toy_folder, tmp_path / "struck"), resume=False)
    assert len(striker.struck) == 1
    assert losses(tmp_path / "struck") == losses(tmp_path / "quiet")


def test_dropped_between_microbatches_takes_the_step_again(
    clean_ray: None, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B dies in the third of four microbatches of step 1: that step is A's alone, all four of them."""
    kill_at(monkeypatch, ("B", Gradient.FUSED, 6))
    config = run_config(toy_folder, tmp_path / "run", max_restarts=0, on_loss="drop", deadline_s=10)
    train_run(config, resume=False)
    entries = losses(tmp_path / "run")
    assert [entry["anchors"] for entry in entries] == [2, 1, 1]
    for entry in entries[1:]:
        assert "nll/B" not in entry
        assert entry["nll"] == pytest.approx(entry["nll/A"], rel=1e-6)


def test_auto_tries_and_then_stays(clean_ray: None, toy_folder: Path, tmp_path: Path) -> None:
    tree = run_config(toy_folder, tmp_path / "run", microbatches="auto").model_dump(mode="json")
    tree["train"] |= {"steps": 14, "batch_images": 4}
    train_run(parse_config(tree, "test"), resume=False)
    counts = [int(entry["microbatches"]) for entry in read_metrics(tmp_path / "run")]
    assert counts[:9] == [1, 1, 1, 2, 2, 2, 4, 4, 4]
    assert len(set(counts[9:])) == 1
    assert counts[9] in (1, 2, 4)
