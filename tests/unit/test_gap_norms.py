"""Norms of inputs, hidden states and latents against Hugging Face's own hidden states, on every family."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from shared.config import NormCalibrationConfig, load_config
from shared.run_folder import run_config, trained_generator
from tests.integration.helpers import training_tree, write_config
from tests.reference import max_relative_error, plain_prompt
from tests.tiny_models import FAMILY_NAMES
from tests.unit.test_generator import disturb, make_generator
from trainer.cli import app
from trainer.data import load_records
from trainer.gap.norms import fit_pca, measure_latents, measure_norms, visual_embeddings
from trainer.gap.pca import load_pca
from trainer.loop import train_run
from trainer.norm_calibration import NormCalibration


def plain_norms(model, records) -> dict[str, dict[str, list[float]]]:
    """Every token's norm, by place and kind: the model's own forward with pixels, one conversation at a time.

    A record's prompt is counted once, as in a row that its questions share.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for record in records:
        (picture,) = record.load_images()
        n_image = len(model.image_tokens([picture]).tokens[0])
        for q, question in enumerate(record.questions):
            prompt = plain_prompt(model, question.message, n_image)
            ids = prompt.input_ids[:, :-1]
            images = [[picture]] if model.family.name == "idefics3" else [picture]
            inputs = dict(model.processor.image_processor(images=images, return_tensors="pt"))
            inputs = {name: value for name, value in inputs.items() if name not in ("rows", "cols")}
            is_image = ids == model.image_token_id
            if model.family.uses_mrope:
                inputs["mm_token_type_ids"] = is_image.int()
            states = model.hf_model(input_ids=ids, use_cache=False, output_hidden_states=True, **inputs).hidden_states
            last = int(is_image[0].nonzero()[-1])
            for layer, state_1TD in enumerate(states):
                place = "input" if layer == 0 else f"layer {layer}" if layer < len(states) - 1 else "final norm"
                kinds = found.setdefault(place, {"text": [], "image": []})
                for t, norm in enumerate(state_1TD[0].norm(dim=-1).tolist()):
                    if q == 0 or t > last:
                        kinds["image" if is_image[0, t] else "text"].append(norm)
    return found


@pytest.mark.parametrize("family", FAMILY_NAMES)
@torch.no_grad()
def test_equals_hugging_faces_hidden_states(tiny_model, picture_records, family):
    model = tiny_model(family)
    measured = measure_norms(model, picture_records)
    reference = plain_norms(model, picture_records)
    n_layers = len(model.decoder.layers)
    assert list(measured) == ["input", *(f"layer {i}" for i in range(1, n_layers + 1)), "final norm"]
    # Hugging Face gives the last layer's output only behind the final norm.
    assert set(measured) - set(reference) == {f"layer {n_layers}"}
    for place, kinds in reference.items():
        for kind, norms in kinds.items():
            figures = measured[place][kind]
            assert figures["n"] == len(norms)
            assert figures["mean"] == pytest.approx(sum(norms) / len(norms), rel=1e-5)
            assert figures["median"] == pytest.approx(sorted(norms)[(len(norms) - 1) // 2], rel=1e-5)


@torch.no_grad()
def test_latents_before_and_after(tiny_folder, picture_records):
    generator = make_generator(tiny_folder("qwen2_5_vl"))
    disturb(generator)
    generator.train(False)
    pca = fit_pca(generator.model, picture_records, 0.9, None)
    config = NormCalibrationConfig(decay=0.5)
    measured = measure_latents(generator.emit, generator.model, picture_records, config, pca)
    plain, calibrated, projected, calibration = [], [], [], NormCalibration(config)
    for record in picture_records:
        tokens = visual_embeddings(generator.model, record)
        latents_KD = generator.emit(tokens)[0]
        plain += latents_KD.norm(dim=-1).tolist()
        calibrated += calibration(latents_KD[None], tokens)[0].norm(dim=-1).tolist()
        projected += [
            float((pca.basis_Dd @ pca.basis_Dd.T @ (h - pca.mean_D) + pca.mean_D).norm()) for h in latents_KD.double()
        ]
    expected = {"latents": plain, "latents, calibrated": calibrated, "latents, projected": projected}
    assert {name: figures["n"] for name, figures in measured.items()} == dict.fromkeys(expected, 12)
    for name, norms in expected.items():
        assert measured[name]["mean"] == pytest.approx(sum(norms) / 12, rel=1e-5)


def test_a_pca_of_a_models_visual_embeddings(tiny_model, picture_records):
    model = tiny_model("llava")
    pca = fit_pca(model, picture_records, 0.95, None)
    vectors_ND = torch.cat([visual_embeddings(model, r).tokens[0] for r in picture_records]).double()
    assert pca.n_vectors == len(vectors_ND)
    torch.testing.assert_close(pca.mean_D, vectors_ND.mean(dim=0))
    lost = (vectors_ND - pca.project(vectors_ND)).square().sum() / (vectors_ND - pca.mean_D).square().sum()
    assert 0 < float(lost) < 0.05
    assert max_relative_error(pca.project(vectors_ND[:1]), vectors_ND[:1]) < 1


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_command_line(toy_folder, tmp_path):
    """A PCA, the table of a model, the table of a run with that PCA; then what cannot be."""
    model, data, file = toy_folder / "A", toy_folder / "data", tmp_path / "pca" / "a.safetensors"
    printed = invoke("pca", "--model", model, "--data", data, "--to", file, "--images", 8, "--components", 5)
    assert "5 of 64 directions hold" in printed
    assert load_pca(file).n_vectors == 8 * 9

    printed = invoke("norms", "--model", model, "--data", data, "--images", 4, "--to", tmp_path / "norms")
    assert "final norm" in printed
    result = json.loads((tmp_path / "norms" / "norms.json").read_text())
    assert (result["model"], result["records"], result["latents"]) == (str(model), 4, {})
    with Image.open(tmp_path / "norms" / "norms.png") as chart:
        assert min(chart.size) > 300

    write_config(training_tree(toy_folder, tmp_path / "run", train={"steps": 1}), tmp_path / "run.yaml")
    train_run(load_config(tmp_path / "run.yaml"), resume=False)
    printed = invoke("norms", "--run", tmp_path / "run", "--pca", file, "--images", 4)
    assert "latents, calibrated" in printed
    result = json.loads((tmp_path / "run" / "norms.json").read_text())
    assert list(result["latents"]) == ["latents", "latents, calibrated", "latents, projected"]
    visual = result["states"]["input"]["image"]["mean"]
    assert result["latents"]["latents, calibrated"]["mean"] == pytest.approx(visual, rel=0.2)
    config = run_config(tmp_path / "run")
    generator = trained_generator(config)
    latents = measure_latents(
        generator.emit, generator.model, load_records(config.data, "test")[:4], NormCalibrationConfig()
    )
    assert result["latents"]["latents"]["mean"] == pytest.approx(latents["latents"]["mean"], rel=1e-5)

    for arguments, message in (
        (["norms", "--model", model], "give --model MODEL and --data FOLDER, or --run RUN"),
        (["norms", "--run", tmp_path / "run", "--data", data], "leave --model and --data out"),
        (["norms", "--run", tmp_path / "run", "--pca", tmp_path / "absent"], "fit one: python -m trainer pca"),
        (["pca", "--model", model, "--data", data, "--images", 1, "--components", 9], "use more images"),
    ):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 1
        assert message in done.output
