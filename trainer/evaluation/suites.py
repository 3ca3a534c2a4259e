"""The suites of `evaluate`: each turns one session into one section of evaluation.json.

    reading    ceiling, latents, swapped, floor, by anchor and kind of question
    causal     the content of the latents is swapped, everything else stays; a verdict by stated rules
    controls   the image is replaced or disturbed before the generator sees it
    geometry   how the latents lie, what each slot is worth, what a linear probe reads from them
    transfer   readers of another family and width, through a closed-form projector
    benchmarks public benchmarks from local files, with their official metrics
    usage      models that answer by themselves: without latents, behind the bottleneck, with other images' latents

Figures of causal and controls are over the kinds of question that were trained on, as in the headline of reading.

Legend: B images, K latents, D width, N questions of all images together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.config import Config
from shared.errors import DataError
from shared.messages import LatentPositions, Question
from shared.packing import latent_media
from shared.reading import pack_questions
from shared.vlm.generator import Generator
from trainer.data import ErrorPolicy, readable_records, training_records
from trainer.evaluation import geometry
from trainer.evaluation.benchmarks.reading import read_benchmark
from trainer.evaluation.perturbations import mismatched, perturbations
from trainer.evaluation.pgd import adversarial_latents
from trainer.evaluation.probe import linear_probes
from trainer.evaluation.reading import (
    Outcome,
    Outcomes,
    batched,
    latents_of_images,
    of_anchor,
    summarise,
)
from trainer.evaluation.session import Session
from trainer.evaluation.statistics import Figure, ImageBootstrap, recovered_share
from trainer.evaluation.transfer import FIT_IMAGES, read_through_projectors
from trainer.evaluation.usage import SelfReading
from trainer.evaluation.verdict import VERDICT_TESTS, lost_share, paired_differences, verdict
from trainer.evaluation.writing import ResponseReading, response_reading
from trainer.methods import METHODS, self_reader
from trainer.methods.gap import GapMethod

_GALLERY = 24


def reading_suite(s: Session) -> dict[str, Any]:
    """By anchor: figures under every condition."""
    unseen = {anchor.name for anchor in s.config.evaluation.unseen}
    conditions = s.conditions | {"swapped": s.swapped}
    return {
        name: {"seen_in_training": name not in unseen, **summarise(of_anchor(conditions, name), s.reader, s.config)}
        for name in s.pool.names
    }


def failure_gallery(s: Session) -> list[dict[str, Any]]:
    """Some questions, drawn at random, that at least one anchor gets wrong from the latents, with every answer."""
    outcomes = s.conditions["latents"]
    missed_N = np.any([outcome.hits_N < 1 for outcome in outcomes.values()], axis=0)
    shown = np.random.default_rng(s.config.train.seed).permutation(np.flatnonzero(missed_N))[:_GALLERY]
    questions = [(record, question) for record in s.records for question in record.questions]
    return [
        {
            "record": questions[n][0].record_id,
            "images": [str(image) for image in questions[n][0].images],
            "question": questions[n][1].text,
            "kind": questions[n][1].kind,
            "gold": questions[n][1].answer,
            "answers": {name: outcome.answers[n] for name, outcome in outcomes.items()},
            "wrong": [name for name, outcome in outcomes.items() if outcome.hits_N[n] < 1],
        }
        for n in shown.tolist()
    ]


def causal_suite(s: Session) -> dict[str, Any]:
    """By anchor: every test against the latents as they are, and the verdict."""
    swapped = s.read_tests(list(s.causal_tests), "causal")
    section = {}
    for anchor in s.pool.names:
        lost = {test: _lost_share(s, swapped[test], anchor) for test in VERDICT_TESTS}
        section[anchor] = {
            "verdict": str(verdict(lost)),
            "lost_share": {test: figure.to_json() for test, figure in lost.items()},
            "tests": {test: _against_latents(s, outcomes, anchor) for test, outcomes in swapped.items()},
        }
    return section


def controls_suite(s: Session) -> dict[str, Any]:
    """By anchor: what other images in front of the generator do to the answers about the right one."""
    names = ["other_image", *perturbations(s.config.train.seed), "pgd"]
    outcomes = {name: s.reader.latents(_control_latents(s, name)) for name in s.track(names, "controls", len(names))}
    return {
        anchor: {name: _against_latents(s, by_anchor, anchor) for name, by_anchor in outcomes.items()}
        for anchor in s.pool.names
    }


def geometry_suite(s: Session) -> dict[str, Any]:
    """Figures of the latents themselves, and per anchor what each slot is worth to it."""
    latents_BKD = s.latents_BKD.float().cpu()
    per_image = {
        "slot_cosine": geometry.slot_cosine(latents_BKD),
        "between_image_cosine": geometry.between_image_cosine(latents_BKD).mean(dim=1),
        "effective_rank": geometry.effective_rank(latents_BKD),
        "relative_norm": geometry.relative_norm(latents_BKD, s.visual_ND.cpu()).mean(dim=1),
        "visual_cosine": geometry.visual_cosine(latents_BKD, s.pooled_BKD.cpu()).mean(dim=1),
    }
    ones_B = np.ones(len(s.records))
    units_BKD = torch.nn.functional.normalize(latents_BKD, dim=-1)
    return {
        "figures": {name: s.bootstrap.mean(values.numpy(), ones_B).to_json() for name, values in per_image.items()},
        "slot_cosine": (units_BKD @ units_BKD.transpose(1, 2)).mean(dim=0).tolist(),
        "norms": {
            "latents": _quartiles(latents_BKD.norm(dim=-1)),
            "image_tokens": _quartiles(s.visual_ND.float().cpu().norm(dim=-1)),
        },
        "slots": _slot_figures(s),
        "probes": _probe_figures(s),
    }


def transfer_suite(s: Session) -> dict[str, Any]:
    """By reader of another family: the latents through closed-form projectors fitted on training images."""
    data = s.config.data
    # No more than are looked at: reading the questions of a whole training split takes longer than the fit.
    few = data.model_copy(update={"max_images": min(FIT_IMAGES, data.max_images or FIT_IMAGES)})
    training = training_records(few, s.config.train.seed)
    fit_records = readable_records(training, FIT_IMAGES, ErrorPolicy(data.on_error))
    fit_sources = {
        "visual_tokens": torch.cat([pooled for pooled, _ in s.visual_tokens(fit_records)]),
        "latents": s.latents_of(fit_records),
    }
    readers = {reader.name: reader for reader in s.config.evaluation.transfer}
    return {
        name: read_through_projectors(s.config, readers[name], s.records, s.latents_BKD, fit_records, fit_sources)
        for name in s.track(readers, "transfer", len(readers))
    }


def benchmarks_suite(s: Session) -> dict[str, Any]:
    """By public benchmark of the config: official figures by anchor, from latents and from the image."""
    folders, batch_images = s.config.evaluation.benchmarks, s.config.evaluation.batch_images
    return {
        name: read_benchmark(name, folders[name], s.generator, s.pool, batch_images, s.calibration())
        for name in s.track(folders, "benchmarks", len(folders))
    }


def against(s: Session, other: Session) -> dict[str, Any]:
    """Linear CKA of two runs' latents of the same images: in all, and slot by slot where both have as many."""
    ours_BKD, theirs_BKD = s.latents_BKD.float().cpu(), other.latents_BKD.float().cpu()
    section: dict[str, Any] = {"cka": geometry.linear_cka(ours_BKD.flatten(1), theirs_BKD.flatten(1))}
    if ours_BKD.shape[1] == theirs_BKD.shape[1]:
        slots = zip(ours_BKD.unbind(1), theirs_BKD.unbind(1), strict=True)
        section["cka_per_slot"] = [geometry.linear_cka(ours_BD, theirs_BD) for ours_BD, theirs_BD in slots]
    return section


