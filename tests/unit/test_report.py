"""The report: what a page holds, what it leaves out, what it refuses; every number of a made-up run is found on it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from shared.errors import DataError
from shared.vlm.generator import Generator
from shared.vlm.latent_attention import attention_map, latent_attention
from tests.report_run import ANCHORS, N_IMAGES, SWAPS, K, write_run
from tests.unit.test_generator import K as GENERATOR_K
from tests.unit.test_generator import disturb, make_generator
from trainer.cli import app
from trainer.report import charts, tables
from trainer.report.images import attention_pictures, gallery
from trainer.report.page import Table
from trainer.report.results import Figure, load_results
from trainer.report.sections import build_sections
from trainer.report.states import States, hidden_norms, measure_states


class Tags(HTMLParser):
    """All opening tags with their attributes, and the page's text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """One made-up run with its report, written by the command line."""
    folder = write_run(tmp_path_factory.mktemp("report") / "first")
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.exit_code == 0, result.output
    assert str(folder / "report.html") in result.output
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Tags:
    return Tags((run / "report.html").read_text())


@pytest.fixture
def changed(run: Path, tmp_path: Path) -> Callable[..., Path]:
    """`changed(edit)`: a copy of the run whose evaluation.json went through `edit`."""

    def make(edit: Callable[[dict], object], name: str = "changed") -> Path:
        folder = tmp_path / name
        shutil.copytree(run, folder)
        path = folder / "evaluation.json"
        evaluation = json.loads(path.read_text())
        edit(evaluation)
        path.write_text(json.dumps(evaluation))
        return folder

    return make


def test_the_page_needs_nothing_from_outside(page):
    addresses = [v for _, attributes in page.tags for k, v in attributes.items() if k in ("src", "srcset", "href")]
    assert len(addresses) > 40
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") or name == "style" for _, attributes in page.tags for name in attributes)


def test_the_policy_allows_the_pages_own_style_and_data_images_only(run, page):
    (policy,) = [m["content"] for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    style = (run / "report.html").read_text().partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.split("; ")[:3] == ["default-src 'none'", "img-src data:", f"style-src 'sha256-{digest}'"]


def test_every_picture_is_a_file_in_light_and_dark_and_has_an_alt_text_with_numbers(run, page):
    charts_on_page = [i for i in page.of("img") if not i["alt"].startswith("The image of record")]
    files = sorted((run / "report").glob("*.png"))
    assert len(files) == 2 * len(charts_on_page) == 2 * len(page.of("source"))
    embedded = {base64.b64decode(i["src"].partition(",")[2]) for i in charts_on_page}
    embedded |= {base64.b64decode(s["srcset"].partition(",")[2]) for s in page.of("source")}
    assert embedded == {file.read_bytes() for file in files}
    for light in (file for file in files if not file.stem.endswith("-dark")):
        dark = light.with_name(f"{light.stem}-dark.png")
        corner = [Image.open(file).convert("L").getpixel((0, 0)) for file in (light, dark)]
        assert corner[0] > 200 > 60 > corner[1]
    assert all(len(i["alt"]) > 40 and any(c.isdigit() for c in i["alt"]) for i in charts_on_page)


def test_the_numbers_of_the_run_stand_on_the_page(run, page):
    evaluation = json.loads((run / "evaluation.json").read_text())
    for name in ANCHORS:
        figure = evaluation["anchors"][name]["latents"]
        assert f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]" in page.text
        delta = evaluation["causal"][name]["tests"]["swap_images"]["delta_accuracy"]["value"]
        assert f"{delta:.3f}".replace("-", "−") in page.text
    assert "C (unseen), held-out kinds" in page.text
    assert "undefined" in page.text, "a share of nothing is no number"
    assert "lost to swap images" in page.text
    assert "D · least squares on visual tokens" in page.text
    assert f"{evaluation['geometry']['slots']['A']['helpful_slots']} of {K}" in page.text
    (alt,) = [i["alt"] for i in page.of("img") if "per test and anchor" in i["alt"] and "swap images" in i["alt"]]
    assert f"{evaluation['causal']['B']['tests']['zero_all']['delta_accuracy']['value']:+.3f}" in alt
    assert not any(f"zero slot {k}" in alt for k in range(K)), "slots have charts of their own"


