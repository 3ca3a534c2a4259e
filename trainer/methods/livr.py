r"""`livr`: Latent Implicit Visual Reasoning, and the ablations and controls that are settings of it.

Source: the LIVR paper ("Latent Implicit Visual Reasoning"), its method and ablations. A model answers by itself; K new
tokens after the prompt learn to hold what an answer needs of the images, because in stage 1 nothing else can tell it:

    prefix | image, between, image … | question | K latents | assistant header, answer

    query \ key    image            question  latents
    question      not in stage 1   causal    –
    latents       yes              yes       causal
    answer        not in stage 1   yes       yes

Latents have an embedding row each, are never generated, and end the user's turn, where a prompt ends. The template's
tokens before and between images count as question; those of the assistant header as answer: the token that predicts the
first word of the answer is one of them, so in stage 1 it sees images through latents alone. Stage 2 and inference are
plain causal attention. Each stage has its own warm-up and cosine, and the optimizer starts anew with it.

Loss: NLL of answer tokens, the mean over a question's tokens, a record's questions and the batch; with `anchor_weight`,
plus NLL_multi of frozen anchors that read each question's latents (`trainer.bridge`).

Several questions of a record share its row as branches that do not see each other.

Legend: B rows, T row length, S keys of a row, K latents, D width, N answer tokens, Q questions of all rows together.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from anchor_service.pool import AnchorPool
from shared.config import Config, Section
from shared.errors import ConfigError, NonFiniteError
from shared.likelihood import token_logprobs
from shared.messages import Gradient, Question
from shared.packing import PREFIX, Branch, Media, PackedRows, block_mask, pack_rows
from shared.reading import AnswerScores, mean_answer_weights
from shared.vlm import ImageTokens, Prompt
from shared.vlm.generator import Generator
from trainer.bridge import AnchorBridge, PendingRead
from trainer.data.records import Record
from trainer.data.sampling import Batch
from trainer.evaluation.reading import batched
from trainer.image_features import ImageFeatures
from trainer.losses import lr_share, nll_multi
from trainer.methods.base import LossParts, Method
from trainer.methods.budget import decoder_budget

Bottleneck = Literal["prompt_and_answer", "answer", "prompt_and_answer_and_latents_from_prompt"]


class LivrOptions(Section):
    """The method with the ablations of the paper."""

    latents: bool = Field(True, description="False: no latent tokens (sft, mask_only).")
    stage1_share: float = Field(0.4, ge=0, lt=1, description="Of all steps, with the bottleneck; 0: latents only.")
    bottleneck: Bottleneck = Field(
        "prompt_and_answer", description="Whom stage 1 keeps from the images; the third also keeps latents from it."
    )
    place: Literal["after_prompt", "before_prompt"] = "after_prompt"
    shared_row: bool = Field(False, description="All latents have the embedding of the first.")
    image_twice: bool = Field(False, description="The images stand in the prompt a second time.")
    lora: bool = Field(True, description="False: prompt tuning, only the rows of the latent tokens learn.")
    warmup_share: float = Field(0.05, ge=0, lt=1, description="Of each stage's steps.")
    anchor_weight: float = Field(0.0, ge=0, description="Of NLL_multi, where the config has anchors.")

    @model_validator(mode="after")
    def _something_learns(self) -> LivrOptions:
        if not self.latents and not self.lora:
            raise ValueError("lora: false without latents leaves nothing to learn; set one of them to true")
        if not self.latents and self.stage1_share > 0 and self.bottleneck != "answer":
            raise ValueError(
                f"bottleneck: {self.bottleneck} without latents leaves the answer no way to the images; use answer"
            )
        return self


class Role(enum.IntEnum):
    """What a column of a row is, for the mask."""

    TEXT = 0
    """Padding, the prefix, and what stands between two images."""
    IMAGE = 1
    QUESTION = 2
    LATENT = 3
    ANSWER = 4
    """The assistant header, too."""


@dataclass(frozen=True, slots=True)
class LivrRows:
    """Packed rows with the role of every column (B, T)."""

    rows: PackedRows
    roles_BT: Tensor

    def to(self, device: torch.device) -> LivrRows:
        """The same on a device."""
        return LivrRows(self.rows.to(device), self.roles_BT.to(device))


def livr_rows(
    prompt: Prompt,
    media: Sequence[Sequence[Media]],
    questions: Sequence[Sequence[Question]],
    latent_ids: Sequence[int],
    place: str = "after_prompt",
) -> LivrRows:
    """Lay out one row per record, every question with latents of its own (none if `latent_ids` is empty)."""
    composed = [
        [_with_latents(branch, latent_ids, place, len(prompt.after_image_ids)) for branch in row]
        for row in prompt.branches(questions)
    ]
    rows = pack_rows(
        prompt.prefix_ids, media, [[branch for branch, _ in row] for row in composed], prompt.between_images_ids
    )
    roles_BT = torch.where(rows.media_BT, Role.IMAGE, Role.TEXT)
    for r, row in enumerate(composed):
        for q, (_, roles) in enumerate(row, start=PREFIX + 1):
            roles_BT[r, rows.segments_BT[r] == q] = torch.tensor(roles[:-1])  # the last token takes no column
    return LivrRows(rows, roles_BT)


def _with_latents(
    branch: Branch, latent_ids: Sequence[int], place: str, question_start: int
) -> tuple[Branch, list[Role]]:
    """A branch with latent tokens in it, and the role of each of its tokens."""
    ids, header = branch.token_ids, branch.header_start
    at = header if place == "after_prompt" else question_start
    roles = [Role.QUESTION] * header + [Role.ANSWER] * (len(ids) - header)
    roles[at:at] = [Role.LATENT] * len(latent_ids)
    longer = (*ids[:at], *latent_ids, *ids[at:])
    return Branch(longer, branch.answer_start + len(latent_ids), header + len(latent_ids)), roles


def bottleneck_mask(livr: LivrRows, bottleneck: Bottleneck) -> Tensor:
    """(B, 1, T, T) mask of stage 1: that of the plain rows, without the sights that the bottleneck takes away."""
    blind = [Role.ANSWER] if bottleneck == "answer" else [Role.TEXT, Role.QUESTION, Role.ANSWER]
    query_BT1, key_B1T = livr.roles_BT.unsqueeze(2), livr.roles_BT.unsqueeze(1)
    blocked_BTT = torch.isin(query_BT1, torch.tensor(blind, device=query_BT1.device)) & (key_B1T == Role.IMAGE)
    if bottleneck == "prompt_and_answer_and_latents_from_prompt":
        blocked_BTT |= (query_BT1 == Role.LATENT) & (key_B1T == Role.QUESTION)
    return block_mask(livr.rows.segments_BT) & ~blocked_BTT.unsqueeze(1)


class LivrReader:
    """The generator answering by itself. Everything that training and evaluation share."""

    def __init__(self, generator: Generator, options: LivrOptions):
        self.generator = generator
        self.options = options

    @property
    def latent_ids(self) -> list[int]:
        """Ids of the K latent tokens, none if the method has none."""
        if not self.options.latents:
            return []
        slots = self.generator.token_ids[1:-1]
        return slots[:1] * len(slots) if self.options.shared_row else slots

    def rows(self, tokens: ImageTokens, questions: Sequence[Sequence[Question]], latent_ids: Sequence[int]) -> LivrRows:
        """Rows of these images and questions, on the generator's device."""
        model = self.generator.model
        return livr_rows(model.prompt, tokens.media, questions, latent_ids, self.options.place).to(model.device)

    def shown(self, tokens: ImageTokens) -> ImageTokens:
        """The images as often as the options say."""
        return tokens.twice() if self.options.image_twice else tokens

    def mask(self, livr: LivrRows, is_bottleneck: bool) -> Tensor:
        """(B, 1, T, T) mask of stage 1, or of stage 2 and inference."""
        return bottleneck_mask(livr, self.options.bottleneck) if is_bottleneck else block_mask(livr.rows.segments_BT)

    def scores(self, livr: LivrRows, hidden_BTD: Tensor) -> AnswerScores:
        """Log-probabilities of the answers from last hidden states."""
        rows = livr.rows
        hidden_ND = hidden_BTD[rows.predict_N2[:, 0], rows.predict_N2[:, 1]]
        logprobs_N, best_N = token_logprobs(hidden_ND, *self.generator.model.head(), rows.targets_N)
        return AnswerScores(logprobs_N, best_N, best_N == rows.targets_N, rows.counts)

    def latents(self, livr: LivrRows, hidden_BTD: Tensor) -> Tensor:
        """(Q, K, D) last hidden states of each question's latents, at the generator's output scale."""
        states_ND = hidden_BTD[livr.roles_BT == Role.LATENT]
        scaled_ND = self.generator.output_scale * states_ND
        return scaled_ND.unflatten(0, (-1, self.generator.n_latents)).to(self.generator.model.dtype)


