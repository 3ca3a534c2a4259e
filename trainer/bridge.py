"""The autograd bridge: makes remote anchors look like one differentiable function of the latents.

One `torch.autograd.Function` for all anchors together, because autograd runs one device's nodes one after the
other: separate Functions that each wait for their anchor would wait in turn.

- fused: anchors return ∂NLL_b/∂h_b with the forward pass. The bridge outputs NLL (R, B); backward multiplies the
  stored gradient by the upstream scalar of that (anchor, image). Exact for any function of the NLLs.
- vjp: the bridge outputs every token's log-probability; backward sends ∂L/∂logprobs and the anchors compute
  forward again. For losses that mix tokens or anchors.

Legend: B images, Q questions per image, R anchors, K latents, D width, N answer tokens of all anchors together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from anchor_service.pool import AnchorPool, PendingReads
from shared.errors import AnchorLostError
from shared.messages import Gradient, Question, ReadReply, ReadRequest
from shared.packing import unpack
from shared.reading import mean_answer_weights, nll_per_image

Questions = Sequence[Sequence[Question]]


@dataclass(frozen=True, slots=True)
class BridgeOutput:
    """What the anchors said about one batch.

    nll_RB: mean over questions of the mean −log p over answer tokens, per anchor and image; differentiable.
    weights_R: w_r of the R anchors that answered, summing to 1. replies: by name, in row order.
    """

    nll_RB: Tensor
    weights_R: Tensor
    replies: dict[str, ReadReply]


class AnchorBridge:
    """Calls a pool inside the autograd graph. Double backward is refused."""

    def __init__(self, pool: AnchorPool, mode: Gradient, count_end_of_turn: bool):
        if mode is Gradient.NONE:
            raise ValueError("the bridge needs mode fused or vjp")
        self._pool = pool
        self._mode = mode
        self._count_end_of_turn = count_end_of_turn

    def read(self, latents_BKD: Tensor, questions: Questions) -> BridgeOutput:
        """Have every anchor read the latents, and wait; see `PendingRead.output`."""
        return self.submit(latents_BKD, questions).output()

    def submit(self, latents_BKD: Tensor, questions: Questions) -> PendingRead:
        """Have every anchor read the latents, and return while they do."""
        forward = Gradient.FUSED if self._mode is Gradient.FUSED else Gradient.NONE
        call = _Call(self._pool, latents_BKD.detach().contiguous(), questions, self._count_end_of_turn)
        call.submit_forward(forward)
        return PendingRead(call, latents_BKD, self._mode)


class PendingRead:
    """A read by all anchors under way."""

    def __init__(self, call: _Call, latents_BKD: Tensor, mode: Gradient):
        self._call, self._latents_BKD, self._mode = call, latents_BKD, mode

    def output(self) -> BridgeOutput:
        """Wait for the anchors. Raises what `AnchorPool.gather` raises.

        An anchor that the pool dropped is absent from the output.
        """
        call, function = self._call, _FusedRead if self._mode is Gradient.FUSED else _TokenRead
        outputs: Tensor = function.apply(call, self._latents_BKD)  # type: ignore[no-untyped-call]
        nll_RB = outputs if self._mode is Gradient.FUSED else self._nll_from_tokens(outputs)
        return BridgeOutput(nll_RB, nll_RB.new_tensor(call.weights()), call.replies)

    def _nll_from_tokens(self, logprobs_N: Tensor) -> Tensor:
        call, rows = self._call, []
        for name, logprobs in zip(call.replies, logprobs_N.split(call.n_tokens()), strict=True):
            counts = call.counts(name)
            weights = mean_answer_weights(counts, call.count_end_of_turn)
            weighted = logprobs * torch.tensor(weights, dtype=logprobs.dtype, device=logprobs.device)
            rows.append(torch.stack([-part.sum() for part in weighted.split([sum(row) for row in counts])]))
        return torch.stack(rows)


class _Call:
    """One batch on its way through the pool; filled in by forward, read by backward."""

    def __init__(self, pool: AnchorPool, latents_BKD: Tensor, questions: Questions, count_end_of_turn: bool):
        self.replies: dict[str, ReadReply] = {}
        self.count_end_of_turn = count_end_of_turn
        self._pool = pool
        self._latents_BKD = latents_BKD
        self._questions = questions
        self._forward: PendingReads | None = None

    def submit_forward(self, gradient: Gradient) -> None:
        """Send the forward call to all anchors that still answer; all share one copy of the latents."""
        self._forward = self._submit(self._pool.names, gradient)

    def gather_forward(self) -> None:
        """Wait for the forward call's replies."""
        assert self._forward is not None, "submit_forward comes first, and a call is gathered once"
        self.replies, self._forward = self._pool.gather(self._forward), None

    def backward(self, token_weights: Mapping[str, Any]) -> dict[str, ReadReply]:
        """The vjp call to every anchor that answered forward."""
        return self._pool.gather(self._submit(list(self.replies), Gradient.VJP, token_weights))

    def _submit(
        self, names: Sequence[str], gradient: Gradient, token_weights: Mapping[str, Any] | None = None
    ) -> PendingReads:
        request_id = self._pool.new_request_id()
        return self._pool.submit(
            {
                name: ReadRequest(
                    request_id=request_id,
                    questions=self._questions,
                    latents=self._latents_BKD,
                    gradient=gradient,
                    token_weights=None if token_weights is None else token_weights[name],
                    count_end_of_turn=self.count_end_of_turn,
                )
                for name in names
            }
        )

    def weights(self) -> list[float]:
        """w_r of the anchors that answered, in the order of their replies, summing to 1."""
        weights = self._pool.weights()
        return [weights[name] for name in self.replies]

    def counts(self, name: str) -> list[list[int]]:
        """Answer tokens per image and question, as this anchor's tokenizer cuts them."""
        return [[len(question) for question in row] for row in self.replies[name].logprobs]

    def n_tokens(self) -> list[int]:
        """Answer tokens of the whole batch, per anchor."""
        return [sum(map(sum, self.counts(name))) for name in self.replies]


