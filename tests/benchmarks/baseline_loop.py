"""The loop to beat: anchored training as it is plainly written, one question after the other.

What it computes equals what the project computes; how, differs: one row per question with the whole prompt, logits at
every position, a float32 copy of them, all graphs alive until one backward pass, a generator pass that makes logits
and keeps every layer's hidden states, the vision tower once more for the concept term. It follows the trainer of
github.com/ohjoonhee/visual-latents (variant A) step by step; none of its code is used.

Two anchors: the generator itself, adapter on, and a separate frozen model. Answers must have one length, as its mean
over the answer tokens of a whole batch is the mean over images only then.

Legend: B images, T row length, K latents, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.messages import Question
from shared.vlm import VisionLanguageModel
from shared.vlm.generator import Generator
from shared.vlm.lean import make_lean
from shared.vlm.prompt import SYSTEM_LINE
from trainer.data.records import Record
from trainer.data.sampling import Sampler

IGNORED = -100
Questions = Sequence[Sequence[Question]]


@contextlib.contextmanager
def plain_layers(*models: VisionLanguageModel) -> Iterator[None]:
    """The decoders' layers as transformers writes them; the project's own are put back afterwards."""
    for model in models:
        model.decoder.set_attn_implementation("sdpa")
        for layer in model.decoder.layers:
            layer.mlp.__dict__.pop("forward", None)
    try:
        yield
    finally:
        for model in models:
            make_lean(model.decoder)


def read(model: VisionLanguageModel, latents_BKD: Tensor, questions: Questions) -> tuple[float, Tensor]:
    """NLL (mean over images and questions) and its gradient for the latents (B, K, D), of one frozen anchor."""
    leaf_BKD = latents_BKD.detach().clone().requires_grad_()
    with plain_layers(model):
        loss = reader_loss([model], leaf_BKD, questions)
        loss.backward()
    assert leaf_BKD.grad is not None
    return loss.item(), leaf_BKD.grad


def reader_loss(anchors: Sequence[VisionLanguageModel], latents_BKD: Tensor, questions: Questions) -> Tensor:
    """Mean NLL over anchors and questions; every graph stays alive for the caller's backward."""
    total = latents_BKD.new_zeros((), dtype=torch.float32)
    n_questions = len(questions[0])
    for model in anchors:
        for j in range(n_questions):
            total = total + question_loss(model, latents_BKD, [row[j] for row in questions])
    return total / (len(anchors) * n_questions)


def question_loss(model: VisionLanguageModel, latents_BKD: Tensor, questions: Sequence[Question]) -> Tensor:
    """Cross entropy of the answers to one question per image: rows padded on the right, logits at every position."""
    input_ids_BT, attention_BT, labels_BT = encode_rows(model, questions, latents_BKD.shape[1])
    embeds_BTD = plain_embedding(model)(input_ids_BT).clone()
    for b, latents_KD in enumerate(latents_BKD):
        columns = (input_ids_BT[b] == model.image_token_id).nonzero().flatten()
        if len(columns) != len(latents_KD):
            raise ValueError(f"row {b} has {len(columns)} image tokens for {len(latents_KD)} latents")
        embeds_BTD[b, columns] = latents_KD.to(embeds_BTD.dtype)
    logits_BTV = model.hf_model(
        input_ids=input_ids_BT, inputs_embeds=embeds_BTD, attention_mask=attention_BT, use_cache=False
    ).logits
    flat_logits = logits_BTV[:, :-1].contiguous().float().flatten(0, 1)
    return F.cross_entropy(flat_logits, labels_BT[:, 1:].flatten(), ignore_index=IGNORED)