def usage_suite(s: Session) -> dict[str, Any]:
    """By condition of `trainer.evaluation.usage` or `writing`: accuracy, NLL and the change from `normal`, in all and
    by kind.
    """
    writes = issubclass(METHODS[s.config.method], GapMethod)
    reading = response_reading(s.config, s.generator, s.features, s.records) if writes else _self_reading(s)
    outcomes = {name: reading.read(name) for name in s.track(reading.conditions, "usage", len(reading.conditions))}
    images_N = np.repeat(np.arange(len(s.records)), [len(record.questions) for record in s.records])
    kinds_N = np.array([question.kind for record in s.records for question in record.questions])

    def figures(chosen_N: np.ndarray) -> dict[str, Any]:
        normal = outcomes["normal"].select(chosen_N)
        return {
            name: {
                figure: value.to_json()
                for figure, value in _changes(s.bootstrap, images_N[chosen_N], normal, o.select(chosen_N)).items()
            }
            for name, o in outcomes.items()
        }

    held_out_N = np.isin(kinds_N, s.config.data.held_out_kinds)
    section: dict[str, Any] = {"conditions": figures(~held_out_N)}
    section["kinds"] = {str(kind): figures(kinds_N == kind) for kind in np.unique(kinds_N)}
    if isinstance(reading, ResponseReading):
        section["norms"] = reading.norms()
    elif reading.reader.options.latents:
        shares = s.bootstrap.per_image(images_N, reading.attention_to_latents())
        section["attention_to_latents"] = s.bootstrap.mean(*shares).to_json()
    return section