class _FusedRead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, latents_BKD: Tensor) -> Tensor:
        call.gather_forward()
        ctx.call = call
        nll = [nll_per_image(reply.logprobs, call.count_end_of_turn) for reply in call.replies.values()]
        return torch.tensor(nll, dtype=_loss_dtype(latents_BKD), device=latents_BKD.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RB: Tensor) -> tuple[None, Tensor]:
        gradients = [reply.latents_grad for reply in ctx.call.replies.values()]
        scaled = [
            gradient_BKD.to(grad_B.device) * grad_B.to(gradient_BKD.dtype)[:, None, None]
            for gradient_BKD, grad_B in zip(gradients, grad_RB, strict=True)
        ]
        return None, sum(scaled, start=grad_RB.new_zeros(()))


class _TokenRead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, latents_BKD: Tensor) -> Tensor:
        call.gather_forward()
        ctx.call = call
        flat = [v for reply in call.replies.values() for row in reply.logprobs for q in row for v in q]
        return torch.tensor(flat, dtype=_loss_dtype(latents_BKD), device=latents_BKD.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[None, Tensor]:
        call: _Call = ctx.call
        parts = zip(call.replies, grad_N.split(call.n_tokens()), strict=True)
        weights = {name: unpack(part.tolist(), call.counts(name)) for name, part in parts}
        replies = call.backward(weights)
        if len(replies) < len(call.replies):
            raise AnchorDroppedError(f"anchors {sorted(set(call.replies) - set(replies))} were dropped in backward")
        gradients = [
            reply.latents_grad.to(grad_N.device) for reply in replies.values() if reply.latents_grad is not None
        ]
        assert len(gradients) == len(replies), "a vjp reply carries a gradient; the pool checks it"
        return None, sum(gradients, start=grad_N.new_zeros(()))


class AnchorDroppedError(AnchorLostError):
    """An anchor that answered forward was dropped in backward; the step must be taken again without it."""


def _loss_dtype(latents: Tensor) -> torch.dtype:
    """float64 for gradcheck, float32 for everything else."""
    return torch.float64 if latents.dtype is torch.float64 else torch.float32
