"""`report RUN [RUN2 …]`: read the runs, draw, write RUN/report.html and RUN/report/*.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.report.attention import AttentionRule
from trainer.report.page import Page, render
from trainer.report.results import RunResults, load_results
from trainer.report.sections import build_sections

REPORT_FILE = "report.html"
PICTURES_FOLDER = "report"


def write_report(run_dirs: Sequence[Path], rule: AttentionRule) -> Path:
    """Write the page into the first run's folder and return its path. Pictures of an earlier report are replaced."""
    runs = load_results(run_dirs)
    sections, absent = build_sections(runs, rule)
    title = "Visual latents: " + " · ".join(run.label for run in runs)
    html = render(Page(title, [_facts(run) for run in runs], sections, absent))
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
