"""What both command lines share: options, and errors as one line instead of a traceback."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.logging import RichHandler

from shared.errors import VisualLatentsError

ConfigOption = Annotated[str, typer.Option("--config", "-c", help="YAML file; shipped ones lie in deploy/configs.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Override one field, e.g. train.steps=100 or anchors.0.replicas=2. Repeatable."),
]

Command = TypeVar("Command", bound=Callable[..., Any])


def friendly_errors(command: Command) -> Command:
    """Print this project's errors as one line each and exit with 1; let everything else keep its traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
        logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
        try:
            return command(*args, **kwargs)
        except VisualLatentsError as error:
            for line in str(error).splitlines():
                typer.echo(f"error: {line}", err=True)
            raise typer.Exit(1) from error

    return run  # type: ignore[return-value]
