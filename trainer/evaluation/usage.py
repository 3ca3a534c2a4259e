"""The usage test of models that answer by themselves: what do latent tokens and bottleneck do at test time?

    normal           latents, plain causal attention, as at inference
    latents_removed  the same model without its latent tokens
    bottleneck       latents, and the attention mask of stage 1: the answer sees images through them alone
    both             neither: no latents, and no sight of the images
    other_images     latents that were computed from another record's images; everything else stays
    floor            no images at all

Latents are used if removing or swapping them costs accuracy. Published figures of the four first: LIVR, usage test.
Exact match: greedy decoding gives the answer and ends its turn, read off one pass (see `ReadReply.matches`).

Legend: B rows, T row length, S keys, H heads, d head width, N questions of all records together, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from shared.messages import Question
from shared.packing import block_mask, unpack
from shared.reading import AnswerScores
from shared.vlm import ImageTokens
from shared.vlm.attention import attention_of, one_query
from trainer.data.records import Record
from trainer.data.sampling import derangement
from trainer.evaluation.reading import Outcome, batched
from trainer.image_features import ImageFeatures
from trainer.methods.livr import LivrReader, LivrRows, Role
from trainer.norm_calibration import NormCalibration

CONDITIONS = ("normal", "latents_removed", "bottleneck", "both", "other_images", "floor")
Questions = Sequence[Sequence[Question]]


@dataclass(frozen=True, slots=True)
class SelfReading:
    """A generator's own answers to all questions of some records, batch by batch."""

    reader: LivrReader
    features: ImageFeatures
    records: Sequence[Record]
    batch_images: int
    seed: int

    @property
    def conditions(self) -> tuple[str, ...]:
        """Those that the method has: without latents there is nothing to remove."""
        return CONDITIONS if self.reader.options.latents else ("normal", "floor")

    @torch.no_grad()
    def read(self, condition: str) -> Outcome:
        """Hits and NLLs of all questions under a condition."""
        self.reader.generator.train(False)
        others = derangement(len(self.records), self.seed).tolist()
        rows: list[tuple[float, float, float]] = []
        for chunk in batched(range(len(self.records)), self.batch_images):
            questions = [[q.message for q in self.records[b].questions] for b in chunk]
            if condition == "other_images":
                scores = self._with_latents_of(chunk, [others[b] for b in chunk], questions)
            else:
                scores = self._plain(condition, chunk, questions)
            rows += _per_question(scores)
        hits, nll, first = np.array(rows).T
        return Outcome(hits, nll, first)

    def _plain(self, condition: str, chunk: Sequence[int], questions: Questions) -> AnswerScores:
        tokens = ImageTokens([], [], [], [0] * len(chunk)) if condition == "floor" else self._tokens(chunk)
        has_latents = condition in ("normal", "bottleneck", "floor")
        livr = self.reader.rows(tokens, questions, self.reader.latent_ids if has_latents else [])
        mask_B1TT = self.reader.mask(livr, condition in ("bottleneck", "both"))
        return self.reader.scores(livr, self.reader.generator.hidden_states(livr.rows, tokens, mask_B1TT))

    def _with_latents_of(self, chunk: Sequence[int], others: Sequence[int], questions: Questions) -> AnswerScores:
        """Two passes: the same questions about the other images give every layer's keys and values of the latents,
        which then stand before the rows' own columns, seen by nobody but the answers of their question.
        """
        generator = self.reader.generator
        other_tokens, tokens = self._tokens(others), self._tokens(chunk)
        other = self.reader.rows(other_tokens, questions, self.reader.latent_ids)
        livr = self.reader.rows(tokens, questions, self.reader.latent_ids)
        everything = DynamicCache()
        generator.hidden_states(other.rows, other_tokens, block_mask(other.rows.segments_BT), everything)
        cache, owner_BS = _latent_cache(everything, other)
        mask_B1TS = _mask_with_foreign_latents(livr, owner_BS)
        return self.reader.scores(livr, generator.hidden_states(livr.rows, tokens, mask_B1TS, cache))

    def _tokens(self, chunk: Sequence[int]) -> ImageTokens:
        return self.reader.shown(self.features.of_records([self.records[b] for b in chunk]))

    @torch.no_grad()
    def attention_to_latents(self) -> np.ndarray:
        """(N,) share of attention, mean over layers and heads, that goes to the question's latents where the first
        token of its answer is predicted.
        """
        self.reader.generator.train(False)
        shares: list[float] = []
        pairs = [(b, q.message) for b, record in enumerate(self.records) for q in record.questions]
        for chunk in batched(pairs, self.batch_images):
            tokens = self._tokens([b for b, _ in chunk])
            livr = self.reader.rows(tokens, [[question] for _, question in chunk], self.reader.latent_ids)
            firsts = np.cumsum([0, *(row[0] for row in livr.rows.counts[:-1])])
            columns_B = livr.rows.predict_N2[torch.from_numpy(firsts), 1]
            mask_B1TT = self.reader.mask(livr, is_bottleneck=False)
            with attention_of(self.reader.generator.model.decoder, one_query(columns_B)) as layers:
                self.reader.generator.hidden_states(livr.rows, tokens, mask_B1TT)
            attention_BT = torch.stack(layers).mean(dim=0).squeeze(1)
            shares += (attention_BT * (livr.roles_BT == Role.LATENT)).sum(dim=1).tolist()
        return np.array(shares)


