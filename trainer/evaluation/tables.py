"""Tables of an evaluation for people, printed section by section."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.data import HELD_OUT_QUESTIONS
from trainer.evaluation.reading import CONDITIONS


def print_tables(result: dict[str, Any], sections: Sequence[str], console: Console) -> None:
    """Print the named sections of evaluation.json."""
    printers = {
        "anchors": print_reading,
        "causal": print_causal,
        "controls": print_controls,
        "geometry": print_geometry,
        "transfer": print_transfer,
        "benchmarks": print_benchmarks,
        "usage": print_usage,
        "against": print_against,
    }
    for section in sections:
        if result[section]:
            printers[section](result, console)


def print_reading(result: dict[str, Any], console: Console) -> None:
    """Headline and per-kind accuracy, for people."""
    of_training = str(result["split"]).endswith(HELD_OUT_QUESTIONS)
    images = f"{result['images']} {'training' if of_training else 'unseen'} images"
    questions = ", questions held out" if of_training else ""
    headline = Table(title=f"Exact match on {images}{questions} (95 % interval)")
    for column in ("anchor", *CONDITIONS, "recovered share"):
        headline.add_column(column, justify="left" if column == "anchor" else "right")
    for name, figures in result["anchors"].items():
        label = name if figures["seen_in_training"] else f"{name} (unseen)"
        headline.add_row(label, *(_cell(figures[c]) for c in CONDITIONS), _cell(figures["recovered_share"]))
        if "held_out_kinds" in figures:
            held = figures["held_out_kinds"]
            row = (_cell(held[c]) for c in CONDITIONS)
            headline.add_row(f"{name}, held-out kinds", *row, _cell(held["recovered_share"]), style="dim")
    console.print(headline)

    by_kind = Table(title="Exact match by kind of question: latents (ceiling, floor)")
    by_kind.add_column("kind")
    for name in result["anchors"]:
        by_kind.add_column(name, justify="right")
    for kind in next(iter(result["anchors"].values()))["kinds"]:
        cells = []
        for figures in result["anchors"].values():
            f = figures["kinds"][kind]
            cells.append(f"{f['latents']['value']:.3f} ({f['ceiling']['value']:.3f}, {f['floor']['value']:.3f})")
        by_kind.add_row(kind, *cells)
    console.print(by_kind)


def print_causal(result: dict[str, Any], console: Console) -> None:
    """The verdict, and every test's cost, by anchor."""
    section = result["causal"]
    for name, figures in section.items():
        lost = ", ".join(f"{test} {_short(share)}" for test, share in figures["lost_share"].items())
        console.print(f"anchor {name}: latents are [bold]{figures['verdict']}[/bold] (share lost to {lost})")
    _print_tests("Causal tests", section, console)


def print_controls(result: dict[str, Any], console: Console) -> None:
    """What disturbed images cost, by anchor."""
    tests = {name: {"tests": controls} for name, controls in result["controls"].items()}
    _print_tests("Image controls", tests, console)


def print_geometry(result: dict[str, Any], console: Console) -> None:
    """Figures of the latents, and what slots and probes say."""
    section = result["geometry"]
    table = Table("figure", "value", title="Geometry of the latents (never alone a proof that they are used)")
    table.columns[1].justify = "right"
    for name, figure in section["figures"].items():
        table.add_row(name.replace("_", " "), _cell(figure))
    for name, slots in section["slots"].items():
        table.add_row(f"{name}: utility in nats", _cell(slots["utility"]))
        table.add_row(f"{name}: helpful slots", f"{slots['helpful_slots']} of {len(slots['utility_alone'])}")
    if section["probes"]:
        for name in ("latents", "answer_state", "gap"):
            table.add_row(f"linear probe, {name.replace('_', ' ')}", _cell(section["probes"][name]))
    console.print(table)


def print_transfer(result: dict[str, Any], console: Console) -> None:
    """Readers of other families, through every projector."""
    table = Table(title="Readers of another family, through a closed-form projector (95 % interval)")
    for column in ("reader", *CONDITIONS, "recovered share"):
        table.add_column(column, justify="left" if column == "reader" else "right")
    for name, projectors in result["transfer"].items():
        for projector, figures in projectors.items():
            cells = (_cell(figures[c]) for c in (*CONDITIONS, "recovered_share"))
            table.add_row(f"{name}: {projector.replace('_', ' ')}", *cells)
    console.print(table)


def print_benchmarks(result: dict[str, Any], console: Console) -> None:
    """The headline figure of every public benchmark."""
    table = Table("benchmark", "figure", "anchor", "latents", "ceiling", "chance", "records", title="Public benchmarks")
    for benchmark, section in result["benchmarks"].items():
        for anchor, figures in section["anchors"].items():
            headline, chance = figures["latents"]["headline"], figures["latents"]["chance"]
            values = [figures[condition]["scores"][headline] for condition in ("latents", "ceiling")]
            values.append(chance["scores"][headline] if chance else None)
            cells = ["–" if value is None else f"{value:.3f}" for value in values]
            table.add_row(benchmark, headline, anchor, *cells, str(figures["latents"]["n"]))
    console.print(table)


def print_usage(result: dict[str, Any], console: Console) -> None:
    """What latents and bottleneck do at test time, in all and by kind of question."""
    section = result["usage"]
    table = Table(title=f"Usage test on {result['images']} unseen records: exact match")
    table.add_column("questions")
    for condition in section["conditions"]:
        table.add_column(condition.replace("_", " "), justify="right")
    table.add_row("all (95 % interval)", *(_cell(figures["accuracy"]) for figures in section["conditions"].values()))
    for kind, conditions in section["kinds"].items():
        table.add_row(kind, *(_short(figures["accuracy"]) for figures in conditions.values()))
    console.print(table)
    if norms := section.get("norms"):
        visual = norms["visual embeddings"]
        names = [name for name in ("normal", "calibrated") if name in norms]
        ratios = ", ".join(f"{name} {norms[name] / visual:.3g}" for name in names) or "none written"
        console.print(f"length of latents, in that of visual embeddings: {ratios}; spans opened: {norms['spans']:.1%}")
    if "attention_to_latents" in section:
        console.print(
            f"attention of the answer's first token to the latents: {_short(section['attention_to_latents'])}"
        )


def print_against(result: dict[str, Any], console: Console) -> None:
    """How alike the latents of two runs are."""
    for run, section in result["against"].items():
        console.print(f"linear CKA with the latents of {run}: {section['cka']:.3f} (1: a rotation)")


def _print_tests(title: str, section: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{title}: accuracy, its change, change in NLL (nats)")
    table.add_column("test")
    for name in section:
        table.add_column(name, justify="right", no_wrap=True)
    for test in next(iter(section.values()))["tests"]:
        cells = []
        for figures in section.values():
            f = figures["tests"][test]
            changes = f"{_short(f['delta_accuracy'], signed=True)}  {_short(f['delta_nll'], signed=True)}"
            cells.append(f"{_short(f['accuracy'])}  {changes}")
        table.add_row(test, *cells)
    console.print(table)


def _short(figure: dict[str, float | None], signed: bool = False) -> str:
    if figure["value"] is None:
        return "undefined"
    return f"{figure['value']:+.3f}" if signed else f"{figure['value']:.3f}"


def _cell(figure: dict[str, float | None]) -> str:
    if figure["value"] is None:
        return "undefined"
    return f"{figure['value']:.3f}\n[{figure['low']:.3f}, {figure['high']:.3f}]"
