"""How an answer is drawn, and how its tokens become text.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a request says about its answers.

    temperature: 0 is greedy. top_p: the smallest set of tokens with at least this probability. stop: texts that end an
    answer and do not belong to it. n: answers, which differ in their random numbers alone. top_logprobs: how many
    alternatives each token is given with.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    n: int = 1
    top_logprobs: int = 0


def random_numbers(sampling: Sampling, sample: int) -> np.random.Generator:
    """One number per token: what a sample draws depends on seed and sample, not on what shares the batch."""
    return np.random.default_rng([sampling.seed % 2**63, sample])


def choose(logits_BV: Tensor, temperature_B: Tensor, top_p_B: Tensor, draw_B: Tensor) -> Tensor:
    """(B,) next tokens: greedy where the temperature is 0, else where the draw in [0, 1) falls in the nucleus."""
    is_greedy_B = temperature_B == 0
    scaled_BV = logits_BV.double() / torch.where(is_greedy_B, 1.0, temperature_B).unsqueeze(1)
    # Equal probabilities stay in order of their ids.
    probabilities_BV, order_BV = scaled_BV.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
    kept_BV = (before_BV < top_p_B.unsqueeze(1)) & (probabilities_BV > 0)
    cumulative_BV = (probabilities_BV * kept_BV).cumsum(dim=-1)
    places_B1 = torch.searchsorted(cumulative_BV, (draw_B * cumulative_BV[:, -1]).unsqueeze(1), right=True)
    places_B1 = torch.minimum(places_B1, kept_BV.sum(dim=-1, keepdim=True) - 1)
    return torch.where(is_greedy_B, logits_BV.argmax(dim=-1), order_BV.gather(1, places_B1).squeeze(1))


class AnswerText:
    """The text of one answer, as far as later tokens can no longer change it.

    It equals the whole answer decoded, without white space around it, cut before the first text of `stop`.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()):
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._sent = ""

    def add(self, token_id: int) -> str:
        """What is certain now and was not before."""
        self._ids.append(token_id)
        text = self._decoded()
        found = [text.index(stop) for stop in self._stop if stop in text]
        if found:
            self.stopped = True
            return self._new(text[: min(found)].rstrip())
        # White space at the end may be the answer's end, a broken character is not whole yet.
        certain = text.rstrip().rstrip(_UNFINISHED)
        held = max((_overlap(certain, stop) for stop in self._stop), default=0)
        return self._new(certain[: len(certain) - held].rstrip())

    def end(self) -> str:
        """What was held back. Not after a stop."""
        return self._new(self._decoded().rstrip())

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True)).lstrip()

    def _new(self, certain: str) -> str:
        if not certain.startswith(self._sent):
            return ""
        new, self._sent = certain[len(self._sent) :], certain
        return new


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text may be the beginning of a stop."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)
