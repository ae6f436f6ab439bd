"""A short life on a real disk, to be killed or refused at any system call: `python update_driver.py ROOT`.

Set up, a release that is confirmed, one that is rolled back. What is done already is not done again, so that the same
command goes on after a kill. The exit status is 0 when all of it is done, 3 when the disk refused something.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from crash_life import SCRIPT, Agent

from edge_ilseg.devices.update.disk import RealDisk
from edge_ilseg.errors import UpdateError

STEPS = SCRIPT[:3]


def live(root: Path) -> None:
    """The whole life."""
    for step in STEPS:
        step.do(Agent(RealDisk(root)))


if __name__ == "__main__":
    os.sched_yield()  # the tests count system calls from here on
    try:
        live(Path(sys.argv[1]))
    except UpdateError:
        sys.exit(3)  # without a word: the disk may be full for the standard output, too
