"""Exact match of the shipped toy models on unseen scenes (`make model-figures`)."""

from __future__ import annotations

import tempfile
from pathlib import Path

from shared.vlm import load_vlm
from tests.benchmarks.results import Result, record
from trainer.data.clevr import load_clevr
from trainer.toy.build import PRETRAINING_QUESTIONS_PER_KIND, PRETRAINING_SIZES, TOY_MODELS, accuracy
from trainer.toy.dataset import ensure_toy_data
from trainer.toy.perception import perception_records

COMMAND = "make model-figures"
BAR = 0.97
PERCEPTION_BAR = 0.75
_SEED = 4321
"""Neither the seed of the models' own images nor that of the demo's data set."""


def main() -> None:
    """Read 500 unseen scenes with every model and record the figures."""
    n_scenes = PRETRAINING_SIZES["test"]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        ensure_toy_data(root, {"test": n_scenes}, _SEED, PRETRAINING_QUESTIONS_PER_KIND)
        records = load_clevr(root, "test")
        seen = {
            "scenes": (records, BAR, f"with the real image, {n_scenes} unseen scenes"),
            "perception": (
                perception_records(n_scenes, _SEED),
                PERCEPTION_BAR,
                f"{n_scenes} unseen sets of 1 to 3 images",
            ),
        }
        for spec in TOY_MODELS:
            unseen, bar, words = seen[spec.sees]
            figure = f"toy model {spec.name}: exact match {words}"
            folder_of_model = Path("trainer/toy/models") / spec.name
            value = None
            if folder_of_model.is_dir():
                value = accuracy(load_vlm(str(folder_of_model)).freeze(), unseen)["all"]
            met = None if value is None else value >= bar
            n_questions = sum(len(r.questions) for r in unseen)
            results.append(Result(figure, value, "share", f"≥ {bar:.2f}", met, None, None, n_questions, COMMAND))
    record(results)


if __name__ == "__main__":
    main()
