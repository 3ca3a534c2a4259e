"""Slow, plain readings that the fast code must equal: one ordinary Hugging Face forward per question.

Nothing here uses the project's prompt cutting, packing, masks or positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.messages import Question
from shared.vlm import VisionLanguageModel
from shared.vlm.prompt import SYSTEM_LINE


@dataclass(frozen=True, slots=True)
class PlainPrompt:
    """Token ids of a whole conversation (1, T) and how many of the last ones are answer and end of turn."""

    input_ids: Tensor
    n_answer: int


def plain_prompt(model: VisionLanguageModel, question: Question, *n_image_tokens: int) -> PlainPrompt:
    """The chat template applied to a real conversation, its image tokens repeated as the family's processor does."""
    tokenizer = model.processor.tokenizer
    turns = [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM_LINE}]},
        {
            "role": "user",
            "content": [*([{"type": "image"}] * len(n_image_tokens)), {"type": "text", "text": question.text}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": question.answer}]},
    ]
    text = tokenizer.apply_chat_template(turns, chat_template=model.processor.chat_template, tokenize=False)
    if model.hf_model.config.model_type == "llava":
        # Its template ends an answer with a space, where training put EOS.
        text = text.rstrip() + tokenizer.eos_token
    image = tokenizer.convert_ids_to_tokens(model.image_token_id)
    first, *others = text.split(image)
    assert len(others) == len(n_image_tokens)
    around = "<fake_token_around_image>" if model.family.name == "idefics3" else ""
    tag = "<global-img>" if around else ""
    images = [around + tag + image * n + around for n in n_image_tokens]
    text = first + "".join(shown + after for shown, after in zip(images, others, strict=True))
    writes_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids = tokenizer(text, add_special_tokens=not writes_bos)["input_ids"]
    n_answer = len(tokenizer(question.answer, add_special_tokens=False)["input_ids"]) + 1
    return PlainPrompt(torch.tensor([ids]), n_answer)


def answer_logprobs(logits_1TV: Tensor, prompt: PlainPrompt) -> Tensor:
    """Log-probabilities of the answer tokens, the end of turn last."""
    n = prompt.n_answer
    logprobs_TV = logits_1TV[0].log_softmax(-1)
    targets = prompt.input_ids[0, -n:]
    return torch.stack([logprobs_TV[-n - 1 + i, target] for i, target in enumerate(targets)])


def plain_logits(
    model: VisionLanguageModel, input_ids: Tensor, latents_KD: Tensor | None, on_grid: bool = False
) -> Tensor:
    """(1, T, V) logits of token ids whose image tokens' embeddings are replaced by latents."""
    embeds_1TD = model.hf_model.get_input_embeddings()(input_ids)
    n_tokens = input_ids.shape[1]
    positions = torch.arange(n_tokens).expand(3, 1, -1) if model.family.uses_mrope else torch.arange(n_tokens)[None]
    if latents_KD is not None:
        is_image = input_ids == model.image_token_id
        first, n = int(is_image[0].nonzero()[0]), len(latents_KD)
        parts = [embeds_1TD[:, :first], latents_KD[None].to(embeds_1TD.dtype), embeds_1TD[:, first + n :]]
        embeds_1TD = torch.cat(parts, dim=1)
        if on_grid:
            side = round(n**0.5) * model.inner.visual.spatial_merge_size
            positions, _ = model.inner.get_rope_index(input_ids, is_image.int(), torch.tensor([[1, side, side]]))
    logits = model.hf_model(inputs_embeds=embeds_1TD, position_ids=positions, use_cache=False).logits
    return logits[..., : model.vocabulary]


def plain_read(
    model: VisionLanguageModel, latents_KD: Tensor | None, question: Question, on_grid: bool = False
) -> Tensor:
    """Log-probabilities of one answer, with latents in place of the image."""
    prompt = plain_prompt(model, question, 0 if latents_KD is None else len(latents_KD))
    return answer_logprobs(plain_logits(model, prompt.input_ids, latents_KD, on_grid), prompt)


def plain_greedy(model: VisionLanguageModel, latents_KD: Tensor, question: Question) -> tuple[list[int], list[int]]:
    """As many greedily decoded tokens as the answer has, and the answer's own tokens."""
    prompt = plain_prompt(model, question, len(latents_KD))
    ids = prompt.input_ids[:, : -prompt.n_answer]
    for _ in range(prompt.n_answer):
        next_id = plain_logits(model, ids, latents_KD)[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, next_id], dim=1)
    return ids[0, -prompt.n_answer :].tolist(), prompt.input_ids[0, -prompt.n_answer :].tolist()


def plain_read_image(model: VisionLanguageModel, image: Any, n_image_tokens: int, question: Question) -> Tensor:
    """`plain_read_images` of a single picture."""
    return plain_read_images(model, [image], [n_image_tokens], question)


def plain_read_images(
    model: VisionLanguageModel, images: Sequence[Any], n_image_tokens: Sequence[int], question: Question
) -> Tensor:
    """Log-probabilities of one answer about real pictures, all through the Hugging Face model's own forward."""
    prompt = plain_prompt(model, question, *n_image_tokens)
    images = [images] if model.family.name == "idefics3" else images
    inputs = dict(model.processor.image_processor(images=images, return_tensors="pt"))
    if model.family.uses_mrope:
        inputs["mm_token_type_ids"] = (prompt.input_ids == model.image_token_id).int()
    for unused in ("rows", "cols"):
        inputs.pop(unused, None)
    inputs = {name: v.to(model.dtype) if v.is_floating_point() else v for name, v in inputs.items()}
    logits = model.hf_model(input_ids=prompt.input_ids, use_cache=False, **inputs).logits
    return answer_logprobs(logits, prompt)


def plain_read_all(
    model: VisionLanguageModel,
    latents_BKD: Tensor | None,
    questions: Sequence[Sequence[Question]],
    on_grid: bool = False,
) -> list[list[Tensor]]:
    """`plain_read` of every question of every image."""
    return [
        [plain_read(model, None if latents_BKD is None else latents_BKD[b], q, on_grid) for q in row]
        for b, row in enumerate(questions)
    ]


def plain_nll(logprobs: Sequence[Sequence[Tensor]], count_end_of_turn: bool = True) -> Tensor:
    """NLL_b (B,): mean over questions of the mean −log p over answer tokens."""
    rows = []
    for row in logprobs:
        means = [-(tokens if count_end_of_turn else tokens[:-1]).mean() for tokens in row]
        rows.append(torch.stack(means).mean())
    return torch.stack(rows)


def max_relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the largest entry of the reference."""
    assert value.shape == reference.shape
    value, reference = value.detach(), reference.detach()
    return float((value - reference).abs().max() / reference.abs().max())