def test_config_versions_and_commands_stand_on_the_page(run, page):
    assert (run / "config.yaml").read_text().strip() in page.text
    assert f"python -m trainer train --config {run}/config.yaml" in page.text
    assert f"numpy {np.__version__}" in page.text


def test_answers_of_anchors_are_text_and_never_markup(page):
    assert "<b>blue</b>" in page.text
    assert not page.of("b")


def test_a_run_with_the_reading_suite_alone_gets_a_page_that_says_what_is_missing(changed):
    def reading_only(evaluation):
        for section in ("causal", "controls", "geometry", "transfer", "benchmarks", "against", "gallery"):
            del evaluation[section]

    folder = changed(reading_only)
    sections, absent = build_sections(load_results([folder]), "mean")
    assert [section.title for section in sections] == ["Reading", "Training", "Reproduce"]
    for suite in ("causal", "controls", "geometry", "transfer"):
        assert (
            f"changed: the {suite} suite; measure it with python -m trainer evaluate {folder} --suite {suite}" in absent
        )
    assert "changed: the benchmarks suite; evaluation.benchmarks of its config is empty" in absent
    assert "changed: the failure gallery; evaluation.json holds none" in absent
    assert len(absent) == 6


def test_the_causal_suite_alone_makes_a_page_too(changed):
    sections, absent = build_sections(load_results([changed(lambda evaluation: evaluation.pop("anchors"))]), "mean")
    assert sections[0].title == "Causal tests"
    assert any("the reading suite" in line for line in absent)


def test_runs_stand_side_by_side_and_a_row_that_one_lacks_gets_dashes(run, changed):
    other = changed(lambda evaluation: evaluation["anchors"].pop("B"), "second")
    runs = load_results([run, other])
    table = tables.headline(runs)
    assert table.blocks == ["first", "second"]
    assert all(len(cells) == 2 * len(table.columns) for cells in table.rows.values())
    half = len(table.columns)
    assert table.rows["A"][:half] == table.rows["A"][half:]
    assert [cell.text for cell in table.rows["B"]][half:] == ["–"] * half
    assert table.rows["B"][0].text == "0.990"
    shares = tables.recovered_shares(runs)
    assert [len(cells) for cells in shares.rows.values()] == [2, 2, 2]


def test_a_table_has_every_swap_of_every_anchor(run):
    table: Table = tables.causal(load_results([run]))
    assert len(table.rows) == len(ANCHORS) * (len(SWAPS) + 3 * K - 1)
    assert "zero slot 3 · C" in table.rows


def test_benchmarks_stand_beside_the_image_and_chance(run):
    runs = load_results([run])
    assert [cell.text for cell in tables.benchmarks(runs).rows["mmvp, pair accuracy · B"]] == [
        *("0.400", "0.700", "0.250"),
        *("30", "2", "0"),
    ]
    assert [cell.text for cell in tables.benchmark_details(runs).rows["mmvp, accuracy · B"]] == ["0.610", "–", "0.500"]
    assert [cell.text for cell in tables.benchmark_details(runs).rows["mmvp, category: colour · B"]] == [
        "0.500",
        "–",
        "–",
    ]


def test_another_runs_latents_are_compared_with_or_without_geometry(changed):
    runs = load_results([changed(lambda evaluation: evaluation.pop("geometry"))])
    assert [cell.text for cell in tables.geometry(runs).rows["linear CKA with runs/other"]] == ["0.870"]


@pytest.mark.parametrize(
    ("value", "text", "detail"),
    [
        (Figure(value=0.12345, low=-0.1, high=0.5, n=3), "0.123", "[−0.100, 0.500]"),
        (Figure(value=None), "undefined", ""),
        (Figure(value=1.0), "1.000", ""),
        (-2.5, "−2.500", ""),
    ],
)
def test_cells_show_value_and_interval(value, text, detail):
    assert (tables.cell(value).text, tables.cell(value).detail) == (text, detail)