def encode_rows(
    model: VisionLanguageModel, questions: Sequence[Question], n_latents: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and labels (B, T); each row is tokenized with and without its answer."""
    tokenizer = model.processor.tokenizer
    rows = []
    for question in questions:
        text = chat_text(model, question, n_latents)
        prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = tokenizer(text + question.answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
        rows.append((ids, [IGNORED] * len(prompt_ids) + ids[len(prompt_ids) :]))
    length = max(len(ids) for ids, _ in rows)

    def padded(values: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (length - len(row))] for row in values], device=model.device)

    return (
        padded([ids for ids, _ in rows], tokenizer.pad_token_id),
        padded([[1] * len(ids) for ids, _ in rows], 0),
        padded([labels for _, labels in rows], IGNORED),
    )


def chat_text(model: VisionLanguageModel, question: Question, n_image_tokens: int) -> str:
    """The conversation up to the answer, with the image token repeated."""
    turns = [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM_LINE}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]},
    ]
    tokenizer = model.processor.tokenizer
    text = tokenizer.apply_chat_template(
        turns, chat_template=model.processor.chat_template, tokenize=False, add_generation_prompt=True
    )
    image = tokenizer.convert_ids_to_tokens(model.image_token_id)
    return str(text).replace(image, image * n_image_tokens)


def plain_embedding(model: VisionLanguageModel) -> Any:
    """The embedding matrix as a layer, without what peft wraps around it."""
    embedding = model.decoder.get_input_embeddings()
    return getattr(getattr(embedding, "token_adapter", None), "base_layer", embedding)


def generator_pass(generator: Generator, image_inputs: dict[str, Tensor]) -> Tensor:
    """Latents (B, K, D) from one pass through the whole vision-language model, logits and all hidden states included.

    Images must have one number of tokens. The trained rows of latent_start and the K slots are written over the
    embedding by boolean masks.
    """
    model, k = generator.model, generator.n_latents
    tokenizer = model.processor.tokenizer
    grids = image_inputs["image_grid_thw"]
    n_image_tokens = int(grids[0].prod()) // model.inner.visual.spatial_merge_size**2
    image = tokenizer.convert_ids_to_tokens(model.image_token_id)
    latent_tokens = "".join(tokenizer.convert_ids_to_tokens(generator.token_ids))
    text = chat_text(model, Question(latent_tokens, ""), n_image_tokens)
    ids = tokenizer([text] * len(grids), add_special_tokens=False)["input_ids"]
    input_ids_BT = torch.tensor(ids, device=model.device)
    assert text.count(image) == n_image_tokens

    embeds_BTD = plain_embedding(model)(input_ids_BT).clone()
    rows = generator.token_parameters[0]
    start, slots = generator.token_ids[0], generator.token_ids[1 : 1 + k]
    embeds_BTD[input_ids_BT == start] = rows[0].to(embeds_BTD.dtype)
    is_slot_BT = torch.isin(input_ids_BT, torch.tensor(slots, device=model.device))
    embeds_BTD[is_slot_BT] = rows[1:].repeat(len(grids), 1).to(embeds_BTD.dtype)
    output = model.hf_model(
        input_ids=input_ids_BT,
        inputs_embeds=embeds_BTD,
        attention_mask=torch.ones_like(input_ids_BT),
        mm_token_type_ids=(input_ids_BT == model.image_token_id).int(),
        pixel_values=image_inputs["pixel_values"].to(model.device, model.dtype),
        image_grid_thw=grids.to(model.device),
        output_hidden_states=True,
        use_cache=False,
    )
    hidden_BTD = output.hidden_states[-1]
    return torch.stack([hidden_BTD[b, is_slot_BT[b].nonzero().flatten()] for b in range(len(grids))])


class BaselineTrainer:
    """The whole training step of one process with two anchors."""

    def __init__(self, generator: Generator, anchor: VisionLanguageModel, sampler: Sampler, n_steps: int):
        self.generator = generator
        self._anchor = anchor
        self._sampler = sampler
        model = generator.model
        for parameter in generator.lora_parameters:
            parameter.data = parameter.data.to(model.dtype)
        width = model.width
        layers = (nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, width))
        self._concept_head = nn.Sequential(*layers).to(model.device, model.dtype)
        self._image_norm = 1.0
        self._parameters = [*generator.parameters(), *self._concept_head.parameters()]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=5e-5)
        self._scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, n_steps)

    def step(self, step: int) -> dict[str, float]:
        """One optimization step; data are loaded within it."""
        with plain_layers(self.generator.model, self._anchor):
            return self._step(step)

    def _step(self, step: int) -> dict[str, float]:
        batch = self._sampler.batch(step)
        questions = [[question.message for question in row] for row in batch.questions]
        latents_BKD = generator_pass(self.generator, self._image_inputs(batch.records))
        target_BTD = self._concept_targets(batch.records)
        reader = reader_loss([self.generator.model, self._anchor], latents_BKD, questions)
        slots = torch.arange(latents_BKD.shape[1], device=latents_BKD.device) % target_BTD.shape[1]
        cosine = F.cosine_similarity(self._concept_head(latents_BKD).float(), target_BTD[:, slots].float(), dim=-1)
        concept = (1 - cosine).mean()
        norm = (latents_BKD.float().norm(dim=-1) - self._image_norm).square().mean()
        loss = reader + 0.3 * concept + 0.1 * norm
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        terms = {"loss": loss, "nll": reader, "concept": concept, "norm": norm, "grad_norm": grad_norm}
        return {name: value.item() for name, value in terms.items()}

    def _image_inputs(self, records: Sequence[Record]) -> dict[str, Tensor]:
        return self.generator.model.image_inputs([image for record in records for image in record.load_images()])

    @torch.no_grad()
    def _concept_targets(self, records: Sequence[Record]) -> Tensor:
        """Visual tokens (B, T, D), from a second run of image processor and tower."""
        return torch.stack(self.generator.model.image_tokens_from(self._image_inputs(records)).tokens)
