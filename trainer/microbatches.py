"""Into how many microbatches a batch is cut: a number, or `auto`, which measures.

More microbatches let the generator and remote anchors overlap more closely; each costs a round trip, and small ones
use the hardware worse. Where the optimum lies depends on both sides' speed, so `auto` takes the first steps of a run
to try divisors of the batch, and keeps the fastest. The mean gradient is the same for every choice, up to rounding.
"""

from __future__ import annotations

from typing import Any, Literal

MAX_CANDIDATE = 16
_STEPS_EACH = 3
"""Tried steps per candidate; the first, which pays for new shapes, does not count."""


class Microbatches:
    """The number of microbatches of every step of a run."""

    def __init__(self, setting: int | Literal["auto"], batch_images: int, has_remote: bool):
        if setting != "auto":
            self.candidates = [setting]
        elif not has_remote:
            # Nothing overlaps within one process.
            self.candidates = [1]
        else:
            self.candidates = [n for n in range(1, min(batch_images, MAX_CANDIDATE) + 1) if batch_images % n == 0]
        self._seconds: dict[int, list[float]] = {}

    def count(self, step: int) -> int:
        """For this step. Before the trial ends, a function of the step alone."""
        if len(self.candidates) == 1:
            return self.candidates[0]
        trial = step // _STEPS_EACH
        if trial < len(self.candidates):
            return self.candidates[trial]
        return min(self._seconds, key=lambda n: min(self._seconds[n]), default=self.candidates[0])

    def record(self, step: int, seconds: float) -> None:
        """How long this step took, waiting for data not included."""
        if len(self.candidates) > 1 and step // _STEPS_EACH < len(self.candidates) and step % _STEPS_EACH:
            self._seconds.setdefault(self.count(step), []).append(seconds)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same choice."""
        return {"seconds": self._seconds}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        self._seconds = dict(state["seconds"])
