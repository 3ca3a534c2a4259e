"""Sampled answers against the model's own probabilities and against rows sampled alone; label folders good and bad."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from shared.errors import ConfigError, DataError
from shared.messages import Question
from shared.reading import pack_questions, score_answers
from shared.vlm import GrowingRows, load_vlm
from tests.tiny_models import FAMILY_NAMES
from trainer.data.records import ImageFile, KindQuestion
from trainer.difficulty import Difficulty, load_difficulty
from trainer.difficulty.engine import SamplingConfig, sample_answers, sample_seed, transformers_engine
from trainer.difficulty.labels import LabelFolder, data_digest, model_digest
from trainer.difficulty.vllm_engine import check_family
from trainer.gap.generation import Sampler, generate

SAMPLING = SamplingConfig(samples=3, max_tokens=4, temperature=1.0, seed=5)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@torch.no_grad()
def test_equals_every_sample_drawn_alone(tiny_model, picture_records, family):
    """One row at a time, its prompt read anew; in batches of any size the answers are the same."""
    model = tiny_model(family)
    tokenizer = model.processor.tokenizer
    expected = []
    for record in picture_records:
        for question in record.questions:
            ((branch,),) = model.prompt.branches([[question.message]])
            answers, right = [], 0
            for n in range(SAMPLING.samples):
                rows = GrowingRows.after_images(model, model.image_tokens(record.load_images()))
                rows.append_tokens([branch.token_ids[: branch.answer_start]])
                sampler = Sampler([sample_seed(5, record.record_id, question.text, n)], 1.0, 5)
                (written,) = generate(rows, [branch.token_ids[-1]], 5, sampler)
                answers.append(tokenizer.decode(written.pieces, skip_special_tokens=True).strip())
                gold = tokenizer.decode(branch.token_ids[branch.answer_start : -1], skip_special_tokens=True).strip()
                right += written.ended and answers[-1] == gold
            expected.append((record.record_id, question.text, right, answers))
    assert len({answer for *_, answers in expected for answer in answers}) > 5
    for n_rows in (1, 7, 9, 64):
        lines = sample_answers(model, picture_records, SAMPLING.model_copy(update={"rows": n_rows}))
        assert [(x["record"], x["question"], x["right"], x["answers"]) for x in lines] == expected
        assert all(line["samples"] == 3 for line in lines)


@torch.no_grad()
def test_the_share_of_right_answers_is_the_models_own_probability(tiny_folder, picture_records):
    """A tiny model made likely to answer `red` and stop; temperature 1, so that log-likelihoods tell the share."""
    model = load_vlm(tiny_folder("qwen2_5_vl")).freeze()
    record = replace(picture_records[0], questions=(KindQuestion("any", "what color is the square?", "red"),))
    tokens = model.image_tokens(record.load_images())
    asked = [[Question("what color is the square?", "red")]]
    rows = pack_questions(model, tokens.media, asked)
    hidden_2D = model.decode(rows, tokens.tokens[0])[rows.predict_N2[:, 0], rows.predict_N2[:, 1]]
    head_VD = model.hf_model.lm_head.weight
    for hidden_D, token in zip(hidden_2D, rows.targets_N, strict=True):
        wanted = torch.logsumexp(head_VD @ hidden_D, 0) - head_VD[token] @ hidden_D
        head_VD[token] += hidden_D * wanted / hidden_D.square().sum()
    probability = float(score_answers(model, rows, tokens.tokens[0]).logprobs_N.sum().exp())
    assert 0.05 < probability < 0.95
    n = 1000
    (line,) = sample_answers(model, [record], SamplingConfig(samples=n, max_tokens=2, rows=n))
    assert abs(line["right"] / n - probability) <= 4 * (probability * (1 - probability) / n) ** 0.5


def passes(model, records, sampling) -> list[tuple[int, int]]:
    """Rows and columns of every pass through the decoder."""
    shapes: list[tuple[int, int]] = []
    hook = model.decoder.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(args[0].shape[:2])), with_kwargs=True
    )
    sample_answers(model, records, sampling)
    hook.remove()
    return shapes


@torch.no_grad()
def test_an_image_whose_questions_do_not_fit_one_batch_is_read_once(tiny_model, picture_records):
    model, record = tiny_model("qwen2_5_vl"), picture_records[0]
    n_columns = len(model.prompt.prefix_ids) + len(model.image_tokens(record.load_images()).tokens[0])
    shapes = passes(model, [record], SAMPLING.model_copy(update={"rows": SAMPLING.samples}))
    assert shapes.count((1, n_columns)) == 1
    assert max(rows for rows, _ in shapes) == SAMPLING.samples


@torch.no_grad()
def test_images_and_questions_are_read_once(tiny_model, picture_records):
    """Columns computed: all images in one pass, all questions in one, then one position a step for rows still open."""
    model = tiny_model("qwen2_5_vl")
    shapes = passes(model, picture_records, SAMPLING)
    n_questions = sum(len(record.questions) for record in picture_records)
    n_prefix = len(model.prompt.prefix_ids)
    most_tokens = max(len(t) for r in picture_records for t in model.image_tokens(r.load_images()).tokens)
    assert shapes[0] == (3, n_prefix + most_tokens)
    assert shapes[1][0] == n_questions
    assert shapes[2] == (n_questions * SAMPLING.samples, 1)
    assert {columns for _, columns in shapes[2:]} == {1}
    assert len(shapes) <= 2 + SAMPLING.max_tokens + 1


def test_a_damaged_image_is_named_and_the_others_are_labelled(tiny_folder, picture_records, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    broken = replace(picture_records[1], images=(ImageFile(tmp_path / "bad.png"),))
    engine = transformers_engine(tiny_folder("qwen2_5_vl"), "float32", "cpu", SAMPLING)
    lines = engine([picture_records[0], broken, picture_records[2]])
    (error,) = [line for line in lines if "error" in line]
    assert error["record"] == "1"
    assert "bad.png" in error["error"]
    assert {line["record"] for line in lines if "error" not in line} == {"0", "2"}


def test_a_question_asked_twice_is_sampled_once(tiny_model, picture_records):
    record = picture_records[0]
    twice = replace(record, questions=(*record.questions, record.questions[0]))
    model = tiny_model("llava")
    assert sample_answers(model, [twice], SAMPLING) == sample_answers(model, [record], SAMPLING)


def row(record: str, question: str, right: int) -> dict[str, object]:
    return {"record": record, "question": question, "answer": "é", "right": right, "samples": 8, "answers": []}


def test_labels_are_written_in_parts_and_read_back(tmp_path):
    folder = tmp_path / "labels"
    labels = LabelFolder(folder, {"seed": 1})
    labels.write_part([row("a", "?", 0), row("a", "!", 3)])
    with pytest.raises(DataError, match=r"labels: the labels are not complete; run the same"):
        load_difficulty(folder)
    again = LabelFolder(folder, {"seed": 1}, {"model": "moved"})
    again.write_part([row("b", "?", 8)])
    assert [line["record"] for line in again.rows()] == ["a", "a", "b"]
    again.finish()
    expected = {("a", "?"): Difficulty(0, 8), ("a", "!"): Difficulty(3, 8), ("b", "?"): Difficulty(8, 8)}
    assert load_difficulty(folder) == expected
    assert sorted(file.name for file in folder.iterdir()) == ["labels.json", "part-000000.jsonl", "part-000001.jsonl"]


def test_labels_of_something_else_or_damaged(tmp_path):
    folder = tmp_path / "labels"
    LabelFolder(folder, {"samples": 8}).write_part([row("a", "?", 0)])
    with pytest.raises(ConfigError, match=r"holds labels with samples 8, not 4; give another --to"):
        LabelFolder(folder, {"samples": 4})
    with pytest.raises(DataError, match=r"no difficulty labels; write them"):
        load_difficulty(tmp_path / "absent")
    LabelFolder(folder, {"samples": 8}).finish()
    part = folder / "part-000000.jsonl"
    part.write_text(part.read_text() + '{"record": "b"}\n')
    with pytest.raises(DataError, match=r"part-000000.jsonl, line 2: no label .* delete this part"):
        load_difficulty(folder)
    (folder / "labels.json").write_text("[]")
    with pytest.raises(DataError, match=r"labels.json: damaged"):
        load_difficulty(folder)


def test_what_a_part_that_was_cut_off_leaves_is_never_read(tmp_path):
    labels = LabelFolder(tmp_path, {})
    labels.write_part([row("a", "?", 0)])
    (tmp_path / ".part-000001.jsonl.partial").write_text('{"record": "b", "ques')
    assert len(labels.rows()) == 1
    labels.write_part([row("c", "?", 0)])
    assert [line["record"] for line in labels.rows()] == ["a", "c"]


def test_digests_follow_content_alone(tiny_folder, picture_records, tmp_path):
    digest = data_digest(picture_records)
    (tmp_path / "moved.png").write_bytes((tmp_path / "0.png").read_bytes())
    moved = replace(picture_records[0], images=(ImageFile(tmp_path / "moved.png"),))
    assert data_digest([moved, *picture_records[1:]]) == digest
    (tmp_path / "moved.png").write_bytes((tmp_path / "1.png").read_bytes())
    other_answer = replace(picture_records[0], questions=(KindQuestion("any", "what color is the square?", "blue"),))
    changed = [
        data_digest([moved, *picture_records[1:]]),
        data_digest([other_answer, *picture_records[1:]]),
        data_digest(picture_records[1:]),
        data_digest([replace(picture_records[0], record_id="z"), *picture_records[1:]]),
    ]
    assert len({digest, *changed}) == 5
    one, other = tiny_folder("qwen2_vl"), tiny_folder("qwen2_vl", seed=1)
    assert model_digest(one) == model_digest(one) != model_digest(other)
    json.dumps(model_digest(one))


def test_vllm_is_refused_where_it_cuts_images_otherwise(tiny_folder):
    check_family(tiny_folder("qwen2_5_vl"))
    with pytest.raises(ConfigError, match=r"cuts images of idefics3 into tiles.* leave --vllm out"):
        check_family(tiny_folder("idefics3"))
