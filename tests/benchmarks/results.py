"""results.json and the RESULTS.md made from it: every measured figure, with its bar and how it was measured."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

RESULTS_JSON = Path(__file__).parent / "results.json"
RESULTS_MD = Path(__file__).parent / "RESULTS.md"
TRIED_MD = Path(__file__).parent / "tried.md"
GROWTH_PNG = Path(__file__).parent / "growth.png"
_PACKAGES = ("torch", "transformers", "peft", "ray", "numpy")
_PICTURES = {
    "make bench": (
        GROWTH_PNG,
        "Time of one read on logarithmic axes over questions per image, latents per image and images: measured points "
        "beside a line in proportion to the FLOP count, drawn through the largest read.",
    )
}
"""By command: a picture below its table, with what it shows in words."""


@dataclass(frozen=True, slots=True)
class Result:
    """One figure. bar: what it must reach, in words ("–" for none); met: None without a bar, or if not measured.

    low, high: the 95 % interval, or the smallest and largest of the repetitions, as `unit` says.
    """

    figure: str
    value: float | None
    unit: str
    bar: str
    met: bool | None
    low: float | None
    high: float | None
    n: int
    command: str
    machine: str = field(default_factory=lambda: machine())
    versions: str = field(default_factory=lambda: versions())
    date: str = field(default_factory=lambda: datetime.now(UTC).date().isoformat())


def machine() -> str:
    """Cores, memory and kind of processor of this machine."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {memory_gib:.0f} GiB, {gpu}"


def versions() -> str:
    """Versions of what the figures depend on."""
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    return f"Python {platform.python_version()}, {packages}"


def record(new: Iterable[Result]) -> None:
    """Put figures into results.json, in place of earlier ones of the same name, and write RESULTS.md anew."""
    stored = json.loads(RESULTS_JSON.read_text()) if RESULTS_JSON.is_file() else []
    by_name = {entry["figure"]: entry for entry in stored}
    by_name |= {result.figure: asdict(result) for result in new}
    RESULTS_JSON.write_text(json.dumps(list(by_name.values()), indent=2) + "\n")
    RESULTS_MD.write_text(render(list(by_name.values())))


def record_unmeasured(figures: Iterable[Result]) -> None:
    """Put figures without a value in, unless they have been measured somewhere before."""
    stored = json.loads(RESULTS_JSON.read_text()) if RESULTS_JSON.is_file() else []
    measured = {entry["figure"] for entry in stored if entry["value"] is not None}
    record(figure for figure in figures if figure.figure not in measured)


def render(entries: list[dict[str, object]]) -> str:
    """RESULTS.md: one table per command, with machine, versions and date."""
    lines = ["# Results", "", "Written by the commands that measure; do not edit. Data: `results.json`.", ""]
    for command in dict.fromkeys(str(entry["command"]) for entry in entries):
        group = [entry for entry in entries if entry["command"] == command]
        first = group[0]
        lines += [f"## `{command}`", "", f"{first['date']} · {first['machine']} · {first['versions']}", ""]
        lines += ["| figure | value | low – high | unit | n | bar | met |", "|---|---|---|---|---|---|---|"]
        for entry in group:
            unmet = "not measured" if entry["value"] is None else "–"
            met = unmet if entry["met"] is None else ("yes" if entry["met"] else "**no**")
            span = f"{_number(entry['low'])} – {_number(entry['high'])}"
            lines.append(
                f"| {entry['figure']} | {_number(entry['value'])} | {span} | {entry['unit']} | {entry['n']} "
                f"| {entry['bar']} | {met} |"
            )
        lines.append("")
        picture, words = _PICTURES.get(command, (None, ""))
        if picture is not None and picture.is_file():
            lines += [f"![{words}]({picture.name})", ""]
    return "\n".join([*lines, TRIED_MD.read_text(encoding="utf-8")])


def _number(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else ("–" if value is None else str(value))
