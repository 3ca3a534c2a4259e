"""The few figures of an evaluation that stand for it, for tables over many runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def headline(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Figures of evaluation.json by name; undefined ones are left out.

    Anchors: recovered share and accuracy from latents. A model that answers by itself: accuracy under each condition of
    the usage test, and the attention that its answers pay to latents.
    """
    figures: dict[str, Mapping[str, Any]] = {}
    for name, anchor in evaluation.get("anchors", {}).items():
        figures[f"{name}: recovered share"] = anchor["recovered_share"]
        figures[f"{name}: accuracy from latents"] = anchor["latents"]
    if usage := evaluation.get("usage"):
        for condition, by_name in usage["conditions"].items():
            label = "accuracy" if condition == "normal" else f"accuracy, {condition.replace('_', ' ')}"
            figures[label] = by_name["accuracy"]
        if "attention_to_latents" in usage:
            figures["attention to latents"] = usage["attention_to_latents"]
    return {name: float(figure["value"]) for name, figure in figures.items() if figure["value"] is not None}
