"""A sweep on a real Ray Tune: trials side by side, one that fails, one that is stopped; then the rest of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.integration.helpers import REPOSITORY, training_tree, wait_until, write_config

LIMIT_S = 240


def start(config: Path, to: Path, *more: str) -> subprocess.Popen[str]:
    arguments = ["--config", str(config), "--to", str(to), "--seeds", "2", "--cpus-per-trial", "1", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", "sweep", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_stopped_sweep_goes_on_and_shows_what_failed(toy_folder: Path, tmp_path: Path) -> None:
    tree = training_tree(toy_folder, tmp_path / "unused", method="livr", train={"steps": 40, "checkpoint_every": 5})
    config = write_config({**tree, "anchors": []}, tmp_path / "config.yaml")
    to = tmp_path / "sweep"
    # A model folder that does not exist is no fault of the grid: it is found when the run loads it.
    grid = ["--grid", f"generator.model={toy_folder / 'A'},{toy_folder / 'gone'}", "--grid", "K=4"]

    first = start(config, to, *grid)
    try:
        finished = lambda: list(to.glob("trials/*/evaluation.json"))  # noqa: E731
        wait_until(lambda: finished() or first.poll() is not None, LIMIT_S, "no run was finished")
        ended = first.poll() is not None
    finally:
        first.kill()
        output, _ = first.communicate()
    assert not ended, output
    finished = {file: file.stat().st_mtime_ns for file in to.glob("trials/*/evaluation.json")}
    assert not (to / "results.json").exists()

    second = start(config, to, *grid)
    output, _ = second.communicate(timeout=LIMIT_S)
    assert second.returncode == 1, output  # two runs failed
    # A run that was being evaluated when the sweep was killed may have come to its end since.
    told = re.search(r"4 runs, (\d) of them finished", output)
    assert told is not None, output
    assert int(told[1]) >= len(finished) >= 1
    assert {file: file.stat().st_mtime_ns for file in finished} == finished, "a finished run was run again"
    results = json.loads((to / "results.json").read_text())
    good, bad = results["points"]
    assert (good["seeds"], good["failed_seeds"]) == (2, [])
    assert 0 <= good["figures"]["accuracy"]["value"] <= 1
    assert (bad["seeds"], bad["failed_seeds"]) == (0, [0, 1])
    assert all("no such model folder" in run["error"] for run in results["runs"] if "gone" in run["folder"])
    assert output.count("failed:") == 2
    assert (to / "results.png").is_file()
    for run in results["runs"][:2]:
        lines = (REPOSITORY / run["folder"] / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(40))
