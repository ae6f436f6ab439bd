"""`edge-ilseg data inspect`."""

from __future__ import annotations

import click


@click.group()
def data() -> None:
    """Look at a data set and at what each step would see of it."""
