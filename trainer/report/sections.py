"""The sections of the page, each from all runs; a section that no run has numbers for is None."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata

from shared.config import dump_config
from shared.vlm.latent_attention import RULES, AttentionRule
from trainer.methods import chosen_suites
from trainer.report import charts, tables
from trainer.report.images import attention_pictures, gallery
from trainer.report.page import Listing, Picture, Section, Table
from trainer.report.results import Evaluation, RunResults

_PACKAGES = ("visual-latents", "torch", "transformers", "peft", "ray", "numpy", "scikit-learn", "matplotlib")
_SECTIONS: dict[str, Callable[[Evaluation], object]] = {
    "reading": lambda evaluation: evaluation.anchors,
    "causal": lambda evaluation: evaluation.causal,
    "controls": lambda evaluation: evaluation.controls,
    "geometry": lambda evaluation: evaluation.geometry,
    "transfer": lambda evaluation: evaluation.transfer,
    "benchmarks": lambda evaluation: evaluation.benchmarks,
    "usage": lambda evaluation: evaluation.usage,
}


def build_sections(runs: Sequence[RunResults], rule: AttentionRule) -> tuple[list[Section], list[str]]:
    """Sections in the order of the page, and one line for each part that a run lacks, with the way to get it."""
    sections = [
        _reading(runs),
        _usage(runs),
        _causal(runs),
        _controls(runs),
        _transfer(runs),
        _geometry(runs),
        _states(runs),
        _attention(runs, rule),
        _training(runs),
        _benchmarks(runs),
        _gallery(runs),
        _reproduce(runs, rule),
    ]
    return [section for section in sections if section is not None], _absent(runs)


def _reading(runs: Sequence[RunResults]) -> Section | None:
    compared = [tables.recovered_shares(runs)] if len(runs) > 1 else []
    intro = (
        "Each anchor answers the same questions from the real image (ceiling), from the latents, from the latents of "
        "another image (swapped), and from the question alone (floor). Recovered share = (latents − floor) / "
        "(ceiling − floor): 1 means that the latents serve as well as the image, 0 that they say nothing."
    )
    shown = [*compared, tables.headline(runs), tables.by_kind(runs), tables.nll(runs)]
    return _unless_empty(Section("Reading", intro, shown))


def _usage(runs: Sequence[RunResults]) -> Section | None:
    span = charts.delta_span(map(charts.usage_deltas, runs))
    pictures = _each(runs, lambda run: charts.usage_bars(run, span))
    shares = [
        f"{run.label}: {tables.cell(share).text} of the attention where an answer's first token is predicted goes to "
        "the latents."
        for run in runs
        if run.evaluation.usage is not None and (share := run.evaluation.usage.attention_to_latents) is not None
    ]
    intro = (
        "The model answers by itself from images and latents. At test time its latents are removed, computed from "
        "other images, or left as the only way to the images (bottleneck); floor: no image at all. Latents that are "
        "used cost accuracy when they go."
    )
    shown = [tables.usage(runs), tables.usage_by_kind(runs)]
    return _unless_empty(Section("Usage", " ".join([intro, *shares]), shown, pictures))


def _causal(runs: Sequence[RunResults]) -> Section | None:
    span = charts.delta_span(map(charts.causal_deltas, runs))
    pictures = _each(
        runs, lambda run: [*charts.causal_bars(run, span), *charts.truncation_curve(run), *charts.slot_curves(run)]
    )
    return _unless_empty(
        Section(
            "Causal tests",
            "The latents' content is swapped and everything else stays. Latents are used if another image's latents "
            "and both kinds of random ones each take more than half of what they recover, the whole interval above ½; "
            "inert if the interval of another image's reaches 0; partly used between.",
            [tables.verdicts(runs), tables.causal(runs)],
            pictures,
        )
    )


def _controls(runs: Sequence[RunResults]) -> Section | None:
    span = charts.delta_span(map(charts.control_deltas, runs))
    intro = "What the generator looks at is replaced or disturbed; Δ is against the undisturbed image."
    pictures = _each(runs, lambda run: charts.control_bars(run, span))
    return _unless_empty(Section("Image controls", intro, [tables.controls(runs)], pictures))


def _transfer(runs: Sequence[RunResults]) -> Section | None:
    intro = (
        "Readers of another family and width, never trained with: a projector in closed form, fitted on training "
        "images, carries the latents over. Outside span: share of the latents' variance in directions for which the "
        "fit had hardly any evidence."
    )
    return _unless_empty(Section("Transfer", intro, [tables.transfer(runs)]))


def _geometry(runs: Sequence[RunResults]) -> Section | None:
    pictures = _each(
        runs, lambda run: [*charts.slot_cosines(run), *charts.norm_charts(run), *charts.utility_curves(run)]
    )
    intro = "How the latents lie. Read it beside the causal tests: geometry alone says nothing about use."
    return _unless_empty(Section("Geometry", intro, [tables.geometry(runs)], pictures))


def _states(runs: Sequence[RunResults]) -> Section | None:
    intro = (
        "Latents, mean image tokens, and text states (where the generator's base model, reading the latents, predicts "
        "an answer) of test images, brought to two dimensions together."
    )
    return _unless_empty(Section("State space", intro, pictures=_each(runs, charts.projections)))


def _attention(runs: Sequence[RunResults], rule: AttentionRule) -> Section | None:
    intro = f"Where in the image the K latent positions of the generator look: {RULES[rule]}. Other rules: --attention."
    return _unless_empty(Section("Attention", intro, pictures=_each(runs, lambda run: attention_pictures(run, rule))))


def _training(runs: Sequence[RunResults]) -> Section | None:
    intro = "From metrics.jsonl. A falling loss alone proves nothing about the latents."
    return _unless_empty(Section("Training", intro, pictures=_each(runs, charts.training_curves)))


def _benchmarks(runs: Sequence[RunResults]) -> Section | None:
    intro = (
        "Public benchmarks from local files, with their official metrics. The candidate answer of the highest "
        "likelihood counts; records that this cannot answer are left out."
    )
    return _unless_empty(Section("Benchmarks", intro, [tables.benchmarks(runs), tables.benchmark_details(runs)]))


def _gallery(runs: Sequence[RunResults]) -> Section | None:
    """Of the first run alone: failures of several runs are about different questions."""
    cards = gallery(runs[0].evaluation.gallery)
    whose = f" of {runs[0].label}" if len(runs) > 1 else ""
    shown = f"{len(cards)} of {len(runs[0].evaluation.gallery)} questions{whose} that at least one anchor got wrong."
    return _unless_empty(Section("Failures", shown, cards=cards))


def _reproduce(runs: Sequence[RunResults], rule: AttentionRule) -> Section:
    folders = [str(run.config.run.dir) for run in runs]
    commands = [
        line
        for folder in folders
        for line in (
            f"python -m trainer train --config {folder}/config.yaml --set run.dir=NEW_FOLDER",
            f"python -m trainer evaluate {folder} --suite all",
        )
    ]
    commands.append(f"python -m trainer report {' '.join(folders)} --attention {rule}")
    return Section(
        "Reproduce",
        "The commands that lead to these numbers; versions are those of the environment that wrote this page.",
        listings=[
            Listing("Commands", "\n".join(commands)),
            Listing("Versions", "\n".join(_versions())),
            *(Listing(f"Config of {run.label}", dump_config(run.config), folded=True) for run in runs),
        ],
    )


def _versions() -> list[str]:
    return [f"python {platform.python_version()}", *(f"{name} {metadata.version(name)}" for name in _PACKAGES)]


def _absent(runs: Sequence[RunResults]) -> list[str]:
    lines = []
    for run in runs:
        suites = chosen_suites(run.config, "all")
        for suite in (suite for suite in suites if not _SECTIONS[suite](run.evaluation)):
            remedy = f"measure it with python -m trainer evaluate {run.config.run.dir} --suite {suite}"
            if suite in ("transfer", "benchmarks") and not getattr(run.config.evaluation, suite):
                remedy = f"evaluation.{suite} of its config is empty"
            lines.append(f"{run.label}: the {suite} suite; {remedy}")
        if "reading" in suites and not run.evaluation.gallery:
            lines.append(f"{run.label}: the failure gallery; evaluation.json holds none")
        if not run.metrics:
            lines.append(f"{run.label}: training curves; metrics.jsonl, which train writes, is not in the run folder")
    return lines


def _each(runs: Sequence[RunResults], pictures_of: Callable[[RunResults], list[Picture]]) -> list[Picture]:
    """Pictures of all runs, the same chart of each run side by side, named after their run if there are several."""
    if len(runs) == 1:
        return pictures_of(runs[0])
    by_name: dict[str, list[Picture]] = {}
    for i, run in enumerate(runs, start=1):
        slug = f"{i}-{re.sub(r'[^A-Za-z0-9.-]+', '-', run.label).strip('-.')}"
        for p in pictures_of(run):
            named = replace(
                p, name=f"{slug}-{p.name}", caption=f"{run.label}: {p.caption}", alt=f"{run.label}: {p.alt}"
            )
            by_name.setdefault(p.name, []).append(named)
    return [picture for pictures in by_name.values() for picture in pictures]


def _unless_empty(section: Section) -> Section | None:
    filled: list[Table] = [table for table in section.tables if table.rows]
    if not (filled or section.pictures or section.cards):
        return None
    return replace(section, tables=filled)
