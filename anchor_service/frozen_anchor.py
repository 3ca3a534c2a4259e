"""A frozen model that reads latents in place of an image. No Ray here: the actor wraps this class.

Legend: B images (or records, of several images), Q questions per image, K latents, D width, N answer tokens.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shared.config import AnchorConfig
from shared.errors import AnchorCallError, HandshakeError
from shared.images import decode_image
from shared.messages import (
    PROTOCOL_VERSION,
    Gradient,
    Handshake,
    LatentPositions,
    Question,
    ReadReply,
    ReadRequest,
    ReadTimings,
)
from shared.packing import PackedRows, latent_media, unpack
from shared.reading import (
    AnswerScores,
    mean_answer_weights,
    pack_questions,
    pack_questions_without_image,
    score_answers,
)
from shared.vlm import CachedPrefix, ImageTokens, VisionLanguageModel, load_vlm, pooled_image_tokens

AdapterOff = Callable[[], contextlib.AbstractContextManager[object]]


class FrozenAnchor:
    """Answers `ReadRequest`s with a model whose weights never change and never get a gradient.

    adapter_off: context in which a model shared with the generator is its base again (placement shared_base).
    Holds no state between calls but the constant prefix, so any call may be sent again to any replica. Not
    thread-safe.
    """

    def __init__(
        self,
        name: str,
        model: VisionLanguageModel,
        n_latents: int,
        latent_positions: LatentPositions,
        adapter_off: AdapterOff = contextlib.nullcontext,
        incarnation: int = 0,
    ):
        on_grid = latent_positions is LatentPositions.GRID
        if on_grid and not model.family.uses_mrope:
            raise HandshakeError(
                f"anchor {name}: family {model.family.name} has no image grid; set pool.latent_positions: text"
            )
        self.name = name
        self.model = model
        self._prefix = CachedPrefix(model)
        self._media = latent_media(n_latents, on_grid)
        self._adapter_off = adapter_off
        self._incarnation = incarnation

    def handshake(self, probe_images: Sequence[bytes] = ()) -> Handshake:
        """What this anchor is and expects; `image_norm` is measured on the probe images (encoded files)."""
        return Handshake(
            name=self.name,
            protocol=PROTOCOL_VERSION,
            latents=self._media.length,
            width=self.model.width,
            dtype=str(self.model.dtype).removeprefix("torch."),
            family=self.model.family.name,
            prompt=self.model.prompt.digest,
            image_norm=self._image_norm(probe_images) if probe_images else None,
        )

    def read(self, request: ReadRequest) -> ReadReply:
        """Score the answers of one request, with the gradient it asks for.

        Raises AnchorCallError for latents of the wrong shape and when memory runs out, DataError for an answer
        without tokens.
        """
        latents_BKD = self._checked_latents(request)
        started = time.perf_counter()
        wants_gradient = request.gradient is not Gradient.NONE
        with self._adapter_off(), self._memory_limit_named(request.questions), torch.set_grad_enabled(wants_gradient):
            if latents_BKD is not None:
                latents_BKD.requires_grad_(wants_gradient)
            rows, prefix = self._packed(request, latents_BKD)
            encoded = time.perf_counter()
            media_ID = None if latents_BKD is None else latents_BKD.flatten(0, 1)
            scores = score_answers(self.model, rows, media_ID, prefix=prefix)
            read = time.perf_counter()
            latents_grad = None
            if wants_gradient and latents_BKD is not None:
                (latents_grad,) = torch.autograd.grad(self._objective(request, scores), latents_BKD)
        timings = ReadTimings(encoded - started, read - encoded, time.perf_counter() - read)
        return self._reply(request.request_id, scores, latents_grad, timings, request.with_answers)

    @torch.no_grad()
    def read_images(
        self, request_id: str, images: Sequence[Sequence[bytes]], questions: Sequence[Sequence[Question]]
    ) -> ReadReply:
        """The same questions with each record's real images (encoded files) instead of latents: the ceiling."""
        with self._adapter_off(), self._memory_limit_named(questions):
            tokens = self._image_tokens(images)
            rows = pack_questions(self.model, tokens.media, questions, cache_prefix=True)
            scores = score_answers(self.model, rows, torch.cat(tokens.tokens), tokens.deepstack, self._prefix)
        return self._reply(request_id, scores, None, ReadTimings())

    @torch.no_grad()
    def embed_images(self, images: Sequence[Sequence[bytes]], grid: tuple[int, int]) -> Tensor:
        """(B, C, D) float32 visual tokens of each record's images, pooled into a grid of C = rows × columns."""
        with self._adapter_off():
            return pooled_image_tokens(self._image_tokens(images), grid).cpu()

    def _image_tokens(self, images: Sequence[Sequence[bytes]]) -> ImageTokens:
        tokens = self.model.image_tokens([decode_image(data) for row in images for data in row])
        return tokens.in_rows([len(row) for row in images])

    def _packed(self, request: ReadRequest, latents_BKD: Tensor | None) -> tuple[PackedRows, CachedPrefix | None]:
        if not request.image_markers:
            return pack_questions_without_image(self.model, request.questions), None
        # Fewer latents than K take the first of their places.
        media = [] if latents_BKD is None else [replace(self._media, length=latents_BKD.shape[1])]
        rows = pack_questions(self.model, [media] * len(request.questions), request.questions, cache_prefix=True)
        return rows, self._prefix

    @contextlib.contextmanager
    def _memory_limit_named(self, questions: Sequence[Sequence[Question]]) -> Iterator[None]:
        """Turns out of memory into an AnchorCallError that says what to lower."""
        try:
            yield
        except RuntimeError as error:
            # PyTorch has an error class for GPUs only; on the CPU the allocator's words tell.
            if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
                raise
            raise AnchorCallError(
                f"anchor {self.name}: out of memory reading {len(questions)} images; lower train.batch_images or "
                "data.questions_per_image (in evaluation evaluation.batch_images), raise train.microbatches, or add "
                "replicas"
            ) from error

    def _objective(self, request: ReadRequest, scores: AnswerScores) -> Tensor:
        """The scalar whose gradient the request wants: Σ_b NLL_b, or Σ weights · logprobs."""
        if request.gradient is Gradient.VJP:
            if request.token_weights is None:
                raise AnchorCallError(f"anchor {self.name}: a vjp read needs token_weights")
            weights = [w for row in request.token_weights for question in row for w in question]
            sign = 1.0
        else:
            weights = mean_answer_weights(scores.counts, request.count_end_of_turn)
            sign = -1.0
        weights_N = torch.tensor(weights, dtype=scores.logprobs_N.dtype, device=scores.logprobs_N.device)
        return sign * (weights_N * scores.logprobs_N).sum()

    def _checked_latents(self, request: ReadRequest) -> Tensor | None:
        if request.latents is None:
            if request.gradient is not Gradient.NONE:
                raise AnchorCallError(f"anchor {self.name}: no gradient without latents")
            return None
        if not request.image_markers:
            raise AnchorCallError(f"anchor {self.name}: latents have no place without the image's markers")
        n_latents = self._media.length
        if request.gradient is Gradient.NONE:
            n_latents = min(n_latents, request.latents.shape[1])
        expected = (len(request.questions), n_latents, self.model.width)
        if tuple(request.latents.shape) != expected:
            raise AnchorCallError(
                f"anchor {self.name}: latents of shape {tuple(request.latents.shape)}, expected {expected} "
                "(images, generator.latents, width)"
            )
        return request.latents.detach().to(self.model.device, self.model.dtype)

    def _reply(
        self,
        request_id: str,
        scores: AnswerScores,
        latents_grad: Tensor | None,
        timings: ReadTimings,
        with_answers: bool = False,
    ) -> ReadReply:
        return ReadReply(
            request_id=request_id,
            anchor=self.name,
            incarnation=self._incarnation,
            logprobs=unpack(scores.logprobs_N.tolist(), scores.counts),
            matches=unpack(scores.matches_N.tolist(), scores.counts),
            answers=self._answers(scores) if with_answers else [],
            latents_grad=latents_grad,
            timings=timings,
        )

    def _answers(self, scores: AnswerScores) -> list[list[str]]:
        """What greedy decoding writes, as far as it can be known without decoding: to its first wrong token."""
        decode = self.model.processor.tokenizer.decode
        best, matches = unpack(scores.best_N.tolist(), scores.counts), unpack(scores.matches_N.tolist(), scores.counts)
        return [
            [
                decode(tokens[: hits.index(False) + 1 if False in hits else None], skip_special_tokens=True).strip()
                for tokens, hits in zip(row, row_hits, strict=True)
            ]
            for row, row_hits in zip(best, matches, strict=True)
        ]

    @torch.no_grad()
    def _image_norm(self, images: Sequence[bytes]) -> float:
        with self._adapter_off():
            tokens = self.model.image_tokens([decode_image(data) for data in images])
        return float(torch.cat(tokens.tokens).float().norm(dim=-1).mean())


def load_frozen_anchor(
    config: AnchorConfig, n_latents: int, latent_positions: LatentPositions, device: str, incarnation: int = 0
) -> FrozenAnchor:
    """Load an anchor's own model, frozen, on `device`."""
    model = load_vlm(config.model, config.dtype, device).freeze()
    return FrozenAnchor(config.name, model, n_latents, latent_positions, incarnation=incarnation)


def check_handshake(anchor: Handshake, generator: Handshake) -> None:
    """Raises HandshakeError naming both sides and the first field in which they do not fit."""
    differences = [
        (field, getattr(generator, field), getattr(anchor, field), fix)
        for field, fix in (
            ("protocol", "run the same version of this project on both sides"),
            ("latents", "use one generator.latents for both"),
            ("width", "use an anchor of the generator's width"),
            ("dtype", "give generator and anchor the same dtype"),
        )
        if getattr(generator, field) != getattr(anchor, field)
    ]
    if differences:
        field, ours, theirs, fix = differences[0]
        raise HandshakeError(
            f"generator {generator.name} has {field} {ours}, anchor {anchor.name} has {field} {theirs}; {fix}"
        )
