"""README.md stays true: its map names every tracked file and folder, every path, link and command on it exists."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from typer.main import get_command

from anchor_service.cli import app as anchor_app
from trainer.cli import app as trainer_app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAP_LINE = re.compile(r"^- `([^`]+)`: \S.*$", re.MULTILINE)
DATA_FOLDERS = ("trainer/toy/models/",)
"""One line stands for all that lies below."""


def tracked_files() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so nothing says which files belong to the project")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).exists()]


def mapped_paths() -> list[str]:
    _, _, the_map = README.partition("\n## Map\n")
    return MAP_LINE.findall(the_map)


def folders_of(file: str) -> set[str]:
    return {f"{parent}/" for parent in Path(file).parents if str(parent) != "."}


def entries_needed(files: list[str]) -> set[str]:
    """A line for every file and folder; a data folder's own line covers what is below it."""
    everything = {entry for file in files for entry in (file, *folders_of(file))}
    return {e for e in everything if not any(e.startswith(data) and e != data for data in DATA_FOLDERS)}


def test_every_tracked_file_and_folder_has_a_line() -> None:
    missing = sorted(entries_needed(tracked_files()) - set(mapped_paths()))
    assert not missing, "add to the map of README.md:\n" + "\n".join(f"- `{entry}`: …" for entry in missing)


def test_every_mapped_path_exists_and_is_tracked() -> None:
    gone = sorted(set(mapped_paths()) - entries_needed(tracked_files()))
    assert not gone, f"remove from the map of README.md: {gone}"


def test_no_path_is_mapped_twice() -> None:
    assert [path for path, n in Counter(mapped_paths()).items() if n > 1] == []


def test_data_folders_are_covered_by_one_line() -> None:
    files = ["trainer/toy/models/A/config.json", "trainer/toy/build.py"]
    assert entries_needed(files) == {"trainer/", "trainer/toy/", "trainer/toy/build.py", "trainer/toy/models/"}


def test_links_lead_somewhere() -> None:
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in t]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_two_commands_open_the_page() -> None:
    opening = README.split("\n## ")[0].splitlines()[:6]
    commands = [line.split("#")[0].strip() for line in opening if line.startswith("    ")]
    assert commands == ["make demo", "make test"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test"} <= set(targets)


def test_every_command_on_the_page_exists() -> None:
    verbs = {("trainer", verb) for verb in get_command(trainer_app).commands}
    verbs |= {("anchor_service", verb) for verb in get_command(anchor_app).commands}
    shown = set(re.findall(r"python -m (trainer|anchor_service) ([a-z]+)", README))
    assert shown == verbs


def test_every_config_on_the_page_exists() -> None:
    shown = set(re.findall(r"deploy/[\w./-]+\.(?:yaml|svg)", README))
    assert shown
    assert [path for path in shown if not (ROOT / path).is_file()] == []
