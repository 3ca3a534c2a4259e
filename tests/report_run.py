"""A run folder with every section that a report can draw, for tests of the report. All its numbers are made up.

The checkpoint is an untrained generator on the toy model A.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from shared.config import dump_config, load_config
from shared.vlm.generator import Generator
from trainer.checkpoint import CheckpointStore
from trainer.data import load_records
from trainer.data.records import Record
from trainer.toy.dataset import ensure_toy_data

ROOT = Path(__file__).parents[1]
K, N_IMAGES = 9, 24
ANCHORS = {"A": True, "B": True, "C": False}
SWAPS = {
    "zero_all": -0.62, "random_same_dist": -0.60, "random_model_dist": -0.55, "first_repeat": -0.44,
    "permute_slots": -0.31, "swap_images": -0.65, "noise_0.1": -0.004, "noise_0.3": -0.05, "noise_1": -0.38,
    "removed": -0.64, "markers_only": -0.63, "oracle": 0.006,
}  # fmt: skip
CONTROLS = ("blank", "other_image", "shuffled_pixels", "occlusion_30", "noise_0.2", "blur_1", "jpeg_20", "pgd_8")


def write_run(folder: Path, seed: int = 0) -> Path:
    """A finished run in `folder`, its data set beside it in `data`; the seed moves the numbers a little."""
    rng = np.random.default_rng(seed)
    data = folder.parent / "data"
    ensure_toy_data(data, {"train": 2, "val": 2, "test": N_IMAGES})
    config = load_config(
        ROOT / "deploy/configs/toy.yaml", [f"run.dir={folder}", f"data.path={data}", "data.source=clevr"]
    )
    records = load_records(config.data, "test")
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in metrics(rng)))
    (folder / "evaluation.json").write_text(json.dumps(evaluation(records, rng)))
    generator = Generator(config.generator, seed)
    CheckpointStore(folder, keep=1).save(600, generator, {}, dump_config(config), "", None)
    return folder


def figure(value: float, half: float = 0.02, n: int = 400) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def evaluation(records: list[Record], rng: np.random.Generator) -> dict[str, Any]:
    plain = {name: 0.97 - 0.01 * i - 0.02 * rng.random() for i, name in enumerate(ANCHORS)}
    return {
        "checkpoint": "step-000600",
        "step": 600,
        "split": "test",
        "images": N_IMAGES,
        "seed": 0,
        "anchors": {name: anchor(seen, plain[name]) for name, seen in ANCHORS.items()},
        "causal": {name: causal(accuracy, rng) for name, accuracy in plain.items()},
        "controls": {
            name: {test: swap(accuracy, -0.6 * rng.random()) for test in CONTROLS} for name, accuracy in plain.items()
        },
        "geometry": geometry(rng),
        "transfer": {
            "D": {
                f"{fit} on {source}": reading(0.7) | {"outside_span": 0.12}
                for source in ("visual_tokens", "latents")
                for fit in ("least_squares", "procrustes")
            }
        },
        "benchmarks": {"mmvp": {"left_out": 2, "anchors": {name: benchmark() for name in ANCHORS}}},
        "against": {"runs/other": {"cka": 0.87}},
        "gallery": [failure(record) for record in records[:6]],
    }


def reading(latents: float) -> dict[str, Any]:
    accuracies = {"ceiling": 0.99, "latents": latents, "swapped": 0.33, "floor": 0.34}
    nll = {"ceiling": 0.02, "latents": 0.06, "swapped": 1.9, "floor": 0.55}
    return {
        **{name: figure(value) for name, value in accuracies.items()},
        "recovered_share": figure((latents - 0.34) / 0.65),
        "nll": {name: figure(value) for name, value in nll.items()},
        "first_token_nll": {name: figure(2 * value) for name, value in nll.items()},
    }


def anchor(seen: bool, latents: float) -> dict[str, Any]:
    undefined = reading(0.9) | {"recovered_share": {"value": None, "low": None, "high": None, "n": 40}}
    kinds = {kind: reading(latents - 0.05) for kind in ("count_simple", "exist", "query")} | {"compare": undefined}
    return {"seen_in_training": seen, **reading(latents), "kinds": kinds, "held_out_kinds": reading(0.8)}


def causal(accuracy: float, rng: np.random.Generator) -> dict[str, Any]:
    tests = {name: swap(accuracy, delta + 0.03 * rng.random()) for name, delta in SWAPS.items()}
    tests |= {f"zero_slot_{k}": swap(accuracy, -0.12 * rng.random()) for k in range(K)}
    tests |= {f"keep_one_{k}": swap(accuracy, -0.6 + 0.1 * rng.random()) for k in range(K)}
    tests |= {f"truncate_{k}": swap(accuracy, -0.62 * (1 - k / K)) for k in range(1, K)}
    lost = {"swap_images": figure(1.02), "random_same_dist": figure(0.95), "random_model_dist": figure(0.87)}
    return {"verdict": "used", "lost_share": lost, "tests": tests}


def swap(accuracy: float, delta: float) -> dict[str, Any]:
    return {
        "accuracy": figure(accuracy + delta),
        "nll": figure(0.06 - 2 * delta),
        "delta_accuracy": figure(delta),
        "delta_nll": figure(-2 * delta),
        "flip_share": figure(abs(delta) + 0.01),
        "recovered_share": figure((accuracy + delta - 0.34) / 0.65),
    }


def geometry(rng: np.random.Generator) -> dict[str, Any]:
    noise_KK = 0.2 * rng.random((K, K))
    cosine_KK = 0.3 + (noise_KK + noise_KK.T) / 2
    np.fill_diagonal(cosine_KK, 1)
    return {
        "figures": {"slot_cosine": figure(0.4), "effective_rank": figure(5.2, 0.1)},
        "slot_cosine": cosine_KK.tolist(),
        "norms": {"latents": [7.0, 7.8, 8.1, 8.4, 9.6], "image_tokens": [5.2, 6.9, 7.6, 8.3, 11.0]},
        "slots": {name: slots(rng) for name in ANCHORS},
        "probes": {
            "question": "how many things are there?",
            "latents": figure(0.81),
            "answer_state": figure(0.83),
            "gap": figure(0.02),
        },
    }


def slots(rng: np.random.Generator) -> dict[str, Any]:
    alone = [figure(0.1 * rng.random()) for _ in range(K)]
    return {"utility": figure(1.2), "utility_alone": alone, "helpful_slots": 5}


def benchmark() -> dict[str, Any]:
    chance = {"n": 30, "scores": {"pair_accuracy": 0.25, "accuracy": 0.5}}
    scores = {
        "latents": {"pair_accuracy": 0.4, "accuracy": 0.61, "category": {"colour": 0.5}},
        "ceiling": {"pair_accuracy": 0.7, "accuracy": None},
    }
    return {
        condition: {"n": 30, "headline": "pair_accuracy", "scores": s, "chance": chance, "unparsed": []}
        for condition, s in scores.items()
    }


def failure(record: Record) -> dict[str, Any]:
    question = record.questions[0]
    return {
        "record": record.record_id,
        "images": [str(image) for image in record.images],
        "question": question.text,
        "kind": question.kind,
        "gold": question.answer,
        "answers": {"A": "<b>blue</b>", "B": question.answer, "C": ""},
        "wrong": ["A", "C"],
    }


def metrics(rng: np.random.Generator) -> list[dict[str, float]]:
    entries = []
    for step in range(600):
        nll = {f"nll/{name}": 0.05 + 1.2 * np.exp(-step / 120) + 0.05 * rng.random() for name in "AB"}
        mean = float(np.mean(list(nll.values())))
        terms = {"nll": mean, "concept": 0.8 * mean, "norm": 3e-4 * (1 + rng.random()), "loss": 1.24 * mean}
        checks = {"validation_loss": mean + 0.03} if step % 200 == 199 else {}
        entries.append({"step": step, **nll, **terms, **checks, "grad_norm": 1.0, "images_per_s": 30.0})
    return entries
