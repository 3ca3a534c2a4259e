"""Joint decoding against a plain implementation: whole forward passes, sums in plain Python."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from anchor_service.serving.continuations import Continuations
from anchor_service.serving.engine import EndEvent, Engine, Event, Job
from anchor_service.serving.joint import Joint, Vocabulary, load_vocabulary, mix, vote
from anchor_service.serving.sampling import Sampling
from shared.messages import Question
from shared.packing import Media, unpack
from shared.reading import pack_questions, score_answers
from shared.vlm import VisionLanguageModel, load_vlm
from tests.tiny_models import WIDTH

K = 4
MEDIA = Media(K)
QUESTION = "what color is the square?"


def job(**sampling: Any) -> Job:
    latents_KD = np.random.default_rng(3).standard_normal((K, WIDTH)).astype(np.float32)
    return Job("x", latents_KD, QUESTION, Sampling(**{"max_tokens": 8, **sampling}))


class Anchor:
    """An anchor in this process."""

    def __init__(self, model: VisionLanguageModel):
        self.model = model
        self.continuations = Continuations(model, MEDIA, 8)

    async def generate(self, job: Job, replayable: bool) -> AsyncIterator[list[Event]]:
        engine = Engine(self.model, MEDIA, 8)
        engine.add(job)
        while not engine.is_idle:
            yield [event for _, event in engine.step()]

    async def next_logprobs(self, image: str, latents: Any, question: str, answers: Any) -> np.ndarray:
        return self.continuations.next_logprobs(image, latents, question, answers)

    async def score(self, latents_KD: np.ndarray, questions: Sequence[Question]) -> list[list[float]]:
        rows = pack_questions(self.model, [[MEDIA]], [questions])
        with torch.no_grad():
            scores = score_answers(self.model, rows, torch.from_numpy(latents_KD))
        return unpack(scores.logprobs_N.tolist(), scores.counts)[0]


def plain_logprobs(model: VisionLanguageModel, one: Job, answer: Sequence[int]) -> list[float]:
    """Of every next token, from a forward pass of its own."""
    from shared.packing import Branch, pack_rows

    opening, _ = model.prompt.opening(one.question)
    branch = Branch((*opening, *answer, 0), len(opening) + len(answer))
    rows = pack_rows(model.prompt.prefix_ids, [[MEDIA]], [[branch]])
    with torch.no_grad():
        hidden_1TD = model.decode(rows, torch.from_numpy(one.latents_KD))
        return torch.nn.functional.linear(hidden_1TD[0, -1], *model.head()).log_softmax(-1).tolist()


def plain_joint(models: Sequence[VisionLanguageModel], weights: Sequence[float], mean: str, one: Job) -> list[int]:
    """Greedy tokens of the mixture."""
    _, end_id = models[0].prompt.opening(one.question)
    answer: list[int] = []
    while len(answer) < one.sampling.max_tokens:
        logprobs = [plain_logprobs(model, one, answer) for model in models]
        shares = [weight / sum(weights) for weight in weights]
        scores = []
        for v in range(len(logprobs[0])):
            if mean == "arithmetic":
                scores.append(sum(share * math.exp(lp[v]) for share, lp in zip(shares, logprobs, strict=True)))
            else:
                scores.append(math.prod(math.exp(lp[v]) ** share for share, lp in zip(shares, logprobs, strict=True)))
        token = max(range(len(scores)), key=scores.__getitem__)
        if token == end_id:
            break
        answer.append(token)
    return answer


@pytest.fixture(scope="module")
def siblings(tiny_folder: Any) -> list[VisionLanguageModel]:
    """Two models with one tokenizer."""
    return [load_vlm(tiny_folder("qwen2_5_vl", seed=seed)).freeze() for seed in (0, 1)]


def joint_of(models: Sequence[VisionLanguageModel], weights: Sequence[float], mean: Any = "arithmetic") -> Joint:
    names = [f"m{i}" for i in range(len(models))]
    vocabularies = {name: load_vocabulary(model.path) for name, model in zip(names, models, strict=True)}
    anchors = {name: Anchor(model) for name, model in zip(names, models, strict=True)}
    return Joint(anchors, vocabularies, dict(zip(names, weights, strict=True)), mean)


def events_of(joint: Joint, one: Job) -> list[Event]:
    async def collect() -> list[Event]:
        return [event async for events in joint.generate(one, True) for event in events]

    return asyncio.run(collect())


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_mixtures_are_sums_in_plain_python(mean: Any) -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(5), size=(3, 2))
    weights = [1.0, 2.0, 0.5]
    mixed = np.exp(mix(list(np.log(probabilities)), weights, mean))
    for n in range(2):
        plain = [
            sum(w / 3.5 * probabilities[r, n, v] for r, w in enumerate(weights))
            if mean == "arithmetic"
            else math.prod(probabilities[r, n, v] ** (w / 3.5) for r, w in enumerate(weights))
            for v in range(5)
        ]
        assert mixed[n] == pytest.approx([p / sum(plain) for p in plain], rel=1e-12)


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_anchors_of_one_tokenizer_answer_as_the_plain_mixture(siblings: Any, mean: Any) -> None:
    joint = joint_of(siblings, [1.0, 2.0], mean)
    assert joint.groups == [["m0", "m1"]]
    one = job(top_logprobs=2)
    events = events_of(joint, one)
    expected = plain_joint(siblings, [1.0, 2.0], mean, one)
    decode = siblings[0].processor.tokenizer.decode
    assert [event.token for event in events[:-1]] == [decode([token]) for token in expected]
    assert "".join(event.text for event in events) == decode(expected, skip_special_tokens=True).strip()
    first = [plain_logprobs(model, one, []) for model in siblings]
    token_logprob = mix([np.array([lp]) for lp in first], [1.0, 2.0], mean)[0, expected[0]]
    assert events[0].logprob == pytest.approx(token_logprob, abs=1e-5)
    assert events[0].top[0] == (events[0].token, events[0].logprob)


def test_a_single_weight_is_that_anchor_alone(siblings: Any) -> None:
    heavy = events_of(joint_of(siblings, [1e9, 1e-9]), job())
    (alone,) = [event for event in events_of(joint_of(siblings[:1], [1.0]), job()) if isinstance(event, EndEvent)]
    assert "".join(event.text for event in heavy) == "".join(
        event.text for event in events_of(joint_of(siblings[:1], [1.0]), job())
    )
    assert heavy[-1].completion_tokens == alone.completion_tokens


def test_samples_of_a_mixture_depend_on_their_seed_alone(siblings: Any) -> None:
    def texts(**sampling: Any) -> list[str]:
        events = events_of(joint_of(siblings, [1.0, 1.0]), job(temperature=1.5, **sampling))
        return ["".join(e.text for e in events if e.sample == i) for i in range(sampling.get("n", 1))]

    assert texts(n=3, seed=4)[:1] == texts(n=1, seed=4)
    assert len(set(texts(n=3, seed=4))) > 1


def test_anchors_of_different_tokenizers_vote(tiny_model: Any) -> None:
    models = [tiny_model("qwen2_5_vl"), tiny_model("llava")]
    joint = joint_of(models, [1.0, 3.0])
    assert len(joint.groups) == 2
    one = job()
    (end,) = events_of(joint, one)
    assert isinstance(end, EndEvent)
    anchors = [Anchor(model) for model in models]

    async def candidate(anchor: Anchor) -> str:
        return "".join([event.text async for events in anchor.generate(one, True) for event in events])

    candidates = [asyncio.run(candidate(anchor)) for anchor in anchors]
    assert len(set(candidates)) == 2
    totals = []
    for text in candidates:
        total = 0.0
        for anchor, weight in zip(anchors, [1.0, 3.0], strict=True):
            (tokens,) = asyncio.run(anchor.score(one.latents_KD, [Question(QUESTION, text)]))
            total += weight * sum(tokens) / len(tokens)
        totals.append(total)
    assert end.text == candidates[totals.index(max(totals))]


def test_votes_are_weighted_means_per_token() -> None:
    scores = {"a": [[-1.0, -1.0], [-3.0]], "b": [[-4.0], [-1.0, -1.0, -1.0]]}
    assert vote(scores, {"a": 1.0, "b": 1.0}) == 1
    assert vote(scores, {"a": 2.0, "b": 1.0}) == 0


def test_continuations_compute_one_column_a_token_and_survive_forgetting(siblings: Any) -> None:
    model, one = siblings[0], job()
    roomy, narrow = Continuations(model, MEDIA, 8), Continuations(model, MEDIA, 1)
    answers: list[tuple[int, ...]] = [(), (5,), (5, 9), (5, 9, 7)]
    for answer in answers:
        got = roomy.next_logprobs(one.image, one.latents_KD, QUESTION, [answer])[0]
        assert got == pytest.approx(np.array(plain_logprobs(model, one, answer)), abs=1e-4)
        assert narrow.next_logprobs("other", one.latents_KD, "why?", [()]).shape == (1, model.vocabulary)
        assert narrow.next_logprobs(one.image, one.latents_KD, QUESTION, [answer])[0] == pytest.approx(got, abs=1e-4)
    assert roomy.columns == len(model.prompt.opening(QUESTION)[0]) + 3


def test_vocabularies_agree_within_a_tokenizer_alone(siblings: Any, tiny_folder: Any) -> None:
    def fingerprint(vocabulary: Vocabulary) -> str:
        return vocabulary.fingerprint

    assert fingerprint(load_vocabulary(siblings[0].path)) == fingerprint(load_vocabulary(siblings[1].path))
    assert fingerprint(load_vocabulary(siblings[0].path)) != fingerprint(load_vocabulary(tiny_folder("llava")))
