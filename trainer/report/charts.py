"""Charts of one run: which numbers are drawn, and what caption and alt text say of them.

Legend: K latents (slots), L layers, N points, D width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Chart

from trainer.report.drawing import Theme, Triple, bars, boxes, curves, draw, matrix, scatter
from trainer.report.page import Picture
from trainer.report.results import Figure, Figures, RunResults

Curve = dict[float, Triple]
Deltas = dict[str, dict[str, Triple]]
_PER_SLOT = re.compile(r"(zero_slot|keep_one|truncate)_(\d+)")
_NO_LOSS = re.compile(
    r"step|stage|spans|grad_norm|lr_.*|.*_ms|.*_per_(s|image)|feature_cache_.*|anchors|microbatches|validation.*"
)
_MOST_POINTS = 200


def causal_bars(run: RunResults, span: tuple[float, float]) -> list[Picture]:
    """Δ accuracy of every test that is not about one slot or a number of slots."""
    caption = (
        "What each swap of the latents costs in accuracy, with 95 % intervals. Far left of 0: the content matters."
    )
    return _delta_bars("causal", caption, causal_deltas(run), span)


def control_bars(run: RunResults, span: tuple[float, float]) -> list[Picture]:
    """Δ accuracy of every image control and perturbation."""
    caption = "What each change of the image costs in accuracy, with 95 % intervals."
    return _delta_bars("controls", caption, control_deltas(run), span)


def usage_bars(run: RunResults, span: tuple[float, float]) -> list[Picture]:
    """Δ accuracy of every condition of the usage test."""
    caption = (
        "What removing or swapping the latents, or keeping the bottleneck, costs in accuracy, with 95 % intervals. Far "
        "left of 0: the model makes use of what was taken away."
    )
    return _delta_bars("usage", caption, usage_deltas(run), span)


def delta_span(all_deltas: Iterable[Deltas]) -> tuple[float, float]:
    """One scale for the bars of all runs."""
    series = [tests for deltas in all_deltas for tests in deltas.values()]
    ends = [end for tests in series for triple in tests.values() for end in triple]
    return min([*ends, -0.1]) - 0.03, max([*ends, 0.02]) + 0.03


def causal_deltas(run: RunResults) -> Deltas:
    """Δ accuracy by anchor and test; tests of single slots and of truncation have charts of their own."""
    return {n: deltas for n, causal in run.evaluation.causal.items() if (deltas := _deltas(causal.tests))}


def control_deltas(run: RunResults) -> Deltas:
    """Δ accuracy by anchor and control."""
    return {n: deltas for n, tests in run.evaluation.controls.items() if (deltas := _deltas(tests))}


def usage_deltas(run: RunResults) -> Deltas:
    """Δ accuracy by condition."""
    usage = run.evaluation.usage
    return {} if usage is None else {"the model itself": _deltas(usage.conditions)}


def _deltas(tests: Mapping[str, Figures]) -> dict[str, Triple]:
    return {
        name.replace("_", " "): triple
        for name, figures in tests.items()
        if not _PER_SLOT.fullmatch(name) and (triple := _triple(figures.get("delta_accuracy")))
    }


def _delta_bars(
    name: str, caption: str, series: Mapping[str, Mapping[str, Triple]], span: tuple[float, float]
) -> list[Picture]:
    if not series:
        return []
    numbers = "; ".join(
        f"{anchor}: " + ", ".join(f"{test} {triple[0]:+.3f}" for test, triple in deltas.items())
        for anchor, deltas in series.items()
    )
    alt = f"Bar chart of the change in accuracy per test and anchor. {numbers}."
    return [_picture(name, caption, alt, lambda theme: bars(theme, series, "Δ accuracy", span))]


def slot_curves(run: RunResults) -> list[Picture]:
    """Δ accuracy per slot: that slot set to zero, and that slot alone."""
    told = {
        "zero_slot": "Δ accuracy when one slot is set to zero. Near 0 for every slot: the others make up for it.",
        "keep_one": "Δ accuracy when one slot is left and the others are zero.",
    }
    pictures = []
    for test, caption in told.items():
        series = {name: _per_slot(run, name, test, "delta_accuracy") for name in run.evaluation.causal}
        series = {name: curve for name, curve in series.items() if curve}
        if series:
            pictures.append(_curve_picture(test.replace("_", "-"), caption, series, "slot", "Δ accuracy"))
    return pictures


def truncation_curve(run: RunResults) -> list[Picture]:
    """Accuracy from the first k latents: the floor at k = 0, all of them at k = K."""
    series = {}
    for name in run.evaluation.causal:
        curve, reading = _per_slot(run, name, "truncate", "accuracy"), run.evaluation.anchors.get(name)
        if curve and reading is not None:
            ends = {0: reading.floor, run.config.generator.latents: reading.latents}
            series[name] = curve | _curve(ends)
    if not series:
        return []
    caption = "Accuracy when an anchor reads only the first k latents; k = 0 is the floor, the question alone."
    return [_curve_picture("truncation", caption, series, "k, latents kept", "accuracy", y_span=(0, 1.02))]


def utility_curves(run: RunResults) -> list[Picture]:
    """What each slot is worth alone, in nats."""
    geometry = run.evaluation.geometry
    slots = geometry.slots if geometry is not None else {}
    curves_of = {name: _curve(dict(enumerate(worth.utility_alone))) for name, worth in slots.items()}
    series = {name: curve for name, curve in curves_of.items() if curve}
    caption = "Utility of each slot alone: NLL(all zero) − NLL(only this slot). A slot helps from 0.05 nats on."
    return [_curve_picture("utility", caption, series, "slot", "nats")] if series else []


def training_curves(run: RunResults) -> list[Picture]:
    """Loss terms, then NLL per anchor; the validation loss beside the anchors', or among the terms without any."""
    if not run.metrics:
        return []
    names = dict.fromkeys(name for entry in run.metrics for name in entry)
    curve_of = {name: curve for name in names if (curve := _binned(run.metrics, name))}
    terms = {name: c for name, c in curve_of.items() if "/" not in name and not _NO_LOSS.fullmatch(name)}
    checks = {name.replace("_", " "): c for name, c in curve_of.items() if name.startswith("validation")}
    readings = {name.removeprefix("nll/"): c for name, c in curve_of.items() if name.startswith("nll/")}
    (readings or terms).update(checks)
    width = _bin_width(run.metrics)
    means = f" Each point is the mean of {width} steps." if width > 1 else ""
    best = (run.evaluation.step, "evaluated checkpoint")
    positive = all(value > 0 for curve in terms.values() for value, _, _ in curve.values())
    pictures = []
    if terms:
        caption = f"Terms of the training loss, before their weights; loss is the weighted sum.{means}"
        pictures.append(
            _curve_picture("loss", caption, terms, "step", "loss", log=positive, mark_x=best, marks_only=checks)
        )
    if readings:
        caption = f"NLL of each anchor's answers on the training batches, and on validation images.{means}"
        pictures.append(
            _curve_picture("nll", caption, readings, "step", "nats per token", mark_x=best, marks_only=checks)
        )
    for prefix, says in (
        ("weight", "Probability with which the curriculum lets a question through"),
        ("share", "Share of the questions asked"),
    ):
        found = {name.removeprefix(f"{prefix}/"): c for name, c in curve_of.items() if name.startswith(f"{prefix}/")}
        if found:
            caption = f"{says}, by group of questions.{means}"
            pictures.append(_curve_picture(f"curriculum-{prefix}", caption, found, "step", prefix, y_span=(0, 1.02)))
    return pictures


