"""The prompt is cut where the model's own template puts image, question and answer."""

from __future__ import annotations

import pytest

from shared.errors import DataError, ModelError
from shared.messages import Question
from shared.vlm import Prompt
from shared.vlm.families import family_of
from shared.vlm.prompt import SYSTEM_LINE
from tests.reference import plain_prompt
from tests.tiny_models import FAMILY_NAMES, TINY, tiny_tokenizer

QUESTIONS = [
    Question("what color is the square?", "red"),
    Question("what is in the middle center?", "blue circle, red square"),
    Question("how many things are there?", "4"),
]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_prefix_and_branch_are_the_conversation_cut_in_two(tiny_model, family):
    """Together they are the ids of the whole rendered conversation, BOS rule and end of turn included."""
    model = tiny_model(family)
    tokenizer = model.processor.tokenizer
    (branches,) = model.prompt.branches([QUESTIONS])
    for question, branch in zip(QUESTIONS, branches, strict=True):
        plain = plain_prompt(model, question, 2)
        ids = plain.input_ids[0].tolist()
        image_at = ids.index(model.image_token_id)
        assert model.prompt.prefix_ids == ids[:image_at]
        assert list(branch.token_ids) == ids[image_at + 2 :]
        assert branch.n_answer == plain.n_answer
        *answer, end = branch.token_ids[branch.answer_start :]
        assert answer == tokenizer(question.answer, add_special_tokens=False)["input_ids"]
        assert end == tokenizer.convert_tokens_to_ids(TINY[family].end_of_turn)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_without_image_is_the_conversation_of_text_alone(tiny_model, family):
    model = tiny_model(family)
    tokenizer = model.processor.tokenizer
    prompt = model.prompt_without_image
    (branches,) = prompt.branches([QUESTIONS])
    for question, branch in zip(QUESTIONS, branches, strict=True):
        turns = [
            {"role": "system", "content": [{"type": "text", "text": SYSTEM_LINE}]},
            {"role": "user", "content": [{"type": "text", "text": question.text}]},
            {"role": "assistant", "content": [{"type": "text", "text": question.answer}]},
        ]
        text = tokenizer.apply_chat_template(turns, chat_template=model.processor.chat_template, tokenize=False)
        bos = tokenizer.bos_token
        ids = tokenizer(text, add_special_tokens=bos is not None and not text.startswith(bos))["input_ids"]
        ours = [*prompt.prefix_ids, *branch.token_ids]
        # The last token of ours ends the turn; a template may go on, and LLaVA's leaves the end to the tokenizer.
        assert ours[:-1] == ids[: len(ours) - 1]
        assert model.image_token_id not in ours


@pytest.mark.parametrize("family", ["llava", "idefics3", "qwen2_vl"])
def test_there_is_one_bos_if_the_tokenizer_knows_one(tiny_model, family):
    """LLaVA leaves BOS to the tokenizer, Idefics3 writes it in the template, Qwen has none."""
    model = tiny_model(family)
    bos = model.processor.tokenizer.bos_token_id
    assert model.prompt.prefix_ids.count(bos) == (0 if family == "qwen2_vl" else 1)
    if bos is not None:
        assert model.prompt.prefix_ids[0] == bos


def make_prompt(template: str, family: str = "qwen2_vl") -> Prompt:
    return Prompt(tiny_tokenizer(TINY[family]), template, family_of(family, "test"), TINY[family].image_token)


@pytest.mark.parametrize("answer", ["", "   ", "\n"])
def test_an_answer_without_tokens_is_refused(tiny_model, answer):
    for family in ("qwen3_vl", "llava"):
        with pytest.raises(DataError, match=r"to 'what\?' has no tokens; correct or drop the record"):
            tiny_model(family).prompt.branches([[QUESTIONS[0], Question("what?", answer)]])


@pytest.mark.parametrize(
    "template",
    [
        "no marks at all",
        "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<|image_pad|>{% endif %}"
        "{% endfor %}{% endfor %}",
        # The question before the image would have to be read before the latents.
        "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}<|image_pad|>",
    ],
)
def test_a_template_without_the_parts_is_refused(template):
    with pytest.raises(ModelError, match="does not render image, question and answer in this order"):
        make_prompt(template)


def test_digest_tells_templates_apart():
    same, again, other = (
        make_prompt(TINY["qwen2_vl"].template),
        make_prompt(TINY["qwen2_5_vl"].template, "qwen2_5_vl"),
        make_prompt(TINY["qwen2_vl"].template.replace("<|im_end|>\n", "<|im_end|>")),
    )
    assert same.digest == again.digest != other.digest


def test_the_same_question_twice_and_in_another_order(tiny_model):
    """Branches are remembered between calls; order and repetition must not matter."""
    prompt = tiny_model("qwen2_5_vl").prompt
    one, two, three = QUESTIONS
    first = prompt.branches([[one, two], [one]])
    again = prompt.branches([[three, one, one], [two]])
    assert first[0][0] == first[1][0] == again[0][1] == again[0][2]
    assert first[0][1] == again[1][0]
    assert again[0][0] == prompt.branches([[three]])[0][0] != again[0][1]
