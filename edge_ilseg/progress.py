"""How a long stage tells how far it is, without printing."""

from __future__ import annotations

from collections.abc import Callable

ProgressCallback = Callable[[str, float], None]
"""Called with what is being done and the share that is done, 0..1."""


def no_progress(text: str, share: float) -> None:
    """Tell nobody."""