def slot_cosines(run: RunResults) -> list[Picture]:
    """Mean cosine between every two slots of an image."""
    geometry = run.evaluation.geometry
    if geometry is None:
        return []
    values_KK = np.array(geometry.slot_cosine)
    off_diagonal = values_KK[~np.eye(len(values_KK), dtype=bool)]
    low, high, mean = (f"{f(off_diagonal):.3f}" for f in (np.min, np.max, np.mean)) if off_diagonal.size else ("–",) * 3
    return [
        _picture(
            "slot-cosine",
            f"Cosine between slots, mean over images; {mean} off the diagonal. Near 1: the slots say the same.",
            f"Matrix of cosines of {len(values_KK)} slots; off the diagonal from {low} to {high}, mean {mean}.",
            lambda _: matrix(values_KK, "cosine"),
        )
    ]


def norm_charts(run: RunResults) -> list[Picture]:
    """Norms of latents and image tokens; norms of hidden states, layer by layer."""
    pictures = []
    if run.evaluation.geometry is not None:
        norms = {name.replace("_", " "): ends for name, ends in run.evaluation.geometry.norms.items()}
        numbers = "; ".join(f"{name}: median {n[2]:.3g}, from {n[0]:.3g} to {n[4]:.3g}" for name, n in norms.items())
        pictures.append(
            _picture(
                "norms",
                "Norms of latents and of the image tokens that they replace: quartiles, minimum and maximum.",
                f"Box chart of norms. {numbers}.",
                lambda theme: boxes(theme, norms, "‖·‖"),
            )
        )
    if run.states is not None:
        series = {kind: _plain(norms_L) for kind, norms_L in run.states.norms_L.items()}
        caption = "Mean norm of the generator's hidden states: layer 0 is the input, the final norm is left out."
        pictures.append(_curve_picture("norms-by-layer", caption, series, "layer", "mean ‖·‖"))
    return pictures


