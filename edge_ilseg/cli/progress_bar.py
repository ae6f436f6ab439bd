"""A progress bar on standard error, for anything over two seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from edge_ilseg.progress import ProgressCallback, is_first_process, no_progress


@contextmanager
def progress_bar(title: str) -> Iterator[ProgressCallback]:
    """Yield a callback (text, share 0..1) that moves the bar; a stage with another text starts the bar again.

    Of several processes that train together the first one alone shows a bar, and none where nobody looks: in a log.
    """
    if not is_first_process() or not sys.stderr.isatty():
        yield no_progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=1.0)
        stage = ""

        def report(text: str, share: float) -> None:
            nonlocal stage
            if text.split(",")[0] != stage:
                stage = text.split(",")[0]
                bar.reset(task)
            bar.update(task, completed=share, description=f"{title}: {text}")

        yield report
