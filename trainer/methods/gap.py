r"""`gap`: the Granular Alignment Paradigm, visual latents that the model writes itself, token by token.

Source: the GAP paper (Granular Alignment Paradigm, on Qwen2.5-VL-7B). A response holds a span of K latents, which are
fed back as inputs one after the other, and then says in words what they show:

    full     <think>[ v_1 … v_K ]<parser>description</parser></think><answer>answer</answer>
    short    [ v_1 … v_K ] description, answer

where [ and ] are the tokens that stand around an image. Without a span: <think>description</think><answer>…, or
description, answer. A question gets a span if its record has an auxiliary image and, with `supervise: failed`, if the
base model failed it (labels of `trainer difficulty`); a question without auxiliary trains on its plain response.

Training is one causal pass: the inputs v_k are the visual embeddings of the auxiliary image, pooled by area to a grid
of √K × √K (teacher forcing), and the hidden state before each, through the head, has to predict it:

    L = NLL of the words + latent_weight · mean_k ‖v̂_k − v_k‖² / variance of visual embeddings

For the PCA head both are coefficients in its subspace. NLL: mean over a response's tokens, a record's questions, the
batch; the opening token counts, the closing one does not, because the budget sets it. The source gives no weight and no
form of the latent loss: both are chosen here.

Legend: B rows, T row length, D width, K latents, N predicted tokens of all responses together, S latents of all spans.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from anchor_service.pool import AnchorPool
from shared.config import Config, Section
from shared.errors import ConfigError, DataError, NonFiniteError, ResponseError
from shared.likelihood import token_logprobs
from shared.messages import Question
from shared.packing import Branch, PackedRows, block_mask, pack_rows
from shared.vlm import ImageTokens, Prompt, pooled_image_tokens
from shared.vlm.generator import Generator
from trainer.data.records import KindQuestion, Record
from trainer.data.sampling import Batch
from trainer.difficulty import Difficulty, load_difficulty
from trainer.evaluation.reading import batched
from trainer.gap.autoregressive import TOKEN_BUDGETS, LatentHead, check_grid, latent_positions
from trainer.gap.generation import LatentSpans
from trainer.gap.heads import HeadKind, PcaHead, make_head
from trainer.gap.pca import load_pca
from trainer.gap.response import (
    ANSWER,
    ANSWER_END,
    LATENT,
    LATENT_END,
    PARSER,
    PARSER_END,
    THINK,
    THINK_END,
    parse_response,
)
from trainer.image_features import ImageFeatures
from trainer.losses import coefficient_loss
from trainer.methods.base import LossParts, Method
from trainer.methods.budget import decoder_budget


class GapOptions(Section):
    """The method's dials; K is `generator.latents`."""

    head: HeadKind = Field("pca", description="identity: the hidden state itself; mlp: full width; pca: coefficients.")
    pca: Path = Field(description="File of `trainer pca`; every head's loss is in units of its variance.")
    latent_weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="Of the latent loss beside the NLL.")
    positions: Literal["grid", "text"] = Field("grid", description="Of latents: like an image's, or one by one.")
    form: Literal["full", "short"] = Field("full", description="short: for tokenizers without the words of the tags.")
    around: tuple[str, str] = Field(
        ("<|vision_start|>", "<|vision_end|>"), description="Tokens of the model that open and close a span."
    )
    supervise: Literal["everywhere", "failed", "nowhere"] = Field(
        "everywhere", description="Which questions get latents; nowhere: words alone, the control text_bottleneck."
    )
    difficulty: Path | None = Field(None, description="Labels of `trainer difficulty`, for supervise: failed.")
    threshold: int = Field(
        0, ge=0, description="Right answers of the base model up to which a question counts as failed."
    )
    max_tokens: int = Field(64, ge=1, le=8192, description="Of a response at evaluation, beside its latents.")

    @model_validator(mode="after")
    def _labels_where_needed(self) -> GapOptions:
        if self.supervise == "failed" and self.difficulty is None:
            raise ValueError("supervise: failed needs difficulty: FOLDER; write it: python -m trainer difficulty")
        return self