def test_training_curves_are_means_over_equal_stretches():
    rng = np.random.default_rng(0)
    metrics = [{"step": 5 + i, "loss": float(rng.random())} | ({"check": i} if i % 7 == 6 else {}) for i in range(901)]
    width = 5  # the smallest whole number of steps that leaves at most 200 points
    curve = charts._binned(metrics, "loss")
    assert len(curve) == 181
    for first in range(0, 901, width):
        mean = np.mean([entry["loss"] for entry in metrics[first : first + width]])
        assert curve[5 + first] == pytest.approx((mean, mean, mean))
    assert charts._binned(metrics, "check")[5 + 6] == (6, 6, 6), "a sparse metric stands at its own step"
    assert charts._binned(metrics, "absent") == {}


def test_only_terms_of_the_loss_are_drawn_as_such(run):
    budget = {"stage": 1.0, "spans": 8.0, "tokens_per_image": 90.0, "flops_per_image": 6e7, "images_per_s": 30.0}
    metrics = [{"step": step, "nll": 1.0, "loss": 1.2, **budget} for step in range(3)]
    (results,) = load_results([run])
    loss, *_ = charts.training_curves(replace(results, metrics=metrics))
    assert "nll from" in loss.alt
    assert "loss from" in loss.alt
    assert all(name not in loss.alt for name in budget)


def test_the_validation_loss_stands_beside_what_it_is_a_loss_of(run):
    (results,) = load_results([run])
    own = [{"loss": 1.2, "step": step, "validation_loss": 1.1} for step in range(3)]
    (alone,) = charts.training_curves(replace(results, metrics=own))
    assert "validation loss from 1.1" in alone.alt
    loss, nll = charts.training_curves(replace(results, metrics=[{**entry, "nll/A": 1.0} for entry in own]))
    assert "validation" not in loss.alt
    assert "validation loss from 1.1" in nll.alt


def test_a_curriculum_has_charts_of_its_own(run):
    (results,) = load_results([run])
    metrics = [
        {"step": i, "loss": 1.0, "weight/exist": 1.0, "weight/relate": i / 10, "share/exist": 1 - i / 20}
        for i in range(11)
    ]
    pictures = {p.name: p for p in charts.training_curves(replace(results, metrics=metrics))}
    assert list(pictures) == ["loss", "curriculum-weight", "curriculum-share"]
    assert "exist from 1 at 0 to 1 at 10; relate from 0 at 0 to 1 at 10" in pictures["curriculum-weight"].alt
    assert "exist from 1 at 0 to 0.5 at 10" in pictures["curriculum-share"].alt


def test_the_truncation_curve_goes_from_the_floor_to_all_latents(run):
    (results,) = load_results([run])
    (picture,) = charts.truncation_curve(results)
    for name, reading in results.evaluation.anchors.items():
        ends = f"{name} from {reading.floor.value:.3g} at 0 to {reading.latents.value:.3g} at {K}"
        assert ends in picture.alt


@pytest.fixture(scope="module")
def states(run: Path) -> States:
    return measure_states(load_results([run])[0].config, "rollout")


def test_states_are_those_of_the_evaluated_checkpoint(run, states):
    config = load_results([run])[0].config
    generator = Generator(config.generator, seed=7)
    generator.load_adapter(run / "checkpoints/step-000600")
    image = Image.open(config.data.path / "images/test/CLEVR_test_000002.png").convert("RGB")
    tokens = generator.image_tokens_from(generator.model.image_inputs([image]))
    with torch.no_grad():
        latents_KD = generator.emit(tokens)[0]
    points_ND = states.points_ND
    assert {name: len(points) for name, points in points_ND.items()} == {
        "latents": N_IMAGES * K,
        "image tokens": N_IMAGES,
        "text states": N_IMAGES,
    }
    np.testing.assert_allclose(points_ND["latents"][2 * K : 3 * K], latents_KD, atol=1e-4)
    np.testing.assert_allclose(points_ND["image tokens"][2], tokens.tokens[0].mean(dim=0), atol=1e-4)


