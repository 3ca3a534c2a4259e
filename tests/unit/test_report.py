"""The report: what a page holds, what it leaves out, what it refuses; every number of a made-up run is found on it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from shared.errors import DataError
from tests.report_run import ANCHORS, SWAPS, K, write_run
from trainer.checkpoint import CheckpointStore
from trainer.cli import app
from trainer.generator import Generator
from trainer.report import charts, tables
from trainer.report.attention import attention_map, latent_attention
from trainer.report.images import attention_pictures, gallery
from trainer.report.page import Table
from trainer.report.results import ARRAYS_FILE, Figure, load_results
from trainer.report.sections import build_sections


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
    assert evaluation["causal"]["A"]["reason"] in page.text
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
        for suite in ("causal", "controls", "geometry", "benchmarks", "gallery"):
            del evaluation[suite]

    folder = changed(reading_only)
    (folder / ARRAYS_FILE).unlink()
    sections, absent = build_sections(load_results([folder]), "mean")
    assert [section.title for section in sections] == ["Reading", "Training", "Reproduce"]
    assert len(absent) == 7
    for suite in ("causal", "controls", "geometry", "benchmarks", "reading"):
        assert any(line.endswith(f"python -m trainer evaluate {folder} --suite {suite}") for line in absent)
    assert any("no attention maps" in line and "no checkpoint" in line for line in absent)


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


def test_the_truncation_curve_goes_from_the_floor_to_all_latents(run):
    (results,) = load_results([run])
    (picture,) = charts.truncation_curve(results)
    for name, reading in results.evaluation.anchors.items():
        ends = f"{name} from {reading.floor.value:.3g} at 0 to {reading.latents.value:.3g} at {K}"
        assert ends in picture.alt


def test_states_keep_to_one_width_and_a_bounded_number_of_points():
    arrays = {"latents": np.zeros((900, K, 8)), "image_tokens": np.ones((900, 8)), "text_states": np.ones((900, 6))}
    states = charts._states(arrays)
    assert set(states) == {"latents", "image_tokens"}
    n_images = 1500 // (K + 2)
    assert {name: points.shape for name, points in states.items()} == {
        "latents": (n_images * K, 8),
        "image_tokens": (n_images, 8),
    }


def test_stored_attention_is_drawn_over_the_images_that_it_was_measured_on(run):
    (results,) = load_results([run])
    shares = results.arrays["attention_last"][1].sum(axis=(1, 2))
    picture = attention_pictures(results, "last")[1]
    assert results.arrays["record_ids"][1] in picture.caption
    assert "last layer" in picture.caption
    assert f"{100 * shares.mean():.0f} % of attention falls on the image" in picture.alt
    results.arrays["record_ids"][1] = "gone"
    with pytest.raises(DataError, match="record gone was evaluated but is no longer in the test split"):
        attention_pictures(results, "last")


def test_attention_that_was_not_stored_comes_from_the_evaluated_checkpoint(changed):
    (results,) = load_results([changed(lambda evaluation: None)])
    generator = Generator(results.config.generator, seed=7)
    CheckpointStore(results.config.run.dir, keep=1).save(3, generator, {}, "", "", None)
    pictures = attention_pictures(results, "rollout")
    assert len(pictures) == 4
    image = Image.open(results.config.data.path / "images/test/CLEVR_test_000002.png").convert("RGB")
    (attention,) = latent_attention(generator, [image])
    share = attention_map(attention, "rollout").sum(dim=(1, 2)).mean()
    assert f"{100 * share:.0f} % of attention falls on the image" in pictures[2].alt


def test_the_gallery_is_bounded_and_survives_lost_images(run, tmp_path):
    (results,) = load_results([run])
    failure = results.evaluation.gallery[0]
    lost = failure.model_copy(update={"image": tmp_path / "gone.png"})
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
    with pytest.raises(DataError, match=r"evaluation\.json: absent; measure first: python -m trainer evaluate"):
        load_results([folder])


@pytest.mark.parametrize("content", [b"no archive", b"PK\x03\x04 cut short"])
def test_damaged_arrays_are_named(changed, content):
    folder = changed(lambda evaluation: None)
    (folder / ARRAYS_FILE).write_bytes(content)
    with pytest.raises(DataError, match=rf"{ARRAYS_FILE}: not an array file"):
        load_results([folder])


def test_arrays_that_would_run_code_are_refused(changed):
    folder = changed(lambda evaluation: None)
    np.savez(folder / ARRAYS_FILE, latents=np.array([{"an": "object"}], dtype=object))
    with pytest.raises(DataError, match=rf"{ARRAYS_FILE}: not an array file"):
        load_results([folder])


def test_the_same_run_twice_is_refused(run):
    with pytest.raises(DataError, match="given twice"):
        load_results([run, run])