@dataclass(frozen=True, slots=True)
class Answered:
    """A microbatch after its forward pass. nll: of the generator's own answers. read: anchors' calls under way.

    budget: see `decoder_budget`.
    """

    nll: Tensor
    budget: dict[str, float]
    read: PendingRead | None


class LivrMethod(Method):
    """Two stages of likelihood training of a model that answers by itself."""

    Options: ClassVar[type[LivrOptions]] = LivrOptions
    needs_anchors = False
    latents_of: ClassVar[Literal["image", "question"] | None] = "question"
    suites: ClassVar[tuple[str, ...]] = ("usage", "reading", "causal", "geometry")

    def __init__(self, config: Config, generator: Generator, pool: AnchorPool):
        super().__init__(config, generator, pool)
        self.options = type(self).Options.model_validate(config.options)
        if self.options.anchor_weight and not pool.names:
            raise ConfigError("options.anchor_weight: there is no anchor to weigh; add anchors, or set it to 0")
        self.reader = LivrReader(generator, self.options)
        self._bridge = AnchorBridge(pool, Gradient(config.pool.mode), config.pool.count_end_of_turn)
        if not self.options.lora:
            for parameter in generator.lora_parameters:
                parameter.requires_grad_(False)

    @property
    def first_step_of_stage2(self) -> int:
        """Steps before it have the bottleneck."""
        return round(self.options.stage1_share * self._config.train.steps)

    def starts_stage(self, step: int) -> bool:
        return step == self.first_step_of_stage2 and step > 0

    def lr_share(self, step: int) -> float:
        """Warm-up and cosine of the stage that the step lies in; `train.warmup_steps` does not count here."""
        border = self.first_step_of_stage2
        start, stop = (0, border) if step < border else (border, self._config.train.steps)
        warmup = round(self.options.warmup_share * (stop - start))
        return lr_share(step - start, stop - start, warmup, self._config.train.final_lr_share)

    def emit(self, batch: Batch, tokens: ImageTokens, step: int) -> Answered:
        questions = [[question.message for question in row] for row in batch.questions]
        tokens = self.reader.shown(tokens)
        livr = self.reader.rows(tokens, questions, self.reader.latent_ids)
        mask_B1TT = self.reader.mask(livr, step < self.first_step_of_stage2)
        hidden_BTD = self._generator.hidden_states(livr.rows, tokens, mask_B1TT)
        if not torch.isfinite(hidden_BTD).all():
            names = ", ".join(record.record_id for record in batch.records)
            raise NonFiniteError(
                f"hidden states of {names} are NaN or infinite; check these images, or lower train.lr_lora"
            )
        scores = self.reader.scores(livr, hidden_BTD)
        read = None
        if self.options.anchor_weight:
            alone = [[question] for row in questions for question in row]
            read = self._bridge.submit(self.reader.latents(livr, hidden_BTD), alone)
        budget = decoder_budget(self._generator.model.hf_model.config, livr.rows, len(scores.logprobs_N))
        return Answered(_mean_nll(scores), budget, read)

    def loss(self, emitted: Answered, step: int) -> LossParts:
        total, terms, replies = emitted.nll, {"nll": emitted.nll.item()}, {}
        if emitted.read is not None:
            read = emitted.read.output()
            anchors = nll_multi(read.nll_RB, read.weights_R)
            total, replies = total + self.options.anchor_weight * anchors, read.replies
            terms |= {f"nll/{n}": v for n, v in zip(read.replies, read.nll_RB.mean(1).tolist(), strict=True)}
        terms |= {"loss": total.item(), "stage": 1.0 if step < self.first_step_of_stage2 else 2.0}
        return LossParts(total, terms | emitted.budget, replies)

    @torch.no_grad()
    def validation_loss(self, features: ImageFeatures, records: Sequence[Record]) -> float:
        """NLL as at inference: latents, no bottleneck, no anchors."""
        sums = 0.0
        for chunk in batched(records, self._config.evaluation.batch_images):
            tokens = self.reader.shown(features.of_records(chunk))
            questions = [[question.message for question in record.questions] for record in chunk]
            livr = self.reader.rows(tokens, questions, self.reader.latent_ids)
            hidden_BTD = self._generator.hidden_states(livr.rows, tokens, self.reader.mask(livr, False))
            sums += len(chunk) * _mean_nll(self.reader.scores(livr, hidden_BTD)).item()
        return sums / len(records)


