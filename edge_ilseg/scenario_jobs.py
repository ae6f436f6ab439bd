"""Several steps of a scenario trained at the same time, each in a process of its own.

1. A step starts when the one that it goes on from is written, never before.
2. A process keeps the data set that it has decoded from step to step, and has its share of the processor's threads.
3. The first error ends the run: no new step starts, those under way end whole, and what is finished stays. A process
   that was killed is an error, too.
4. Where the run itself is killed its processes end at once: two runs of one folder must not write the same step.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

from edge_ilseg.data import open_data
from edge_ilseg.data.decoded import DECODED_BYTES, DecodedDataset
from edge_ilseg.errors import TrainingError
from edge_ilseg.progress import ProgressCallback
from edge_ilseg.scenario_run import Task, run_task

if TYPE_CHECKING:
    from edge_ilseg.config import DataConfig

POLL_S = 0.5
"""How often the progress of the processes is looked at."""


class _Process:
    """What a process of the pool keeps between two steps (rule 2)."""

    dataset: DecodedDataset
    accelerator: str
    workers: int
    shares: Any


def run_in_processes(
    tasks: Sequence[Task], *, accelerator: str, workers: int, jobs: int, progress: ProgressCallback
) -> None:
    """Train all tasks that are not done yet, up to `jobs` at a time.

    Args:
        tasks: of one data set, each behind the one that it goes on from.
        accelerator, workers: as of `pipeline.run_plan`.
        jobs: processes.
        progress: told the share of all iterations that is done.

    Raises:
        EdgeIlsegError: as of `scenario_run.run_scenario` (rule 3).
    """
    context = multiprocessing.get_context("spawn")
    shares = context.Array("d", len(tasks))
    setup = (tasks[0].config.data, accelerator, workers, jobs, shares)
    with ProcessPoolExecutor(jobs, context, _enter, setup) as pool:
        waiting = {number for number, task in enumerate(tasks) if task.parent is not None}
        running: dict[Future[None], int] = {
            pool.submit(_run, number, task): number for number, task in enumerate(tasks) if number not in waiting
        }
        try:
            while running:
                finished, _ = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
                for future in finished:
                    parent = tasks[running.pop(future)]
                    future.result()
                    for number in [number for number in waiting if tasks[number].needs(parent)]:
                        waiting.remove(number)
                        running[pool.submit(_run, number, tasks[number])] = number
                _tell(tasks, shares, running, waiting, progress)
        except BrokenProcessPool as error:
            raise TrainingError(
                "a process that trained a step has ended before its time",
                found="killed from outside, as a rule for want of memory",
                hint="fewer --jobs; the same command goes on with what is left",
            ) from error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _tell(
    tasks: Sequence[Task], shares: Any, running: dict[Future[None], int], waiting: set[int], progress: ProgressCallback
) -> None:
    total = sum(task.iterations for task in tasks)
    reached = sum(task.iterations * share for task, share in zip(tasks, shares, strict=True))
    done = len(tasks) - len(running) - len(waiting)
    progress(f"scenario, {done} of {len(tasks)} steps done", reached / total)


def _enter(data: DataConfig, accelerator: str, workers: int, jobs: int, shares: Any) -> None:
    """Prepare a process of the pool."""
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // jobs))
    _Process.dataset = DecodedDataset(open_data(data), DECODED_BYTES // jobs)
    _Process.accelerator, _Process.workers, _Process.shares = accelerator, workers, shares


def _end_with_parent() -> None:
    """Wait until the process that started this one is gone, and end (rule 4)."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(number: int, task: Task) -> None:
    """Train one task in a process of the pool, and tell how far it is through the shared memory."""

    def report(text: str, share: float) -> None:
        if text.startswith("training"):
            _Process.shares[number] = share

    run_task(task, _Process.dataset, accelerator=_Process.accelerator, workers=_Process.workers, progress=report)
    _Process.shares[number] = 1.0
