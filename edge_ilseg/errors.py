"""The errors that a user can meet, in one style.

1. Every error says what was wrong and, as far as known: where, what was found, what was expected, what to do.
2. An error that the user can mend is an `EdgeIlsegError`; anything else is a defect of this program: it keeps its
   traceback, and has an exit code that no verdict has.
3. Every error has a hint, its own or that of its class: the next thing to do (`tests/test_error_hints.py`).
4. The command line has one error boundary (`edge_ilseg.cli`); nothing below it prints or exits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import ClassVar

EXIT_PASSED = 0
EXIT_RETENTION = 1  # verify: the model forgot, or learned too little
EXIT_PARITY = 2  # verify, export: a runtime does not compute what it should
EXIT_ARTEFACT = 3  # everything else: bad input, damaged file, missing package, wrong usage
EXIT_UNDECIDED = 4  # verify: nothing is broken, and the images are too few to tell
EXIT_DEFECT = 70  # a defect of this program, with its traceback; EX_SOFTWARE of sysexits.h
EXIT_CLOSED_PIPE = 141  # as a shell says of a program whose reader has gone
EXIT_INTERRUPTED = 130  # as a shell says of a program that Ctrl-C has ended

ACCESS_HINT = "see that this user may read and write it, and that the disk is sound"
"""What to do where a disk has refused something and no special reason is known."""
PUBLISH_AGAIN = "publish again from a machine that you trust; the device keeps what it has"
"""What an operator does about signed or served content that no publisher makes."""


class EdgeIlsegError(Exception):
    """What was wrong, where, what was found, what was expected, what to do."""

    exit_code = EXIT_ARTEFACT
    default_hint: ClassVar[str | None] = None
    """What to do where an error says nothing of its own: for a class of errors with one way out."""

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        found: object = None,
        expected: object = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.found = found
        self.expected = expected
        self.hint = self.default_hint if hint is None else hint
        super().__init__(what)

    def __str__(self) -> str:
        parts = [self.what]
        for label, value in (
            ("where:    ", self.where),
            ("found:    ", self.found),
            ("expected: ", self.expected),
            ("do:       ", self.hint),
        ):
            if value is not None:
                parts.append(f"  {label}{value}")
        return "\n".join(parts)

    def one_line(self) -> str:
        """The same in one line, for a table or a report."""
        parts = (("at", self.where), ("found", self.found), ("expected", self.expected), ("do:", self.hint))
        return "; ".join([self.what, *(f"{label} {value}" for label, value in parts if value is not None)])


class ConfigError(EdgeIlsegError):
    """A configuration file or an option has a value that cannot be used."""


class DataError(EdgeIlsegError):
    """A data set, an image or a mask cannot be used."""


class ClassNameError(EdgeIlsegError):
    """A class name is unknown, known already, or without a single image."""


class WorkspaceError(EdgeIlsegError):
    """A workspace or one of its steps is missing, damaged or in the way."""


class TrainingError(EdgeIlsegError):
    """Training cannot go on."""


class NotFiniteError(TrainingError):
    """A loss is not finite: training was stopped before the optimiser saw it."""


class ExportError(EdgeIlsegError):
    """A model cannot be exported."""


class ParityError(ExportError):
    """Two forms of one model do not compute the same."""

    exit_code = EXIT_PARITY


class BundleError(EdgeIlsegError):
    """A bundle is missing a file, damaged, or of a format that this version does not read."""


class ReportError(EdgeIlsegError):
    """A verification report is damaged, or of a format that this version does not read."""


class UpdateError(EdgeIlsegError):
    """An update cannot be published, trusted, fetched or put into place."""


class PackError(UpdateError):
    """A pack, its index or one of its chunks is not what a publisher makes, or was damaged on its way."""

    default_hint = "fetch or publish the pack again; the model in use goes on running"


class MissingPackageError(EdgeIlsegError):
    """A package, a runtime or a facility of the machine is missing."""


def check_extra(extra: str, modules: Iterable[str], purpose: str) -> None:
    """Raise `MissingPackageError` when one of `modules` cannot be imported, naming the extra that brings it."""
    missing = [name for name in modules if not _is_importable(name)]
    if missing:
        raise MissingPackageError(
            f"{purpose} needs a package that is not installed",
            found=f"no module named {', '.join(missing)}",
            hint=f"pip install 'edge-ilseg[{extra}]'",
        )


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a dotted name, when a package above it is missing
        return False


def choice_hint(name: str, known: Iterable[str]) -> str:
    """What to do about a name that is none of `known`: the near miss, or else any of them."""
    names = list(known)
    return did_you_mean(name, names) or ("take one of those expected" if names else "leave it out")


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """`"did you mean 'boat'?"` for a near miss, `None` when nothing is near."""
    lowered = {item.lower(): item for item in known}
    import difflib  # here: most commands meet no near miss, and all of them import this module

    near = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.6)
    return f"did you mean {lowered[near[0]]!r}?" if near else None
