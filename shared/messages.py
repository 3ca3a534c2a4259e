"""What passes between the trainer and an anchor: two messages and a handshake, nothing else.

Imports neither torch nor Ray; `Tensor` stands for whatever array the transport delivers (a torch tensor on
both sides; `anchor_service.wire` turns it into a NumPy view for the trip).

Legend: B images, Q questions per image, K latents, D width.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PROTOCOL_VERSION = 2


class Gradient(enum.StrEnum):
    """Which gradient a read returns beside the log-probabilities."""

    NONE = "none"
    """No gradient: evaluation, and the forward half of `vjp`."""

    FUSED = "fused"
    """∂NLL_b/∂h_b, with the weight of each answer token known before the call: one forward, one backward."""

    VJP = "vjp"
    """∂(Σ token_weights · logprobs)/∂h for weights that the caller supplies; forward is computed again."""


class LatentPositions(enum.StrEnum):
    """Rotary positions of the latents inside an anchor's row."""

    TEXT = "text"
    """One after the other, like words."""

    GRID = "grid"
    """A √K×√K image grid, as the anchor's family numbers its own image tokens."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question about an image and its reference answer."""

    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """Read `latents` in place of an image and say how probable each answer is.

    latents: (B, K, D), detached and contiguous; None reads the questions without any image (the floor). Without a
        gradient, fewer than the anchor's K are allowed: they are its first ones.
    questions: B lists of Q_b ≥ 1 questions; Q_b may differ between images.
    token_weights: only for `Gradient.VJP`: per image and question, one weight for each answer token.
    count_end_of_turn: whether the end-of-turn token after an answer counts in its NLL.
    image_markers: False takes the tokens around the image away as well; only without latents.
    with_answers: whether the reply says in words what greedy decoding writes; off the path of training.
    """

    request_id: str
    questions: Sequence[Sequence[Question]]
    latents: Tensor | None
    gradient: Gradient = Gradient.NONE
    token_weights: Sequence[Sequence[Sequence[float]]] | None = None
    count_end_of_turn: bool = True
    image_markers: bool = True
    with_answers: bool = False


@dataclass(frozen=True, slots=True)
class ReadTimings:
    """Seconds that a read spent, measured on the anchor's side."""

    encode_s: float = 0.0
    forward_s: float = 0.0
    backward_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ReadReply:
    """The answer to a `ReadRequest`.

    logprobs: per image and question, log p of each answer token, the end-of-turn token last.
    matches: the same shape: whether greedy decoding, given the answer so far, takes exactly that token. An
        answer is an exact match where all of its tokens match; no decoding loop is needed to know it.
    answers: per image and question, what greedy decoding writes up to the first token that is not the answer's; empty
        unless the request asked.
    latents_grad: (B, K, D) or None, see `Gradient`.
    incarnation: how often the answering process has been started (0 for the first).
    """

    request_id: str
    anchor: str
    incarnation: int
    logprobs: list[list[list[float]]]
    matches: list[list[list[bool]]]
    answers: list[list[str]] = field(default_factory=list)
    latents_grad: Tensor | None = None
    timings: ReadTimings = field(default_factory=ReadTimings)


@dataclass(frozen=True, slots=True)
class Handshake:
    """What one side of the contract is and expects; compared field by field before the first read.

    prompt: hash of the anchor's prompt template, so that a changed template is noticed on resume.
    image_norm: mean L2 norm of the anchor's own image tokens, the target of the norm loss; None if unknown.
    """

    name: str
    protocol: int
    latents: int
    width: int
    dtype: str
    family: str
    prompt: str
    image_norm: float | None = None
