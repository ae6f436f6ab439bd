"""The progress bar as a terminal sees it, and that a log sees nothing of it."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

CODE = """
import time
from edge_ilseg.cli.progress_bar import progress_bar
with progress_bar("work") as report:
    for step in range(1, 5):
        report("training, step", step / 4)
        time.sleep(0.15)
    for step in range(1, 3):
        report("scoring", step / 2)
        time.sleep(0.15)
print("done")
"""


def test_a_terminal_sees_each_stage_grow_and_the_bar_go() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        [sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            seen += part
        assert process.stdout is not None
        assert process.stdout.read() == b"done\n"
    os.close(ours)
    lines = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", seen).decode().replace("\r", "\n").split("\n")
    training = [line for line in lines if line.startswith("work: training, step")]
    scoring = [line for line in lines if line.startswith("work: scoring")]
    assert training
    assert scoring
    assert lines.index(training[-1]) < lines.index(scoring[0])
    assert re.search(r"\d:\d\d:\d\d", training[-1])
    filled = [line.count("━") for line in training]
    assert max(filled) > 0
    assert b"\x1b[2K" in seen, "the bar is not wiped out at the end"


def test_a_log_sees_no_bar() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("done\n", "")
