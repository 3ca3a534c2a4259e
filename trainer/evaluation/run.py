"""`evaluate RUN`: load the run's best checkpoint, start its anchors and the unseen ones, read, write, print."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from anchor_service.pool import AnchorPool
from shared.config import AnchorConfig, Config
from shared.errors import ConfigError
from shared.run_folder import Checkpoint, best_checkpoint, run_config, trained_generator
from trainer.data import ErrorPolicy, load_records, readable_records
from trainer.evaluation.session import Session
from trainer.evaluation.suites import SUITES, against, failure_gallery
from trainer.evaluation.tables import print_tables
from trainer.image_features import ImageFeatures
from trainer.methods import METHODS

EVALUATION_FILE = "evaluation.json"
_SECTIONS = {"reading": "anchors"}
"""Sections of the file are named after their suites, but for this one."""


def evaluate_run(
    config: Config,
    console: Console,
    suites: Sequence[str] = ("reading",),
    anchors: Sequence[str] = (),
    other_run: Path | None = None,
) -> dict[str, Any]:
    """Measure suites with all anchors of the config, or the named ones; writes RUN/evaluation.json, prints tables.

    other_run: a run whose latents of the same images are compared with these (section `against`).

    Each suite's section is written as soon as it is done. An evaluation that was interrupted goes on with the suites
    that it lacks; one that was finished is measured anew. Sections of suites that were not asked for stay as long as
    checkpoint, split, images, seed and anchors are the same.
    """
    checkpoint = best_checkpoint(config)
    chosen = chosen_anchors(config, anchors)
    test = load_records(config.data, config.data.test_split)
    records = readable_records(test, config.evaluation.images, ErrorPolicy(config.data.on_error))
    header = _header(config, checkpoint, len(records), chosen)
    file, unfinished = config.run.dir / EVALUATION_FILE, config.run.dir / f".{EVALUATION_FILE}.unfinished"
    done = _read(unfinished, header)
    todo = [suite for suite in suites if _section(suite) not in done]
    if len(todo) < len(suites):
        console.print(f"going on with an interrupted evaluation: {', '.join(todo) or 'nothing'} left")
    for compared in [config, run_config(other_run)] if other_run is not None else []:
        if METHODS[compared.method].latents_of is None:
            raise ConfigError(f"--against: method {compared.method} has no K latents of each record to compare")
    generator = trained_generator(config)
    shared_base = (generator.model, generator.adapter_off)
    with (
        AnchorPool.start(config, generator.handshake(), shared_base, chosen) as pool,
        contextlib.closing(ImageFeatures(generator, config.data.feature_cache)) as features,
        Progress(console=console, disable=not console.is_terminal) as bar,
    ):

        def track(names: Iterable[str], what: str, n: int) -> Iterable[str]:
            return bar.track(names, total=n, description=what)

        session = Session(config, generator, features, pool, records, track)
        asking = session.asking_once()
        for suite in todo:
            done[_section(suite)] = SUITES[suite](session if suite == "usage" else asking)
            if suite == "reading":
                done["gallery"] = failure_gallery(asking)
            _write(unfinished, {**header, **done})
        if other_run is not None:
            done["against"] = {str(other_run): against(asking, _other_session(other_run, asking))}
    result = {**header, **_read(file, header), **done}
    _write(file, result)
    unfinished.unlink(missing_ok=True)
    print_tables(result, [_section(suite) for suite in suites] + ["against"] * (other_run is not None), console)
    return result


def _other_session(run_dir: Path, session: Session) -> Session:
    """Another run's generator before the same images; no anchor of its own."""
    config = run_config(run_dir)
    generator = trained_generator(config)
    return replace(session, config=config, generator=generator, features=ImageFeatures(generator, None))


def chosen_anchors(config: Config, names: Sequence[str]) -> tuple[AnchorConfig, ...]:
    """The anchors of these names, or all. Raises ConfigError for a name that the config lacks."""
    by_name = {anchor.name: anchor for anchor in config.all_anchors}
    for name in names:
        if name not in by_name:
            raise ConfigError(f"--anchors: no anchor {name!r} in {config.run.dir}; there are {', '.join(by_name)}")
    return tuple(by_name[name] for name in names) if names else config.all_anchors


def _section(suite: str) -> str:
    return _SECTIONS.get(suite, suite)


def _header(config: Config, checkpoint: Checkpoint, n_images: int, anchors: Sequence[AnchorConfig]) -> dict[str, Any]:
    """What the figures of all sections belong to."""
    calibration = config.evaluation.norm_calibration
    return {
        "checkpoint": checkpoint.folder.name,
        "step": checkpoint.step,
        "split": config.data.test_split,
        "images": n_images,
        "seed": config.train.seed,
        "anchor_names": [anchor.name for anchor in anchors],
        "norm_calibration": None if calibration is None else calibration.model_dump(),
    }


def _read(file: Path, header: dict[str, Any]) -> dict[str, Any]:
    """Sections of an earlier evaluation, if it has the same header; nothing otherwise."""
    if not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    same = {name: found.get(name) for name in header} == header
    return {name: section for name, section in found.items() if name not in header} if same else {}


def _write(file: Path, result: dict[str, Any]) -> None:
    temporary = file.with_name(f"{file.name}.partial")
    temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    temporary.replace(file)