def projections(run: RunResults) -> list[Picture]:
    """PCA and t-SNE of latents, image tokens and text states, in one plane each."""
    if run.states is None:
        return []
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    points_ND = run.states.points_ND
    together_ND = np.concatenate(list(points_ND.values())).astype(np.float64)
    cuts = np.cumsum([len(points) for points in points_ND.values()])[:-1]
    pca = PCA(n_components=2, random_state=0)
    pca_N2 = pca.fit_transform(together_ND)
    perplexity = min(30.0, (len(together_ND) - 1) / 3)
    tsne_N2 = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(together_ND)
    first, second = (f"{100 * share:.0f} %" for share in pca.explained_variance_ratio_)
    counts = ", ".join(f"{len(points)} {name}" for name, points in points_ND.items())
    pca_plane, tsne_plane = (dict(zip(points_ND, np.split(n2, cuts), strict=True)) for n2 in (pca_N2, tsne_N2))
    return [
        _picture(
            "pca",
            f"PCA of the plain states; the two axes hold {first} and {second} of the variance.",
            f"Scatter plot of two principal components ({first} and {second} of the variance): {counts}.",
            lambda theme: scatter(theme, pca_plane, "first component", "second component"),
        ),
        _picture(
            "t-sne",
            f"t-SNE of the same states, perplexity {perplexity:.0f}. Neighbourhoods mean something, distances do not.",
            f"Scatter plot of a t-SNE with perplexity {perplexity:.0f}: {counts}.",
            lambda theme: scatter(theme, tsne_plane, "", ""),
        ),
    ]


def _curve_picture(
    name: str, caption: str, series: Mapping[str, Curve], x_label: str, y_label: str, **options: Any
) -> Picture:
    ends = {name: (min(curve), max(curve)) for name, curve in series.items()}
    numbers = "; ".join(
        f"{name} from {series[name][first][0]:.3g} at {first:g} to {series[name][last][0]:.3g} at {last:g}"
        for name, (first, last) in ends.items()
    )
    alt = f"Line chart of {y_label} over {x_label}: {numbers}."
    return _picture(name, caption, alt, lambda theme: curves(theme, series, x_label, y_label, **options))


def _picture(name: str, caption: str, alt: str, chart: Callable[[Theme], Chart]) -> Picture:
    return Picture(name, caption, alt, *draw(chart))


def _per_slot(run: RunResults, anchor: str, test: str, figure: str) -> Curve:
    found = {}
    for name, figures in run.evaluation.causal[anchor].tests.items():
        match = _PER_SLOT.fullmatch(name)
        if match and match[1] == test and figure in figures:
            found[int(match[2])] = figures[figure]
    return _curve(found)


def _curve(figures: Mapping[int, Figure]) -> Curve:
    return {x: triple for x, figure in figures.items() if (triple := _triple(figure))}


def _plain(values: Sequence[float]) -> Curve:
    return {float(x): (value, value, value) for x, value in enumerate(values)}


def _triple(figure: Figure | None) -> Triple | None:
    """Value and interval, None where the figure is absent or undefined; without an interval the value stands for it."""
    if figure is None or figure.value is None:
        return None
    low = figure.value if figure.low is None else figure.low
    high = figure.value if figure.high is None else figure.high
    return figure.value, low, high


def _binned(metrics: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """Means over equal stretches of steps, at the first step of each; steps without the number are passed over."""
    width = _bin_width(metrics)
    stretches = (metrics[first : first + width] for first in range(0, len(metrics), width))
    numbers = ([(e["step"], e[name]) for e in s if isinstance(e.get(name), int | float)] for s in stretches)
    means = {stretch[0][0]: sum(value for _, value in stretch) / len(stretch) for stretch in numbers if stretch}
    return {step: (mean, mean, mean) for step, mean in means.items()}


def _bin_width(metrics: Sequence[Mapping[str, Any]]) -> int:
    return max(1, -(-len(metrics) // _MOST_POINTS))
