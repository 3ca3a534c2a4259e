"""Command line of the trainer. Each verb loads what it needs, so `--help` answers at once."""

from __future__ import annotations

import typer

from trainer.cli import data, models, runs, toy

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train visual latents against frozen anchors, and find out whether they carry the answer.",
)
app.add_typer(runs.app)
app.add_typer(models.app)
app.add_typer(data.app, name="data")
app.add_typer(toy.app, name="toy")
