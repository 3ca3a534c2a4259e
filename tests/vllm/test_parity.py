"""vLLM and this project's engine say the same: greedy answers and top-5 log-probabilities of 50 toy questions.

`make test-vllm` sets up vLLM's environment and runs this; `make test` does not.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from anchor_service.export import export_anchor
from anchor_service.serving.engine import Engine, Job
from anchor_service.serving.sampling import Sampling
from shared.config import Config
from shared.packing import Media
from shared.vlm import VisionLanguageModel, load_vlm
from tests.integration.helpers import REPOSITORY
from trainer.toy.questions import all_questions
from trainer.toy.world import render, sample_scene

PYTHON = Path(os.environ.get("VLLM_PYTHON", REPOSITORY / ".venv-vllm/bin/python"))
N_IMAGES, PER_IMAGE = 10, 5
GREEDY = Sampling(max_tokens=8, top_logprobs=5)
LARGEST_DIFFERENCE = 1e-4
LIMIT_S = 600
SAMPLES = 8


@dataclasses.dataclass(frozen=True)
class Told:
    """What both engines said about the same jobs, events as dictionaries; vLLM's word on a cancelled job."""

    jobs: list[Job]
    ours: list[list[dict[str, Any]]]
    theirs: list[list[dict[str, Any]]]
    cancelled: bool


def jobs_of(model: VisionLanguageModel) -> list[Job]:
    """Questions about toy images' own tokens in the place of latents: answers that mean something."""
    rng = np.random.default_rng(3)
    jobs = []
    for i in range(N_IMAGES):
        scene = sample_scene(rng)
        with torch.no_grad():
            (tokens_KD,) = model.image_tokens([render(scene, rng)]).tokens
        questions = all_questions(scene)
        jobs += [
            Job(f"image {i}", tokens_KD.numpy(), questions[int(j)].text, GREEDY)
            for j in rng.permutation(len(questions))[:PER_IMAGE]
        ]
    # About noise, no answer is sure.
    noise_KD = rng.standard_normal(jobs[0].latents_KD.shape).astype(np.float32)
    first = dataclasses.replace(jobs[0], image="noise", latents_KD=noise_KD)
    drawn = dataclasses.replace(GREEDY, temperature=2.0, n=SAMPLES, seed=5)
    stopped = dataclasses.replace(GREEDY, max_tokens=64, temperature=2.0, stop=("e",))
    return [*jobs, *(dataclasses.replace(first, sampling=sampling) for sampling in (drawn, drawn, stopped))]


def our_events(model: VisionLanguageModel, jobs: list[Job]) -> list[list[dict[str, Any]]]:
    """The same jobs, all at once, on the engine of this project."""
    engine = Engine(model, Media(len(jobs[0].latents_KD), None), n_rows=16)
    numbers = [engine.add(job) for job in jobs]
    events: dict[int, list[dict[str, Any]]] = {number: [] for number in numbers}
    while not engine.is_idle:
        for number, event in engine.step():
            events[number].append(dataclasses.asdict(event))
    return [events[number] for number in numbers]


@pytest.fixture(scope="module", params=["A", "D"])
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """A: a Qwen2.5-VL, its language model's heads padded. D: a LLaVA, whose language model is a Llama."""
    folder = tmp_path_factory.mktemp("vllm")
    path = f"trainer/toy/models/{request.param}"
    model = load_vlm(path).freeze()
    config = Config.model_validate(
        {
            "run": {"dir": folder / "run"},
            "generator": {"model": path, "latents": 4},
            "anchors": [{"name": "it", "model": path}],
            "data": {"path": folder},
        }
    )
    export_anchor(config, "it", folder / "exported")
    jobs = jobs_of(model)
    save_file({job.image: job.latents_KD for job in jobs}, folder / "latents.safetensors")
    plain = [(job.image, job.question, dataclasses.asdict(job.sampling)) for job in jobs]
    (folder / "jobs.json").write_text(json.dumps(plain))
    done = subprocess.run(
        [str(PYTHON), "-m", "tests.vllm.answer", path, str(folder / "exported"), str(folder)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    events = json.loads((folder / "events.json").read_text())
    return Told(jobs, our_events(model, jobs), events["answers"], events["cancelled"])


def tokens_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The token events of an answer, without the event that ends it."""
    return [event for event in events if "logprob" in event]


def test_greedy_answers_are_the_same(told: Told) -> None:
    n = N_IMAGES * PER_IMAGE
    texts = [["".join(event["text"] for event in events) for events in side[:n]] for side in (told.ours, told.theirs)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 5, "the questions hardly differ in their answers"
    for ours, theirs in zip(told.ours[:n], told.theirs[:n], strict=True):
        assert ours[-1] == theirs[-1], "reason, counts of tokens"


def test_log_probabilities_are_the_same(told: Told) -> None:
    differences = []
    n = N_IMAGES * PER_IMAGE
    for ours, theirs in zip(told.ours[:n], told.theirs[:n], strict=True):
        for one, two in zip(tokens_of(ours), tokens_of(theirs), strict=True):
            assert one["token"] == two["token"]
            ours_top, theirs_top = dict(one["top"]), dict(two["top"])
            assert len(ours_top) == len(theirs_top) == GREEDY.top_logprobs
            # Two tokens of nearly the same probability may stand in either order, and the last two may differ.
            shared_tokens = ours_top.keys() & theirs_top.keys()
            assert len(shared_tokens) >= GREEDY.top_logprobs - 1
            differences += [abs(ours_top[token] - theirs_top[token]) for token in shared_tokens]
            differences.append(abs(one["logprob"] - two["logprob"]))
            differences.append(float(np.abs(np.subtract(sorted(ours_top.values()), sorted(theirs_top.values()))).max()))
    print(f"largest difference of a log-probability: {max(differences):.2e}")
    assert max(differences) <= LARGEST_DIFFERENCE


def test_sampling_repeats_itself_and_stops(told: Told) -> None:
    once, again, stopped = told.theirs[-3:]

    def texts(events: list[dict[str, Any]]) -> list[str]:
        return ["".join(event["text"] for event in events if event["sample"] == sample) for sample in range(SAMPLES)]

    assert texts(once) == texts(again)
    assert len(set(texts(once))) > 1
    assert "e" not in texts(stopped)[0]
    assert stopped[-1]["reason"] == "stop"


def test_a_cancelled_answer_is_computed_no_further(told: Told) -> None:
    assert told.cancelled
