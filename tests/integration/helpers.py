"""What several integration tests share: small configs, requests, waiting with a limit."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from torch import Tensor

from shared.config import Config, parse_config
from shared.messages import PROTOCOL_VERSION, Gradient, Handshake, Question, ReadRequest

REPOSITORY = Path(__file__).parents[2]
TOY_SIZES = {"train": 24, "val": 8, "test": 8}
LATENTS = 4
WIDTH = 32


def anchor_config(name: str, model: Path, **more: Any) -> dict[str, Any]:
    """One anchor; a quarter of a CPU, so that many fit the local Ray."""
    return {"name": name, "model": str(model), "cpus": 0.25, **more}


def pool_config(anchors: list[dict[str, Any]], **pool: Any) -> Config:
    """A config for pools that are started without a generator or data."""
    tree = {
        "run": {"dir": "unused"},
        "data": {"path": "unused"},
        "generator": {"model": anchors[0]["model"], "latents": LATENTS},
        "anchors": anchors,
        "pool": {"start_timeout_s": 120, "deadline_s": 60, **pool},
    }
    return parse_config(tree, "test")


def generator_side(width: int = WIDTH, dtype: str = "float32", **more: Any) -> Handshake:
    """What a generator of the tiny models' width would say of itself."""
    fields = {"name": "generator", "protocol": PROTOCOL_VERSION, "latents": LATENTS, "family": "any", "prompt": "any"}
    return Handshake(**{**fields, "width": width, "dtype": dtype, **more})


def training_tree(toy: Path, run_dir: Path, placement: str = "local", **sections: Any) -> dict[str, Any]:
    """A config tree of a small run on random toy models; `sections` are merged over it."""
    tree: dict[str, Any] = {
        "run": {"dir": str(run_dir)},
        "generator": {"model": str(toy / "A"), "latents": 9, "device": "cpu", "lora": {"rank": 4, "alpha": 8}},
        "anchors": [
            {"name": name, "model": str(toy / name), "placement": placement, "weight": weight, "cpus": 0.25}
            for name, weight in (("A", 1.0), ("B", 2.0))
        ],
        "pool": {"start_timeout_s": 120, "deadline_s": 60},
        "data": {"path": str(toy / "data"), "questions_per_image": 2},
        "loss": {"ramp_steps": 3},
        "train": {
            "steps": 6,
            "batch_images": 4,
            "lr_lora": 5e-3,
            "checkpoint_every": 2,
            "validate_images": 4,
            "keep_checkpoints": 3,
        },
        "evaluation": {"images": 4, "batch_images": 4},
        "logging": {"tensorboard": False},
    }
    for name, values in sections.items():
        tree[name] = {**tree[name], **values} if isinstance(tree.get(name), dict) else values
    return tree


def write_config(tree: dict[str, Any], file: Path) -> Path:
    """The tree as a YAML file."""
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file


QUESTIONS = [
    [Question("what color is the circle?", "red"), Question("how many things are there?", "3")],
    [Question("what is in the top left?", "blue square")],
    [
        Question("is there a red square?", "yes"),
        Question("where is the green triangle?", "bottom left"),
        Question("how many squares are there?", "0"),
    ],
    [Question("are there more circles than squares?", "no")],
    [Question("what shape is the yellow thing?", "triangle")],
]


def random_latents(n_images: int, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> Tensor:
    """Reproducible latents (B, K, D)."""
    return torch.randn(n_images, LATENTS, width, generator=torch.Generator().manual_seed(5)).to(dtype)


def fused_request(request_id: str, n_images: int, width: int = WIDTH) -> ReadRequest:
    """A request with a gradient, for pools that are called without a bridge."""
    return ReadRequest(request_id, QUESTIONS[:n_images], random_latents(n_images, width), Gradient.FUSED)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the reference's largest entry."""
    return float((value - reference).abs().max() / reference.abs().max())


def wait_until(condition: Callable[[], bool], limit_s: float, problem: str) -> None:
    """Poll until the condition holds; AssertionError with `problem` after the limit."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"{problem} (waited {limit_s:g} s)"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether a process lives and is no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def anchor_pids() -> set[int]:
    """Processes of anchors that this process's own Ray has started, stopped ones included."""
    pids = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "AnchorActor" in " ".join(process.cmdline()):
                pids.add(process.pid)
    return pids
