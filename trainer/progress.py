"""What a person sees while something goes on: one rich progress bar, in training with the loss of each anchor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from shared.config import Config

_PLAIN_EVERY_STEPS = 50
Item = TypeVar("Item")


def track(items: Sequence[Item], console: Console, description: str) -> Iterator[Item]:
    """Iterate with a bar, in a terminal."""
    with Progress(console=console, disable=not console.is_terminal) as bar:
        yield from bar.track(items, description=description)


class TrainProgress:
    """A bar in a terminal; a line now and then where output goes to a file or a job log."""

    def __init__(self, config: Config, first_step: int):
        self._steps = config.train.steps
        self._console = Console()
        self._bar = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=self._steps, completed=first_step, state="")
        self._warned: set[str] = set()

    def update(self, done: int, values: dict[str, Any]) -> None:
        """After each step: `done` steps in all, and the step's metrics."""
        per_anchor = " ".join(
            f"{name.removeprefix('nll/')} {value:.3f}" for name, value in values.items() if name.startswith("nll/")
        )
        state = f"NLL {per_anchor} · {values['images_per_s']:.0f} images/s"
        self._bar.update(self._task, completed=done, state=state)
        if not self._console.is_terminal and (done % _PLAIN_EVERY_STEPS == 0 or done == self._steps):
            self._console.print(f"step {done}/{self._steps}  loss {values['loss']:.4f}  {state}", highlight=False)

    def warn(self, message: str) -> None:
        """Show a warning once."""
        if message not in self._warned:
            self._warned.add(message)
            self._console.print(f"[yellow]{message}", highlight=False)

    def __enter__(self) -> TrainProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
