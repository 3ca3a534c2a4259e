"""The few figures of an evaluation that stand for it, for tables over many runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.evaluation.reading import CONDITIONS


def headline(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Figures of evaluation.json by name, the most telling first; undefined ones and absent suites are left out.

    Anchors: recovered share and accuracy under each condition, by anchor; the share that causal tests take away.
    Readers of another family: recovered share through each projector. Latents: geometry, utility of slots, probes. A
    model that answers by itself: accuracy under each condition of the usage test, attention of answers to latents.
    """
    return {name: float(value) for name, value in _all(evaluation) if value is not None}


def _all(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    anchors = evaluation.get("anchors", {})
    for name, anchor in anchors.items():
        yield f"{name}: recovered share", anchor["recovered_share"]["value"]
        yield f"{name}: accuracy from latents", anchor["latents"]["value"]
    if usage := evaluation.get("usage"):
        for condition, by_name in usage["conditions"].items():
            label = "accuracy" if condition == "normal" else f"accuracy, {_words(condition)}"
            yield label, by_name["accuracy"]["value"]
        if "attention_to_latents" in usage:
            yield "attention to latents", usage["attention_to_latents"]["value"]
    for name, anchor in anchors.items():
        for condition in CONDITIONS:
            if condition != "latents":
                yield f"{name}: accuracy, {condition}", anchor[condition]["value"]
        if held_out := anchor.get("held_out_kinds"):
            yield f"{name}: recovered share, held-out kinds", held_out["recovered_share"]["value"]
    for name, causal in evaluation.get("causal", {}).items():
        for test, share in causal["lost_share"].items():
            yield f"{name}: share lost to {_words(test)}", share["value"]
    for name, projectors in evaluation.get("transfer", {}).items():
        for projector, figures in projectors.items():
            yield f"{name}: recovered share, {_words(projector)}", figures["recovered_share"]["value"]
    if geometry := evaluation.get("geometry"):
        yield from _geometry(geometry)


def _geometry(geometry: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    for name, figure in geometry["figures"].items():
        yield _words(name), figure["value"]
    for name, slots in geometry["slots"].items():
        yield f"{name}: utility in nats", slots["utility"]["value"]
        yield f"{name}: helpful slots", slots["helpful_slots"]
    for name in ("latents", "answer_state", "gap") if geometry["probes"] else ():
        yield f"linear probe, {_words(name)}", geometry["probes"][name]["value"]


def _words(name: str) -> str:
    return name.replace("_", " ")
