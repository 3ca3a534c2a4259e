"""The labelling job on a real Ray: killed, started again, with more actors, with damaged images."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner

from shared.config import DataConfig
from shared.errors import ConfigError, DataError, ModelError
from shared.vlm import load_vlm
from tests.integration.helpers import REPOSITORY, wait_until
from trainer.cli import app
from trainer.data import ErrorPolicy, load_records
from trainer.difficulty import load_difficulty
from trainer.difficulty.engine import SamplingConfig, sample_answers
from trainer.difficulty.job import Workers, label_questions, label_split
from trainer.difficulty.labels import LabelFolder

SAMPLING = SamplingConfig(samples=4, max_tokens=6, seed=2)
QUIET = Console(quiet=True)
LIMIT_S = 120


def counts(lines: list[dict]) -> dict[tuple[str, str], tuple[int, tuple[str, ...]]]:
    labelled = {(line["record"], line["question"]): (line["right"], tuple(line["answers"])) for line in lines}
    assert len(labelled) == len(lines), "a question was labelled twice"
    return labelled


@pytest.fixture(scope="module")
def expected(toy_folder: Path) -> dict:
    """The same in this process, without Ray, all at once."""
    records = load_records(DataConfig(path=toy_folder / "data"), "train")
    model = load_vlm(str(toy_folder / "A")).freeze()
    return counts(sample_answers(model, records, SAMPLING.model_copy(update={"rows": 10_000})))


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for part in sorted(folder.glob("part-*")) for line in part.read_text().splitlines()]


def test_actors_and_batches_change_no_label(local_ray, toy_folder, tmp_path, expected):
    workers = Workers(actors=2, cpus=0.5, batch_records=3)
    arguments = (str(toy_folder / "A"), "float32", DataConfig(path=toy_folder / "data"), "train", SAMPLING, workers)
    assert counts(label_split(*arguments, tmp_path, QUIET)) == expected
    labels = load_difficulty(tmp_path)
    assert {key: label.right for key, label in labels.items()} == {key: right for key, (right, _) in expected.items()}


def make_engine():
    """Knows no model: one line per record, and an image that cannot be read for every record that ends in 3."""

    def engine(records) -> list[dict]:
        return [
            {"record": record.record_id, "error": f"{record.record_id}.png: cannot be read"}
            if record.record_id.endswith("3")
            else {"record": record.record_id, "question": "?", "right": 0, "samples": 1, "answers": []}
            for record in records
        ]

    return engine


def test_an_environment_without_vllm_is_named(local_ray, toy_folder, tmp_path):
    workers = Workers(cpus=0.5, vllm=sys.executable)
    arguments = (str(toy_folder / "A"), "float32", DataConfig(path=toy_folder / "data"), "train", SAMPLING, workers)
    with pytest.raises(ModelError, match=r"no vLLM to import .* give --vllm the interpreter"):
        label_split(*arguments, tmp_path, QUIET)
    with pytest.raises(DataError, match="not complete"):
        load_difficulty(tmp_path)
    with pytest.raises(ConfigError, match=r"engine 'vllm', not 'transformers'"):
        label_split(*arguments[:-1], Workers(), tmp_path, QUIET)


def test_a_damaged_image_ends_the_job_or_is_skipped_and_nothing_done_is_done_again(local_ray, toy_folder, tmp_path):
    records = load_records(DataConfig(path=toy_folder / "data"), "train")
    labels, workers = LabelFolder(tmp_path, {}), Workers(batch_records=2)
    # A mark that only survives if nobody labels its record again.
    marked = {"record": records[0].record_id, "question": "?", "right": 99, "samples": 4, "answers": []}
    labels.write_part([marked])
    with pytest.raises(DataError, match=r"3.png: cannot be read"):
        label_questions(records, labels, make_engine, workers, ErrorPolicy("fail"), QUIET)
    before = {part: part.read_text() for part in tmp_path.glob("part-*")}
    assert 1 < len(labels.rows()) < len(records)
    with pytest.raises(DataError, match="not complete"):
        load_difficulty(tmp_path)

    policy = ErrorPolicy("skip")
    label_questions(records, labels, make_engine, workers, policy, QUIET)
    assert policy.count == sum(record.record_id.endswith("3") for record in records) > 1
    assert {part: part.read_text() for part in before} == before
    assert len(load_difficulty(tmp_path)) == len(labels.rows()) == len(records) - policy.count
    assert marked in labels.rows()


def arguments_of(toy: Path, to: Path, samples: int = 4) -> list[str]:
    options = {"model": toy / "A", "data": toy / "data", "split": "train", "to": to, "samples": samples}
    options |= {"max-tokens": 6, "seed": 2, "save-every-s": 0, "rows": 4}
    return ["difficulty", *[part for name, value in options.items() for part in (f"--{name}", str(value))]]


def test_sigkill_and_again(local_ray, toy_folder, tmp_path, expected):
    """Killed as soon as a part is on disk; started again it does the rest, and the first parts stay as they were."""
    to = tmp_path / "labels"
    command = [sys.executable, "-m", "trainer", *arguments_of(toy_folder, to)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
    children: list[psutil.Process] = []
    try:
        wait_until(lambda: any(to.glob("part-*")) or process.poll() is not None, LIMIT_S, "no part was written")
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        assert process.wait(LIMIT_S) == -signal.SIGKILL
    finally:
        process.kill()
        for child in children:
            # Two agents of a local Ray outlive a driver that was killed.
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.communicate()
    before = {part.name: part.read_text() for part in to.glob("part-*")}
    n_done = len({line["record"] for line in read(to)})
    assert 0 < n_done < 24
    with pytest.raises(DataError, match="not complete"):
        load_difficulty(to)

    done = CliRunner().invoke(app, arguments_of(toy_folder, to))
    assert done.exit_code == 0, done.output
    assert f"going on: {n_done} of 24 records are labelled" in done.output
    assert "samples/s" in done.output
    n_hard = sum(right == 0 for right, _ in expected.values())
    assert f"{n_hard} of {len(expected)} questions" in done.output
    assert {part.name: part.read_text() for part in to.glob("part-*") if part.name in before} == before
    assert counts(read(to)) == expected
    assert len(load_difficulty(to)) == len(expected)

    refused = CliRunner().invoke(app, arguments_of(toy_folder, to, samples=5))
    assert refused.exit_code == 1
    assert "holds labels with samples 4, not 5; give another --to" in refused.output
