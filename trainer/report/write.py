"""`report RUN [RUN2 …]`: read the runs, draw, write RUN/report.html and RUN/report/*.png."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shared.errors import VisualLatentsError
from shared.vlm.latent_attention import AttentionRule
from trainer.methods import METHODS
from trainer.report.page import Page, render
from trainer.report.results import RunResults, load_results
from trainer.report.sections import build_sections
from trainer.report.states import measure_states

REPORT_FILE = "report.html"
PICTURES_FOLDER = "report"
_NEED_MODEL = "attention maps, state space and norms by layer"


def write_report(run_dirs: Sequence[Path], rule: AttentionRule, with_model: bool = True) -> Path:
    """Write the page into the first run's folder and return its path. Pictures of an earlier report are replaced.

    with_model: load each run's generator for states, norms by layer and attention.
    """
    runs, absent = [], []
    for run in load_results(run_dirs):
        runs.append(run)
        if not with_model:
            absent.append(f"{run.label}: {_NEED_MODEL}; leave --no-model out")
            continue
        if METHODS[run.config.method].latents_of != "image":
            continue  # where latents depend on the question, there is no state of an image to draw
        try:
            runs[-1] = replace(run, states=measure_states(run.config, rule))
        except VisualLatentsError as error:
            absent.append(f"{run.label}: {_NEED_MODEL}; {error}")
    sections, lacking = build_sections(runs, rule)
    title = "Visual latents: " + " · ".join(run.label for run in runs)
    html = render(Page(title, [_facts(run) for run in runs], sections, [*absent, *lacking]))
    folder = run_dirs[0] / PICTURES_FOLDER
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for picture in (picture for section in sections for picture in section.pictures):
        (folder / f"{picture.name}.png").write_bytes(picture.light)
        (folder / f"{picture.name}-dark.png").write_bytes(picture.dark)
    page = run_dirs[0] / REPORT_FILE
    partial = page.with_name(f".{REPORT_FILE}.partial")
    partial.write_text(html, encoding="utf-8")
    partial.replace(page)
    return page


def _facts(run: RunResults) -> str:
    evaluation, config = run.evaluation, run.config
    return (
        f"{run.label}: method {config.method}, generator {config.generator.model}, {config.generator.latents} latents; "
        f"measured at {evaluation.checkpoint} of {config.train.steps} steps, on {evaluation.images} images of the "
        f"split {evaluation.split}, seed {evaluation.seed}"
    )
