"""Continuous decoding against the plain way: every token from a whole forward pass over its own row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from anchor_service.serving.engine import EndEvent, Engine, Job, TokenEvent, read_latents
from anchor_service.serving.sampling import AnswerText, Sampling, choose
from shared.packing import Branch, Media, pack_rows
from shared.vlm import VisionLanguageModel
from tests.tiny_models import FAMILY_NAMES, WIDTH
from trainer.gap.generation import generate, greedy

K = 4
LIMIT = 12


def job(number: int, question: str = "what color is the square?", **sampling: Any) -> Job:
    latents_KD = np.random.default_rng(number).standard_normal((K, WIDTH)).astype(np.float32)
    return Job(str(number), latents_KD, question, Sampling(**{"max_tokens": LIMIT, **sampling}))


def media_of(model: VisionLanguageModel) -> Media:
    return Media(K, (2, 2) if model.family.uses_mrope else None)


@torch.no_grad()
def plain_tokens(model: VisionLanguageModel, one: Job) -> list[int]:
    """Greedy, without a cache: the whole row again for each token. The end of turn is left out."""
    opening, end_id = model.prompt.opening(one.question)
    tokens: list[int] = []
    media_KD = torch.from_numpy(one.latents_KD)
    while len(tokens) < one.sampling.max_tokens:
        branch = Branch((*opening, *tokens, 0), len(opening) + len(tokens))
        rows = pack_rows(model.prompt.prefix_ids, [[media_of(model)]], [[branch]])
        hidden_1TD = model.decode(rows, media_KD)
        token = int(F.linear(hidden_1TD[0, -1], *model.head()).argmax())
        if token == end_id:
            break
        tokens.append(token)
    return tokens


def run(engine: Engine, jobs: list[Job], join_at: list[int]) -> list[list[Any]]:
    """Events of each job; job i joins before step join_at[i]."""
    events: list[list[Any]] = [[] for _ in jobs]
    numbers: dict[int, int] = {}
    for step in range(1000):
        for i, one in enumerate(jobs):
            if join_at[i] == step:
                numbers[engine.add(one)] = i
        for job_id, event in engine.step():
            events[numbers[job_id]].append(event)
        if engine.is_idle and step >= max(join_at):
            return events
    raise AssertionError("the engine does not end")


def text_of(events: list[Any], sample: int = 0) -> str:
    return "".join(event.text for event in events if event.sample == sample)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_greedy_answers_are_those_of_the_plain_way_for_jobs_that_join_midway(tiny_model: Any, family: str) -> None:
    model = tiny_model(family)
    questions = ["what color is the square?", "how many things are there?", "is there a green triangle?"]
    jobs = [job(i % 2, questions[i % 3], max_tokens=LIMIT - 2 * (i % 3)) for i in range(6)]
    events = run(Engine(model, media_of(model), 4), jobs, [0, 0, 1, 3, 4, 5])
    for one, got in zip(jobs, events, strict=True):
        expected = plain_tokens(model, one)
        decode = model.processor.tokenizer.decode
        assert [event.token for event in got[:-1]] == [decode([token]) for token in expected]
        assert text_of(got) == decode(expected, skip_special_tokens=True).strip()
        assert got[-1].completion_tokens == len(expected)
        assert got[-1].reason == ("length" if len(expected) == one.sampling.max_tokens else "stop")


def test_greedy_answers_are_those_of_the_trainers_own_generation(tiny_model: Any) -> None:
    model = tiny_model("qwen3_vl")
    jobs = [job(i) for i in range(3)]
    events = run(Engine(model, media_of(model), 8), jobs, [0, 1, 2])
    rows = read_latents(model, [one.latents_KD for one in jobs], media_of(model))
    opening, end_id = model.prompt.opening(jobs[0].question)
    rows.append_tokens([opening] * 3)
    for got, written in zip(events, generate(rows, [end_id], LIMIT, greedy), strict=True):
        decode = model.processor.tokenizer.decode
        assert [event.token for event in got[:-1]] == [decode([token]) for token in written.pieces]


def test_logprobs_are_those_of_the_model_and_sum_to_one(tiny_model: Any) -> None:
    model = tiny_model("qwen2_5_vl")
    one = job(0, top_logprobs=3, max_tokens=3)
    first = next(event for event in run(Engine(model, media_of(model), 1), [one], [0])[0])
    rows = read_latents(model, [one.latents_KD], media_of(model))
    with torch.no_grad():
        rows.append_tokens([model.prompt.opening(one.question)[0]])
        logprobs_V = F.linear(rows.hidden_BD, *model.head())[0].log_softmax(-1)
    values, _ = logprobs_V.topk(3)
    assert [value for _, value in first.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert first.logprob == pytest.approx(float(values[0]), abs=1e-5)


def test_what_is_sampled_depends_on_the_seed_and_not_on_the_batch(tiny_model: Any) -> None:
    model = tiny_model("llava")
    one = job(1, temperature=1.5, seed=7, n=3)
    alone = run(Engine(model, media_of(model), 8), [one], [0])[0]
    others = [job(i, temperature=1.0, seed=i) for i in range(2, 5)]
    beside = run(Engine(model, media_of(model), 8), [others[0], one, *others[1:]], [0, 2, 3, 3])[1]
    for sample in range(3):
        assert text_of(beside, sample) == text_of(alone, sample)
    assert len({text_of(alone, sample) for sample in range(3)}) > 1
    again = run(Engine(model, media_of(model), 8), [job(1, temperature=1.5, seed=8, n=3)], [0])[0]
    assert [text_of(again, sample) for sample in range(3)] != [text_of(alone, sample) for sample in range(3)]


def test_a_cancelled_job_is_computed_no_further_and_leaves_its_place(tiny_model: Any) -> None:
    model = tiny_model("qwen2_5_vl")
    engine = Engine(model, media_of(model), 1)
    endless = engine.add(job(0, temperature=50.0, max_tokens=10_000))
    waiting = engine.add(job(1))
    for _ in range(3):
        engine.step()
    tokens = engine.counters.tokens
    assert engine.load == (1, 1)
    engine.cancel(endless)
    assert engine.load == (0, 1)
    events = engine.step()
    assert {job_id for job_id, _ in events} == {waiting}
    engine.cancel(waiting)
    assert engine.is_idle
    assert engine.step() == []
    assert engine.counters.tokens == tokens + 1
    assert engine.counters.cancelled == 2


def test_questions_about_one_image_share_its_pass(tiny_model: Any) -> None:
    model = tiny_model("qwen2_5_vl")
    engine = Engine(model, media_of(model), 8)
    run(engine, [job(0, question) for question in ("what?", "where?", "what?")], [0, 0, 0])
    assert (engine.counters.images, engine.counters.questions) == (1, 2)


def test_jobs_wait_for_room(tiny_model: Any) -> None:
    model = tiny_model("qwen2_5_vl")
    engine = Engine(model, media_of(model), 2)
    for i in range(3):
        engine.add(job(i, max_tokens=2, temperature=50.0))
    engine.step()
    assert engine.load[0] <= 2


def plain_choice(logits: list[float], temperature: float, top_p: float, draw: float) -> int:
    if temperature == 0:
        return max(range(len(logits)), key=lambda v: logits[v])
    weights = np.exp(np.array(logits) / temperature)
    probabilities = weights / weights.sum()
    order = sorted(range(len(logits)), key=lambda v: -probabilities[v])
    nucleus: list[int] = []
    for v in order:
        nucleus.append(v)
        if probabilities[nucleus].sum() >= top_p:
            break
    total, passed = probabilities[nucleus].sum(), 0.0
    for v in nucleus:
        passed += probabilities[v]
        if draw * total < passed:
            return v
    return nucleus[-1]


def test_choices_are_those_of_a_loop_in_plain_python() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((200, 11)) * 3
    settings = [(float(rng.choice([0, 0.3, 1, 2])), float(rng.uniform(0.05, 1)), float(rng.random())) for _ in logits]
    temperature, top_p, draw = torch.tensor(settings, dtype=torch.float64).T
    chosen = choose(torch.from_numpy(logits), temperature, top_p, draw).tolist()
    assert chosen == [plain_choice(row.tolist(), *one) for row, one in zip(logits, settings, strict=True)]


class Letters:
    """A tokenizer of single characters."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("written", "stop", "text"),
    [
        (" a cat. ", (), "a cat."),
        ("one\ntwo\nthree", ("\nthr", "zzz"), "one\ntwo"),
        ("ababac", ("abac",), "ab"),
        ("no stop here, but sto", ("stop!",), "no stop here, but sto"),
        ("stop", ("stop",), ""),
    ],
)
def test_text_is_the_answer_up_to_the_first_stop(written: str, stop: tuple[str, ...], text: str) -> None:
    answer, parts = AnswerText(Letters(), stop), []
    for character in written:
        parts.append(answer.add(ord(character)))
        assert text.startswith("".join(parts))
        if answer.stopped:
            break
    else:
        parts.append(answer.end())
    assert "".join(parts) == text


def test_a_stop_ends_the_job(tiny_model: Any) -> None:
    model = tiny_model("qwen2_5_vl")
    (whole,) = run(Engine(model, media_of(model), 1), [job(0, temperature=1.0, seed=5)], [0])
    tokens = [event for event in whole if isinstance(event, TokenEvent)]
    stop = tokens[4].token.strip() or tokens[5].token.strip()
    (cut,) = run(Engine(model, media_of(model), 1), [job(0, temperature=1.0, seed=5, stop=(stop,))], [0])
    assert isinstance(cut[-1], EndEvent)
    assert cut[-1].reason == "stop"
    assert text_of(cut) == text_of(whole)[: text_of(whole).index(stop)].rstrip()