def _self_reading(s: Session) -> SelfReading:
    batch_images, seed = s.config.evaluation.batch_images, s.config.train.seed
    return SelfReading(self_reader(s.config, s.generator), s.features, s.records, batch_images, seed)


SUITES: dict[str, Callable[[Session], dict[str, Any]]] = {
    "reading": reading_suite,
    "causal": causal_suite,
    "controls": controls_suite,
    "geometry": geometry_suite,
    "transfer": transfer_suite,
    "benchmarks": benchmarks_suite,
    "usage": usage_suite,
}


def _control_latents(s: Session, name: str) -> Tensor:
    seed, batch_images = s.config.train.seed, s.config.evaluation.batch_images
    if name == "pgd":
        return adversarial_latents(s.generator, s.pool, s.records, batch_images, calibration=s.calibration())
    if name == "other_image":
        # The first question's answer stands for the image's: another picture for which it would be wrong.
        answers_B = [record.questions[0].answer for record in s.records]
        return s.latents_BKD[torch.from_numpy(mismatched(answers_B, seed))]
    rows = (
        [perturbations([seed, i])[name](image) for image in record.load_images()] for i, record in enumerate(s.records)
    )
    return latents_of_images(s.generator, rows, batch_images, s.calibration())


def _against_latents(s: Session, changed: Outcomes, anchor: str) -> dict[str, Any]:
    """Figures of one test for one anchor, and paired differences from the latents as they are."""
    keep_N = s.trained_N
    images_N = s.reader.images_N[keep_N]
    outcome, plain = changed[anchor].select(keep_N), s.conditions["latents"][anchor].select(keep_N)
    floor, ceiling = (s.conditions[c][anchor].select(keep_N) for c in ("floor", "ceiling"))
    parts = [s.bootstrap.per_image(images_N, o.hits_N) for o in (outcome, floor, ceiling)]
    figures = _changes(s.bootstrap, images_N, plain, outcome)
    figures["recovered_share"] = s.bootstrap.ratio(recovered_share, parts)
    return {name: figure.to_json() for name, figure in figures.items()}


def _changes(bootstrap: ImageBootstrap, images_N: np.ndarray, plain: Outcome, changed: Outcome) -> dict[str, Figure]:
    """Accuracy and NLL, and their paired differences from the plain reading."""
    differences = paired_differences(bootstrap, images_N, plain, changed)
    return {
        "accuracy": bootstrap.mean(*bootstrap.per_image(images_N, changed.hits_N)),
        "nll": bootstrap.mean(*bootstrap.per_image(images_N, changed.nll_N)),
        "delta_accuracy": differences["accuracy"],
        "delta_nll": differences["nll"],
        "flip_share": differences["flips"],
    }