@torch.no_grad()
def latents_of_questions(
    reader: LivrReader,
    features: ImageFeatures,
    records: Sequence[Record],
    batch_images: int,
    calibration: NormCalibration | None = None,
) -> Tensor:
    """(B, K, D) latents of each record's first question as at inference, for anchors to read; evaluation mode."""
    reader.generator.train(False)
    latents = []
    for chunk in batched(records, batch_images):
        tokens = features.of_records(chunk)
        shown = reader.shown(tokens)
        livr = reader.rows(shown, [[record.questions[0].message] for record in chunk], reader.latent_ids)
        hidden_BTD = reader.generator.hidden_states(livr.rows, shown, reader.mask(livr, is_bottleneck=False))
        latents_BKD = reader.latents(livr, hidden_BTD)
        latents.append(latents_BKD if calibration is None else calibration(latents_BKD, tokens))
    return torch.cat(latents)


def _latent_cache(everything: DynamicCache, livr: LivrRows) -> tuple[DynamicCache, Tensor]:
    """Keys and values of the latent columns alone, and (B, S) whose they are: the segment, 0 for padding."""
    is_latent_BT = livr.roles_BT == Role.LATENT
    n_most = int(is_latent_BT.sum(dim=1).max())
    # A stable sort brings each row's latent columns to the front, in order.
    columns_BS = (~is_latent_BT).int().argsort(dim=1, stable=True)[:, :n_most]
    owner_BS = (livr.rows.segments_BT * is_latent_BT).gather(1, columns_BS)
    cache = DynamicCache()
    for i, layer in enumerate(everything.layers):
        index_BHSd = columns_BS[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
        cache.update(layer.keys.gather(2, index_BHSd), layer.values.gather(2, index_BHSd), i)
    return cache, owner_BS


def _mask_with_foreign_latents(livr: LivrRows, owner_BS: Tensor) -> Tensor:
    """(B, 1, T, S + T): answers see the foreign latents of their question instead of their own."""
    segments_BT1 = livr.rows.segments_BT.unsqueeze(2)
    is_answer_BT1 = (livr.roles_BT == Role.ANSWER).unsqueeze(2)
    foreign_BTS = is_answer_BT1 & (segments_BT1 == owner_BS.unsqueeze(1)) & (owner_BS.unsqueeze(1) > 0)
    own_B1TT = block_mask(livr.rows.segments_BT)
    own_B1TT &= ~(is_answer_BT1 & (livr.roles_BT == Role.LATENT).unsqueeze(1)).unsqueeze(1)
    return torch.cat([foreign_BTS.unsqueeze(1), own_B1TT], dim=3)


def _per_question(scores: AnswerScores) -> list[tuple[float, float, float]]:
    """Hit, NLL and NLL of the first token of every question."""
    logprobs = unpack(scores.logprobs_N.tolist(), scores.counts)
    matches = unpack(scores.matches_N.tolist(), scores.counts)
    return [
        (float(all(hit)), -sum(tokens) / len(tokens), -tokens[0])
        for row, hits in zip(logprobs, matches, strict=True)
        for tokens, hit in zip(row, hits, strict=True)
    ]
