"""A process of this program's own, for what has to be measured apart from it."""

from __future__ import annotations

import sys
from pathlib import Path

import edge_ilseg

START = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import edge_ilseg
del sys.path[0]
import runpy
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def module_command(module: str) -> list[str]:
    """Like `python -m MODULE`, with the very package that runs here, and without modules of the current folder.

    Args:
        module: of this package, as `edge_ilseg.devices.memory`.
    """
    return [sys.executable, "-P", "-c", START, str(Path(edge_ilseg.__file__).parents[1]), module]
