"""What training leaves to look at: `training.csv` in the step's folder, and TensorBoard's files on request.

1. One row for every `EVERY` iterations and one for the last: the means of the loss terms since the row before, the
   learning rates, and images per second. The last row has the scores of the evaluation split.
2. Columns: `iteration` (iterations done), `loss`, one for each term under its name in docs/method.md, `encoder_rate`,
   `decoder_rate`, `images_per_s`, `miou_old`, `miou_new`, `miou_all`. A cell without a value is empty.
3. The log is no part of a step's identity: its id does not cover it, and a step without one is whole.
4. A run that goes on after a kill has the rows that it had at its last checkpoint.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_ilseg.errors import WorkspaceError, check_extra
from edge_ilseg.files import disk_error

LOG_NAME = "training.csv"
EVERY = 10
RATES = ("encoder_rate", "decoder_rate")
SCORES = ("miou_old", "miou_new", "miou_all")

LogRow = dict[str, float | None]
"""A row by column."""


class TrainingLog:
    """The rows of one run, and where TensorBoard's files go."""

    def __init__(self, tensorboard: Path | None = None) -> None:
        self.rows: list[LogRow] = []
        self.tensorboard = tensorboard
        self._writer: Any = None
        self._terms: list[Mapping[str, float]] = []

    def note(
        self, iteration: int, terms: Mapping[str, float], rates: Mapping[str, float], images_per_s: float, *, last: bool
    ) -> bool:
        """Count the terms of an iteration in, and say whether it has given a row (rule 1).

        Args:
            iteration: iterations done, this one included.
            terms: the loss terms of this iteration.
            rates: learning rates of this iteration, by `RATES`.
            images_per_s: since the last row.
            last: whether the run ends with this iteration.
        """
        self._terms.append(terms)
        if iteration % EVERY and not last:
            return False
        means = {name: sum(item[name] for item in self._terms) / len(self._terms) for name in terms}
        self._terms = []
        row: LogRow = {"iteration": iteration, "loss": sum(means.values()), **means}
        row |= {name: rates.get(name) for name in RATES}
        row |= {"images_per_s": round(images_per_s, 2)} | dict.fromkeys(SCORES)
        self.rows.append(row)
        self._show(row)
        return True

    def score(self, old: float | None, new: float | None, every: float | None) -> None:
        """Put the scores into the last row (rule 1)."""
        if not self.rows:
            return
        scores = dict(zip(SCORES, (old, new, every), strict=True))
        self.rows[-1] |= scores
        self._show({"iteration": self.rows[-1]["iteration"], **scores})

    def restore(self, text: str) -> None:
        """Go on from the rows of an earlier process (rule 4)."""
        self.rows = parse_log(text)

    def text(self) -> str:
        """The rows as `training.csv` holds them."""
        if not self.rows:
            return ""
        out = io.StringIO()
        writer = csv.DictWriter(out, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in self.rows)
        return out.getvalue()

    def close(self) -> None:
        """End TensorBoard's file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _show(self, row: LogRow) -> None:
        """Write a row to TensorBoard, each column as a scalar: `loss/...`, `rate/...`, `speed/...` or `miou/...`."""
        if self.tensorboard is None:
            return
        iteration = int(row["iteration"] or 0)
        if self._writer is None:
            from tensorboardX import SummaryWriter  # type: ignore[import-untyped]

            # What an earlier process wrote of later iterations is hidden: it is written again.
            self._writer = SummaryWriter(str(self.tensorboard), purge_step=iteration)
        for name, value in row.items():
            if value is not None and name != "iteration":
                self._writer.add_scalar(_tag(name), value, iteration)


def check_tensorboard() -> None:
    """Raise `MissingPackageError` when TensorBoard's files cannot be written."""
    check_extra("tensorboard", ("tensorboardX",), "--tensorboard")


def _tag(name: str) -> str:
    if name in SCORES:
        return f"miou/{name.removeprefix('miou_')}"
    if name in RATES:
        return f"rate/{name.removesuffix('_rate')}"
    return "speed/images_per_s" if name == "images_per_s" else f"loss/{'total' if name == 'loss' else name}"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def parse_log(text: str, *, where: object = LOG_NAME) -> list[LogRow]:
    """The rows of a `training.csv`.

    Raises:
        WorkspaceError: it is none.
    """
    rows: list[LogRow] = []
    reader = csv.reader(io.StringIO(text))
    header: Sequence[str] = next(reader, [])
    for number, cells in enumerate(reader, start=2):
        try:
            row: LogRow = {name: float(cell) if cell else None for name, cell in zip(header, cells, strict=True)}
            if row["iteration"] is None:
                raise ValueError("no iteration")
        except (KeyError, ValueError) as error:
            raise WorkspaceError(
                "the training log cannot be read", where=f"{where}, line {number}", found=str(error), hint="delete it"
            ) from error
        rows.append(row)
    return rows


def read_training_log(folder: Path) -> list[LogRow]:
    """The rows of the log in a step's folder; none where there is no log.

    Raises:
        WorkspaceError: the file is damaged.
        EdgeIlsegError: the disk refuses to read it.
    """
    path = folder / LOG_NAME
    try:
        return parse_log(path.read_text(encoding="utf-8"), where=path)
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise WorkspaceError("the training log is not text", where=path, found=str(error), hint="delete it") from error
    except OSError as error:
        raise disk_error(error, path) from error