def _lost_share(s: Session, swapped: Outcomes, anchor: str) -> Figure:
    keep_N = s.trained_N
    plain, floor = (s.conditions[c][anchor].select(keep_N) for c in ("latents", "floor"))
    return lost_share(s.bootstrap, s.reader.images_N[keep_N], plain, swapped[anchor].select(keep_N), floor)


def _slot_figures(s: Session) -> dict[str, Any]:
    """By anchor: utility of all slots together, of each alone, and how many help."""
    names = ["zero_all", *(f"keep_one_{k}" for k in range(s.generator.n_latents))]
    outcomes = s.read_tests(names, "slots alone")
    section = {}
    for anchor in s.pool.names:
        nothing_N = outcomes["zero_all"][anchor].nll_N
        alone_KN = np.stack([outcomes[name][anchor].nll_N for name in names[1:]])

        def worth(nll_N: np.ndarray, nothing_N: np.ndarray = nothing_N) -> dict[str, Any]:
            utility_N = geometry.utility(nll_N, nothing_N)
            return s.bootstrap.mean(*s.bootstrap.per_image(s.reader.images_N, utility_N)).to_json()

        section[anchor] = {
            "utility": worth(s.conditions["latents"][anchor].nll_N),
            "utility_alone": [worth(nll_N) for nll_N in alone_KN],
            "helpful_slots": geometry.helpful_slots(alone_KN, nothing_N),
        }
    return section


def _probe_figures(s: Session) -> dict[str, Any] | None:
    """Linear probes for the answer to the split's most frequent question; None where it has too few answers.

    The answer position is that of the generator's own base model, which reads the latents as an anchor does.
    """
    texts = [question.text for record in s.records for question in record.questions]
    asked = max(sorted(set(texts)), key=texts.count)
    rows = [(b, q.answer) for b, r in enumerate(s.records) for q in r.questions if q.text == asked]
    images_N, answers_N = np.array([b for b, _ in rows]), [answer for _, answer in rows]
    latents_NKD = s.latents_BKD[torch.from_numpy(images_N)]
    states = [
        answer_states(s.generator, s.config, latents, [Question(asked, answer) for answer in answers])
        for latents, answers in zip(
            latents_NKD.split(s.config.evaluation.batch_images),
            batched(answers_N, s.config.evaluation.batch_images),
            strict=True,
        )
    ]
    try:
        figures = linear_probes(
            s.bootstrap,
            latents_NKD.float().flatten(1).cpu().numpy(),
            torch.cat(states).float().cpu().numpy(),
            answers_N,
            images_N,
            s.config.train.seed,
        )
    except DataError:
        return None
    return {"question": asked, **{name: figure.to_json() for name, figure in figures.items()}}


@torch.no_grad()
def answer_states(generator: Generator, config: Config, latents_BKD: Tensor, questions: Sequence[Question]) -> Tensor:
    """(B, D) hidden state that predicts the first answer token, in the generator's base model."""
    model = generator.model
    on_grid = config.pool.latent_positions is LatentPositions.GRID and model.family.uses_mrope
    media = latent_media(generator.n_latents, on_grid)
    with generator.adapter_off():
        rows = pack_questions(model, [[media]] * len(questions), [[question] for question in questions])
        hidden_BTD = model.decode(rows, latents_BKD.flatten(0, 1))
    first = np.cumsum([0, *(counts[0] for counts in rows.counts[:-1])])
    return hidden_BTD[rows.predict_N2[first, 0], rows.predict_N2[first, 1]]


def _quartiles(values: Tensor) -> list[float]:
    """Minimum, quartiles and maximum."""
    return [float(v) for v in np.percentile(values.numpy(), [0, 25, 50, 75, 100])]
