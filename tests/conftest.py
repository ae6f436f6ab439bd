"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def msrc_root() -> Path:
    """The MSRC-v2 photographs; they are never part of the project."""
    root = Path(os.environ.get("MSRC_ROOT", Path(__file__).parents[2] / "shared" / "data" / "msrc-v2"))
    if not (root / "Images").is_dir():
        pytest.skip(f"MSRC-v2 is not at {root}: set MSRC_ROOT to its folder to run this test")
    return root
