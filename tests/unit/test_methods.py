"""The table of methods: options are checked, and a new method is a class and a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from shared.config import Section, parse_config
from shared.errors import ConfigError
from tests.integration.helpers import training_tree
from trainer.loop import train_run
from trainer.methods import METHODS, with_checked_method
from trainer.methods.base import LossParts, Method


class LengthOptions(Section):
    length: float = Field(2.0, gt=0)


class LengthMethod(Method):
    """A method that asks no anchor: latents of a given length, times a weight of its own."""

    Options = LengthOptions
    needs_anchors = False
    suites = ()

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.scale = nn.Linear(1, 1, bias=False)
        self.prepared = 0

    @property
    def extra_modules(self) -> nn.Module:
        return self.scale

    def prepare(self, features: Any, records: Any) -> None:
        self.prepared = len(features.of_records(records).tokens)

    def emit(self, batch: Any, tokens: Any, step: int) -> Tensor:
        assert self.prepared
        return self._generator.emit(tokens)

    def loss(self, emitted: Tensor, step: int) -> LossParts:
        lengths_BK = self.scale(emitted.norm(dim=-1, keepdim=True))
        total = (lengths_BK - self._config.options["length"]).square().mean()
        return LossParts(total, {"loss": total.item()}, {})

    def validation_loss(self, features: Any, records: Any) -> float:
        with torch.no_grad():
            return self.loss(self.emit(None, features.of_records(records), 0), 0).total.item()


def test_a_dummy_method_is_one_class_and_one_line(toy_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(METHODS, "length", LengthMethod)
    tree = training_tree(toy_folder, tmp_path / "run", method="length", options={"length": 3.0})
    config = with_checked_method(parse_config({**tree, "anchors": []}, "test"))
    assert train_run(config, resume=False)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == config.train.steps
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"method": "livre"}, "method: 'livre' is not known; use one of anchored"),
        ({"anchors": []}, "anchors: method anchored learns from anchors; add at least one"),
        ({"options": {"length": 1}}, "options of method anchored: length: unknown key"),
        ({"method": "length", "options": {"length": 0}}, "options of method length: length: input should be greater"),
    ],
)
def test_wrong_methods_and_options_are_named(
    tmp_path: Path, monkeypatch: Any, changes: dict[str, Any], expected: str
) -> None:
    monkeypatch.setitem(METHODS, "length", LengthMethod)
    config = parse_config({**training_tree(tmp_path, tmp_path), **changes}, "test")
    with pytest.raises(ConfigError, match=expected):
        with_checked_method(config)


def test_options_are_completed(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(METHODS, "length", LengthMethod)
    config = parse_config({**training_tree(tmp_path, tmp_path), "method": "length"}, "test")
    assert with_checked_method(config).options == {"length": 2.0}