class SftOptions(LivrOptions):
    latents: bool = False
    stage1_share: float = Field(0.0, ge=0, lt=1)


class SftMethod(LivrMethod):
    """Control: fine-tuning on the same data in the same steps, without latents."""

    Options = SftOptions
    latents_of = None
    suites = ("usage",)


class LatentsOnlyOptions(LivrOptions):
    stage1_share: float = Field(0.0, ge=0, lt=1)


class LatentsOnlyMethod(LivrMethod):
    """Control: latent tokens, but never a bottleneck."""

    Options = LatentsOnlyOptions


class MaskOnlyOptions(LivrOptions):
    latents: bool = False
    bottleneck: Bottleneck = "answer"


class MaskOnlyMethod(LivrMethod):
    """Control: a bottleneck without latents; in stage 1 answers see images through the question alone, which does.

    What the paper's "mask only" blocks is not known; with the prompt blind, too, there would be nothing to learn from.
    """

    Options = MaskOnlyOptions
    latents_of = None
    suites = ("usage",)


def _mean_nll(scores: AnswerScores) -> Tensor:
    """Mean over rows of the mean over questions of the mean −log p over tokens, end of turn included; nats."""
    weights = mean_answer_weights(scores.counts, count_end_of_turn=True)
    weights_N = torch.tensor(weights, dtype=scores.logprobs_N.dtype, device=scores.logprobs_N.device)
    return -(weights_N * scores.logprobs_N).sum() / len(scores.counts)
