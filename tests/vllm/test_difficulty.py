"""Difficulty labels with vLLM: a Qwen2.5-VL that reads images there answers as it does with transformers.

`make test-vllm` sets up vLLM's environment and runs this; `make test` does not.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from anchor_service.export import SMALLEST_HEAD
from shared.config import DataConfig
from shared.vlm import load_vlm
from tests.tiny_models import WIDTH, build_tiny, scale_weights
from tests.vllm.test_parity import PYTHON
from trainer.data import load_records
from trainer.difficulty import load_difficulty
from trainer.difficulty.engine import SamplingConfig, sample_answers
from trainer.difficulty.job import Workers, label_split

SAMPLING = SamplingConfig(samples=400, temperature=0.5, max_tokens=2, seed=1, rows=32)
COLORS = ("red", "green", "blue")
LARGEST_DEVIATION = 4.5
"""Of two frequencies, in standard errors of their difference."""
SMALLEST_CHANGE = 0.2
"""Of the probability of all answers together, from one image to another."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Qwen2.5-VL with one head, of a size that vLLM's attention has."""
    folder = build_tiny("qwen2_5_vl", tmp_path_factory.mktemp("vllm") / "model")
    config = AutoConfig.from_pretrained(folder)
    config.text_config.num_attention_heads = config.text_config.num_key_value_heads = WIDTH // SMALLEST_HEAD
    config.text_config.rope_parameters["mrope_section"] = [SMALLEST_HEAD // 4, SMALLEST_HEAD // 8, SMALLEST_HEAD // 8]
    torch.manual_seed(0)
    hf_model = Qwen2_5_VLForConditionalGeneration(config)
    scale_weights(hf_model)
    hf_model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Records of one and two images of different sizes."""
    root = tmp_path_factory.mktemp("data")
    records: list[dict[str, Any]] = []
    for i, color in enumerate(COLORS):
        Image.new("RGB", (40 + 16 * i, 48), color).save(root / f"{color}.png")
        images = [f"{color}.png"] if i < 2 else [f"{color}.png", "red.png"]
        questions = [{"question": f"what {word} is it?", "answer": "red"} for word in ("color", "shape")]
        records.append({"id": color, "images": images, "questions": questions})
    (root / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataConfig(source="jsonl", path=root)


def test_answers_are_as_frequent_as_with_transformers(
    model: str, data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    workers = Workers(vllm=str(PYTHON.absolute()))
    lines = label_split(model, "float32", data, "train", SAMPLING, workers, tmp_path, Console(quiet=True))
    expected = sample_answers(load_vlm(model).freeze(), load_records(data, "train"), SAMPLING)
    assert {(line["record"], line["question"]) for line in lines} == set(load_difficulty(tmp_path))
    ours = {(line["record"], line["question"]): Counter(line["answers"]) for line in expected}
    theirs = {(line["record"], line["question"]): Counter(line["answers"]) for line in lines}
    assert ours.keys() == theirs.keys()
    n = SAMPLING.samples
    for key, answers in ours.items():
        assert len(answers) > 1, "an answer that is always the same tells little"
        for answer in answers | theirs[key]:
            one, other = answers[answer] / n, theirs[key][answer] / n
            mean = (one + other) / 2
            assert abs(one - other) <= LARGEST_DEVIATION * (2 * mean * (1 - mean) / n) ** 0.5, (key, answer)
    red, green = (theirs[f"train/{color}", "what color is it?"] for color in COLORS[:2])
    assert (red - green).total() / n > SMALLEST_CHANGE, "the answers do not depend on the image"
