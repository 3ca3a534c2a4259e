"""The main job as a lab runs it: `ray job submit` to a real head node, and the loss of a whole node on the way."""

from __future__ import annotations

import json
from pathlib import Path

from tests.integration.cluster import RayCluster, SubmittedJob
from tests.integration.helpers import training_tree, wait_until, write_config
from trainer.metrics import read_metrics

JOB_LIMIT_S = 240
MAX_UPLOAD_BYTES = 20 * 2**20
NODE_STEPS = 40


def test_job_on_a_head_node(toy_folder: Path, tmp_path: Path) -> None:
    """The demo's config, shorter, to SUCCEEDED; its results lie outside of what was uploaded, and that is small."""
    run_dir = tmp_path / "run"
    settings = (
        f"run.dir={run_dir}",
        "data.source=clevr",
        f"data.path={toy_folder / 'data'}",
        "train.steps=3",
        "train.batch_images=4",
        "train.validate_images=4",
        "evaluation.images=4",
    )
    overrides = [part for setting in settings for part in ("--set", setting)]
    with (
        RayCluster(tmp_path) as cluster,
        SubmittedJob(cluster, tmp_path / "job.log", "--config", "deploy/configs/toy.yaml", *overrides) as job,
    ):
        output = job.assert_succeeds(JOB_LIMIT_S)
        (upload,) = cluster.temp_dir.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
        uploaded = {file.relative_to(upload): file.stat().st_size for file in upload.rglob("*") if file.is_file()}
    assert "Exact match on 4 unseen images" in output
    assert [entry["step"] for entry in read_metrics(run_dir)] == [0, 1, 2]
    assert set(json.loads((run_dir / "evaluation.json").read_text())["anchors"]) == {"A", "B", "C"}
    assert Path("trainer/cli/runs.py") in uploaded
    assert not {file.parts[0] for file in uploaded} & {".git", ".venv", "runs"}
    assert sum(uploaded.values()) < MAX_UPLOAD_BYTES


def test_node_of_the_anchors_dies_and_is_replaced(toy_folder: Path, tmp_path: Path) -> None:
    """Anchors on a second node that is killed mid-run; a new one takes its place and the losses are the same."""
    files = {}
    for name in ("quiet", "struck"):
        tree = training_tree(
            toy_folder,
            tmp_path / name,
            "ray",
            pool={"resources": {"reader": 1}, "deadline_s": JOB_LIMIT_S, "start_timeout_s": 120},
            train={"steps": NODE_STEPS, "batch_images": 4, "validate_images": 4, "checkpoint_every": NODE_STEPS},
        )
        files[name] = str(write_config(tree, tmp_path / f"{name}.yaml"))
    with RayCluster(tmp_path) as cluster:
        readers = cluster.add_node({"reader": 2})
        with SubmittedJob(cluster, tmp_path / "quiet.log", "-c", files["quiet"], "--no-evaluate") as job:
            job.assert_succeeds(JOB_LIMIT_S)
        with SubmittedJob(cluster, tmp_path / "struck.log", "-c", files["struck"], "--no-evaluate") as job:
            under_way = lambda: job.assert_running() and len(read_metrics(tmp_path / "struck")) > 2  # noqa: E731
            wait_until(under_way, JOB_LIMIT_S, "no third step")
            readers.kill()
            assert len(read_metrics(tmp_path / "struck")) < NODE_STEPS, "the run was over before the node died"
            cluster.add_node({"reader": 2})
            job.assert_succeeds(JOB_LIMIT_S)
    assert len(losses(tmp_path / "quiet")) == NODE_STEPS
    assert losses(tmp_path / "struck") == losses(tmp_path / "quiet")


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in read_metrics(run_dir)]
