"""How a long stage tells how far it is, without printing."""

from __future__ import annotations

import os
from collections.abc import Callable

ProgressCallback = Callable[[str, float], None]
"""Called with what is being done and the share that is done, 0..1."""


def no_progress(text: str, share: float) -> None:
    """Tell nobody."""


def is_first_process() -> bool:
    """Whether this process was started by the user, and not by Lightning or torchrun to train along with another."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"
