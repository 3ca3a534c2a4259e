"""`python -m anchor_service`: start anchors by hand and look at them."""

from anchor_service.cli import app

app()