@dataclass(frozen=True, slots=True)
class GapRows:
    """Packed rows of responses. is_latent_N, is_close_N: predicted "tokens" that are a latent, or close a span."""

    rows: PackedRows
    is_latent_N: Tensor
    is_close_N: Tensor

    def weights(self) -> Tensor:
        """(N,) of each token in the NLL: mean over a response's words, a row's responses, the rows; 0 elsewhere."""
        is_word_N = ~(self.is_latent_N | self.is_close_N)
        weights: list[Tensor] = []
        start = 0
        for row in self.rows.counts:
            for n in row:
                words_n = is_word_N[start : start + n].float()
                weights.append(words_n / (words_n.sum() * len(row) * len(self.rows.counts)))
                start += n
        return torch.cat(weights)


class ResponseLayout:
    """Turns questions, descriptions and answers into rows; what training and evaluation share of the form."""

    def __init__(self, generator: Generator, options: GapOptions):
        self.prompt: Prompt = generator.model.prompt
        self.options = options
        self.on_grid = options.positions == "grid"
        if self.on_grid:
            check_grid(generator.model)
        self.places_3K = latent_positions(generator.n_latents, self.on_grid)
        self.slots = generator.token_ids[1:-1]
        self.open_id, self.close_id = (self._single(token, generator) for token in options.around)
        self.before_ids = self._ids(THINK) if options.form == "full" else []

    def words(self, question: KindQuestion, description: str | None, has_span: bool) -> str:
        """A response's text behind its span, or all of it."""
        if self.options.form == "short":
            return question.answer if description is None else f"{description}, {question.answer}"
        answer = f"{THINK_END}{ANSWER}{question.answer}{ANSWER_END}"
        if has_span:
            return f"{PARSER}{description}{PARSER_END}{answer}"
        return f"{THINK}{description or ''}{answer}"

    def branch(self, question: KindQuestion, description: str | None, has_span: bool) -> Branch:
        """Question and response; the slots' ids stand where latents are read."""
        text = self.words(question, description, has_span)
        ((branch,),) = self.prompt.branches([[Question(question.text, text)]])
        if not has_span:
            return branch
        ids, start = branch.token_ids, branch.answer_start
        return replace(
            branch, token_ids=(*ids[:start], *self.before_ids, self.open_id, *self.slots, self.close_id, *ids[start:])
        )

    def rows(self, tokens: ImageTokens, branches: Sequence[Sequence[Branch]]) -> GapRows:
        """One row per record. Positions are those that generation gives (`trainer.gap.generation`)."""
        rows = pack_rows(self.prompt.prefix_ids, tokens.media, branches, self.prompt.between_images_ids)
        n_latents, extent = len(self.slots), int(self.places_3K.max()) + 1
        for b, t in (rows.token_ids_BT == self.slots[0]).nonzero().tolist():
            segment_T = rows.segments_BT[b]
            after_T = (segment_T == segment_T[t]) & (torch.arange(len(segment_T)) >= t + n_latents)
            rows.positions_3BT[:, b, t : t + n_latents] = rows.positions_3BT[:, b, t, None] + self.places_3K
            rows.positions_3BT[:, b, after_T] += extent - n_latents
        is_latent_N = torch.isin(rows.targets_N, torch.tensor(self.slots))
        is_close_N = torch.roll(is_latent_N, 1) & ~is_latent_N
        return GapRows(rows, is_latent_N, is_close_N)

    def answer(self, text: str) -> str | None:
        """The answer in a written response; None if it is not of the form."""
        if self.options.form == "short":
            return text.rpartition(",")[2].strip()
        opened, closed = self.options.around
        try:
            return parse_response(text.replace(opened, LATENT).replace(closed, LATENT_END)).answer.strip()
        except ResponseError:
            return None

    @property
    def max_positions(self) -> int:
        """Tokens and latents of a response at most."""
        return self.options.max_tokens + len(self.slots) + 2

    def spans(self, head: LatentHead, norms_B: Tensor | None = None, given_BKD: Tensor | None = None) -> LatentSpans:
        """When and how a response writes latents."""
        return LatentSpans(
            self.open_id, self.close_id, head, len(self.slots), "budget", self.on_grid, norms_B, given_BKD
        )

    def _ids(self, text: str) -> list[int]:
        return list(self.prompt.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _single(self, token: str, generator: Generator) -> int:
        ids = self._ids(token)
        if len(ids) != 1 or ids[0] == self.prompt.tokenizer.unk_token_id or ids[0] >= generator.model.vocabulary:
            raise ConfigError(
                f"options.around: {token!r} is no token of {generator.model.path}; name two tokens that it has"
            )
        return ids[0]


@dataclass(frozen=True, slots=True)
class Taught:
    """A microbatch after its forward pass. budget: see `decoder_budget`."""

    nll: Tensor
    latent: Tensor
    n_spans: int
    budget: dict[str, float]


class GapMethod(Method):
    """Likelihood of words and alignment of latents. Holds the latent head, the only extra weights."""

    Options = GapOptions
    needs_anchors = False
    suites = ("usage",)

    def __init__(self, config: Config, generator: Generator, pool: AnchorPool):
        super().__init__(config, generator, pool)
        self.options = GapOptions.model_validate(config.options)
        self._grid = _square(generator.n_latents)
        self.layout = ResponseLayout(generator, self.options)
        width, device = generator.model.width, generator.model.device
        pca = load_pca(self.options.pca, width)
        self._variance = pca.total_variance
        torch.manual_seed(config.train.seed)
        self.head = make_head(self.options.head, width, pca).to(device)
        self._labels: Mapping[tuple[str, str], Difficulty] | None = None
        if self.options.supervise == "failed" and self.options.difficulty is not None:
            self._labels = load_difficulty(self.options.difficulty)

    @property
    def extra_modules(self) -> nn.Module:
        return self.head

    @staticmethod
    def seen(record: Record) -> Record:
        """The auxiliary image behind the record's own, so that it is read, cached and found damaged like them."""
        if record.auxiliary is None:
            return record
        return replace(record, images=(*record.images, record.auxiliary.image))

    def prepare(self, features: ImageFeatures, records: Sequence[Record]) -> None:
        """Refuse data without auxiliary images. Raises DataError."""
        if not any(record.auxiliary is not None for record in records):
            raise DataError(
                f"{records[0].where}: no record has an auxiliary image, which method gap learns latents from; "
                "add `auxiliary` to the records, or use method sft"
            )

    def emit(self, batch: Batch, tokens: ImageTokens, step: int) -> Taught:
        taught = self._taught(batch.records, batch.questions, tokens, self._is_supervised)
        if not (torch.isfinite(taught.nll) and torch.isfinite(taught.latent)):
            names = ", ".join(record.record_id for record in batch.records)
            raise NonFiniteError(f"the loss on {names} is NaN or infinite; check these images, or lower train.lr_lora")
        return taught

    def loss(self, emitted: Taught, step: int) -> LossParts:
        total = emitted.nll + self.options.latent_weight * emitted.latent
        terms = {"nll": emitted.nll.item(), "latent": emitted.latent.item(), "loss": total.item()}
        return LossParts(total, {**terms, "spans": float(emitted.n_spans), **emitted.budget}, {})

    @torch.no_grad()
    def validation_loss(self, features: ImageFeatures, records: Sequence[Record]) -> float:
        """Training's loss, of each record in the form that the model finds likelier if it has learnt two.

        Latents count, because inference reads those that the head wrote: with true ones given, words are soon as good
        as they get while the latents still improve.
        """
        forms = {"everywhere": [True], "nowhere": [False], "failed": [True, False]}[self.options.supervise]
        total = 0.0
        for chunk in batched(records, self._config.evaluation.batch_images if len(forms) == 1 else 1):
            tokens = features.of_records([self.seen(record) for record in chunk])
            questions = [record.questions for record in chunk]
            taught = [self._taught(chunk, questions, tokens, lambda *_, form=form: form) for form in forms]
            likelier = min(taught, key=lambda one: one.nll.item())
            total += len(chunk) * self.loss(likelier, step=0).total.item()
        return total / len(records)

    def _taught(
        self,
        records: Sequence[Record],
        questions: Sequence[Sequence[KindQuestion]],
        tokens: ImageTokens,
        is_supervised: Callable[[Record, KindQuestion], bool],
    ) -> Taught:
        """is_supervised: whether a question of a record with an auxiliary image gets latents."""
        own, auxiliary_IKD = self._split(records, tokens)
        branches: list[list[Branch]] = []
        targets: list[Tensor] = []
        for record, asked, latents_KD in zip(records, questions, auxiliary_IKD, strict=True):
            spans = [latents_KD is not None and is_supervised(record, question) for question in asked]
            description = None if record.auxiliary is None else record.auxiliary.description
            branches.append(
                [self.layout.branch(q, description, has_span) for q, has_span in zip(asked, spans, strict=True)]
            )
            targets += [latents_KD for has_span in spans if has_span and latents_KD is not None]
        laid = self.layout.rows(own, branches)
        device = self._generator.model.device
        rows = laid.rows.to(device)
        targets_SD = torch.cat(targets) if targets else None
        hidden_BTD = self._generator.hidden_states(rows, own, block_mask(rows.segments_BT), inputs_ND=targets_SD)
        hidden_ND = hidden_BTD[rows.predict_N2[:, 0], rows.predict_N2[:, 1]]
        weights_N = laid.weights()
        is_word_N = (weights_N > 0).to(device)
        logprobs_N, _ = token_logprobs(hidden_ND[is_word_N], *self._generator.model.head(), rows.targets_N[is_word_N])
        nll = -(weights_N[weights_N > 0].to(device) * logprobs_N).sum()
        budget = decoder_budget(self._generator.model.hf_model.config, rows, len(logprobs_N))
        if targets_SD is None:
            return Taught(nll, torch.zeros((), device=device), 0, budget)
        latent = self.latent_loss(hidden_ND[laid.is_latent_N.to(device)], targets_SD)
        return Taught(nll, latent, len(targets), budget)

    def latent_loss(self, hidden_SD: Tensor, targets_SD: Tensor) -> Tensor:
        """Between what the head makes of hidden states and the embeddings that they have to predict."""
        if isinstance(self.head, PcaHead):
            return coefficient_loss(self.head.coefficients(hidden_SD), self.head.target(targets_SD), self.head.variance)
        return coefficient_loss(self.head(hidden_SD), targets_SD, self._variance)

    def _split(self, records: Sequence[Record], tokens: ImageTokens) -> tuple[ImageTokens, list[Tensor | None]]:
        """The records' own images; and of each record's auxiliary image (K, D) pooled embeddings, None without one."""
        images = [list(range(row.start, row.stop)) for row in tokens.rows]
        own = tokens.picked([row[: len(record.images)] for record, row in zip(records, images, strict=True)])
        pooled: list[Tensor | None] = []
        for record, row in zip(records, images, strict=True):
            has_one = len(row) > len(record.images)
            pooled.append(pooled_image_tokens(tokens.picked([row[-1:]]), self._grid)[0] if has_one else None)
        return own, pooled

    def _is_supervised(self, record: Record, question: KindQuestion) -> bool:
        """Whether a question of a record with an auxiliary image trains latents. Raises DataError without its label."""
        if self._labels is None:
            return self.options.supervise != "nowhere"
        label = self._labels.get((record.record_id, question.text))
        if label is None:
            raise DataError(
                f"{self.options.difficulty}: no label for {question.text!r} of record {record.record_id}; "
                "label this split: python -m trainer difficulty"
            )
        return label.right <= self.options.threshold


def _square(n_latents: int) -> tuple[int, int]:
    """The grid that auxiliary images are pooled to. Raises ConfigError if it is no square."""
    side = math.isqrt(n_latents)
    if side * side != n_latents:
        budgets = ", ".join(map(str, TOKEN_BUDGETS))
        raise ConfigError(f"generator.latents: {n_latents} is no square; use one of the token budgets {budgets}")
    return side, side