def test_attention_maps_belong_to_their_images_and_state_the_rule(run, states):
    (results,) = load_results([run])
    pictures = attention_pictures(replace(results, states=states), "rollout")
    assert len(pictures) == 4
    record, map_KIJ = states.attention[2]
    generator = Generator(results.config.generator, seed=0)
    generator.load_adapter(run / "checkpoints/step-000600")
    expected = attention_map(latent_attention(generator, record.load_images())[0], "rollout")
    np.testing.assert_allclose(map_KIJ, expected, atol=1e-5)
    share = map_KIJ.sum(axis=(1, 2)).mean()
    assert f"{100 * share:.0f} % of attention falls on the image" in pictures[2].alt
    assert record.record_id in pictures[2].caption
    assert "rollout" in pictures[2].caption


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])
@torch.no_grad()
def test_norms_by_layer_equal_those_of_the_models_own_hidden_states(tiny_folder, pictures, family):
    generator = make_generator(tiny_folder(family))
    disturb(generator)
    norms = hidden_norms(generator, pictures)
    decoder, first = generator.model.decoder, len(generator.model.prompt.prefix_ids)
    expected: dict[str, list[list[float]]] = {name: [] for name in norms}
    for picture in pictures:
        outputs: list[Any] = []
        ask = decoder.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"output_hidden_states": True}), with_kwargs=True
        )
        take = decoder.register_forward_hook(lambda module, args, output, seen=outputs: seen.append(output))
        tokens = generator.image_tokens_from(generator.model.image_inputs([picture]))
        generator.emit(tokens)
        ask.remove()
        take.remove()
        n = len(tokens.tokens[0])
        for name, at in (
            ("image tokens", lambda h_TD, n=n: h_TD[first : first + n]),
            ("latents", lambda h_TD: h_TD[-GENERATOR_K:]),
            ("text", lambda h_TD, n=n: torch.cat([h_TD[:first], h_TD[first + n : -GENERATOR_K]])),
        ):
            # The last of them has been through the final norm, which the chart leaves out.
            expected[name].append([at(h[0]).norm(dim=-1).mean().item() for h in outputs[0].hidden_states[:-1]])
    for name, values in norms.items():
        assert len(values) == len(decoder.layers) + 1
        np.testing.assert_allclose(values[:-1], np.mean(expected[name], axis=0), rtol=1e-5)


def test_a_model_that_cannot_be_loaded_leaves_the_rest_of_the_report(changed):
    folder = changed(lambda evaluation: None)
    shutil.rmtree(folder / "checkpoints")
    for options, why in (([], "no checkpoint is left to take states from"), (["--no-model"], "leave --no-model out")):
        assert CliRunner().invoke(app, ["report", str(folder), *options]).exit_code == 0
        page = (folder / "report.html").read_text()
        assert why in page
        assert 'id="attention"' not in page
        assert 'id="causal-tests"' in page


def test_the_gallery_is_bounded_and_survives_lost_images(run, tmp_path):
    (results,) = load_results([run])
    failure = results.evaluation.gallery[0]
    lost = failure.model_copy(update={"images": [tmp_path / "gone.png"]})
    cards = gallery([failure, lost] * 20)
    assert len(cards) == 24
    assert cards[1].image is None
    assert max(Image.open(io.BytesIO(cards[0].image)).size) == 224
    assert cards[0].answers == [("A", "<b>blue</b>", False), ("B", failure.gold, True), ("C", "", False)]


def test_a_wrong_field_is_named_with_file_and_remedy(changed):
    folder = changed(lambda evaluation: evaluation["anchors"]["A"].update(latents="high"))
    with pytest.raises(DataError, match=r"evaluation\.json: anchors\.A\.latents: .*python -m trainer evaluate"):
        load_results([folder])


def test_a_run_without_evaluation_says_how_to_get_one(changed):
    folder = changed(lambda evaluation: None)
    (folder / "evaluation.json").unlink()
    with pytest.raises(DataError, match=r"evaluation\.json: absent; measure with: python -m trainer evaluate"):
        load_results([folder])


def test_the_same_run_twice_is_refused(run):
    with pytest.raises(DataError, match="given twice"):
        load_results([run, run])
