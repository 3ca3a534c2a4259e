"""Fixtures of all tests: tiny models and a small toy data set, made once per session, pictures, questions."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from shared.messages import Question
from shared.vlm import VisionLanguageModel, load_vlm
from tests.integration.helpers import TOY_SIZES
from tests.tiny_models import build_tiny
from trainer.toy.dataset import ensure_toy_data
from trainer.toy.tiny_vlms import new_model, save_folder

TinyFolder = Callable[..., str]
TinyModel = Callable[..., VisionLanguageModel]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> TinyFolder:
    """`tiny_folder(family, dtype="float32", **options of build_tiny)`: a model folder, built once per session."""
    built: dict[tuple[object, ...], Path] = {}

    def folder(family: str, dtype: str = "float32", **options: object) -> str:
        key = (family, dtype, *sorted(options.items()))
        if key not in built:
            built[key] = build_tiny(family, tmp_path_factory.mktemp(family) / "model", dtype, **options)
        return str(built[key])

    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: TinyFolder) -> TinyModel:
    """`tiny_model(family, dtype="float32")`: a frozen model, loaded once per session; do not change it."""
    loaded: dict[tuple[str, str], VisionLanguageModel] = {}

    def model(family: str, dtype: str = "float32") -> VisionLanguageModel:
        if (family, dtype) not in loaded:
            loaded[family, dtype] = load_vlm(tiny_folder(family, dtype), dtype).freeze()
        return loaded[family, dtype]

    return model


@pytest.fixture(scope="session")
def questions() -> list[list[Question]]:
    """Three images' questions: ragged in number, and answers of one to four tokens."""
    return [
        [
            Question("what color is the square?", "red"),
            Question("where is the red circle?", "top left"),
            Question("is there a green triangle?", "no"),
        ],
        [Question("how many things are there?", "4")],
        [
            Question("what is in the middle center?", "blue circle, red square"),
            Question("are there more circles than squares?", "yes"),
        ],
    ]


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Three noisy pictures of different shapes."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        for height, width in ((48, 48), (32, 64), (60, 36))
    ]


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models A and B of the toy world with random weights, and its data in a few images."""
    root = tmp_path_factory.mktemp("toy")
    for name, seed in (("A", 1), ("B", 2)):
        save_folder(new_model("qwen2_5_vl", seed), root / name)
    ensure_toy_data(root / "data", TOY_SIZES, seed=3)
    return root
