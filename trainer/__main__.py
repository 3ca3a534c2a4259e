"""`python -m trainer`: train, evaluate, estimate, toy."""

from trainer.cli import app

app()
