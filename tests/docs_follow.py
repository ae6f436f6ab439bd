"""Following a page: every block of commands is typed as it stands, but for what the tables say (docs_tables.py)."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from docs_tables import BEFORE, FINDINGS, NOT_RUN, REPLACED, VERDICTS, small
from docs_world import Reader
from documents import PROGRAM, ROOT, TYPED, blocks, commands, name_of, statements, words_of

from edge_ilseg.cli import run

EXPORT = re.compile(r"export (\w+)='([^']*)'")
SOURCE = re.compile(r"\. \S+")


def is_left_out(said: str) -> bool:
    """Whether a statement cannot be run here."""
    return any(re.match(pattern, said) for pattern, _ in NOT_RUN)


def meant_here(page: str, said: str, reader: Reader) -> str:
    """A statement of a page, made small, with what stands for it here."""
    statement = small(said)
    for name, pattern, meant in REPLACED:
        if name in (page, "*"):
            statement = re.sub(
                pattern, lambda found, meant=meant: found.expand(meant).format(**reader.values), statement
            )
    return statement


def before(page: str, said: str) -> Iterator[str]:
    """What is done before a statement."""
    for name, pattern, statement in BEFORE:
        if name == page and re.match(pattern, said):
            yield small(statement)


def allowed_codes(words: tuple[str, ...], *, trains: bool) -> set[int]:
    """The exit codes that a call may end with."""
    tables = (FINDINGS, VERDICTS) if trains else (FINDINGS,)
    names = (words[0], " ".join(words[:2]))
    return next((table[name] for table in tables for name in names if name in table), {0})


def perform(statement: str, reader: Reader, *, trains: bool) -> str:
    """Run one statement and return what it printed: the program in this process if it can be, the rest in a shell."""
    if setting := EXPORT.fullmatch(statement):
        reader.monkeypatch.setenv(setting[1], setting[2])
        return ""
    words = words_of(statement)
    is_plain = words is not None and shlex.split(statement, comments=True) == [PROGRAM, *words]
    codes = allowed_codes(words, trains=trains) if words and is_plain else {0}
    if words and is_plain and reader.is_loaded and "--devices" not in words:  # with which it starts itself anew
        printed = StringIO()
        with redirect_stdout(printed):
            code = run(list(words))
        assert code in codes, f"exit code {code}\n{printed.getvalue()}"
        return printed.getvalue()
    script = "\n".join([*reader.settings, statement])
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode in codes, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    if SOURCE.fullmatch(statement):
        reader.settings.append(statement)
    return done.stdout


def header_cells(text: str) -> set[str]:
    """The heads of the columns of all tables in a text."""
    lines = [line for line in text.splitlines() if line.startswith("┃")]
    return {cell.strip() for line in lines for cell in line.strip("┃").split("┃")} - {""}


def follow(page: Path, reader: Reader, root: Path = ROOT) -> list[str]:
    """Do all that a page says, in its order; the statements that were run, as the page has them."""
    name = name_of(page, root)
    trains = name == "docs/start.md" or any(command.words[0] in ("train", "step") for command in commands(page))
    run_here, printed = [], ""
    for block in blocks(page):
        if block.language == "text" and printed:
            missing = header_cells(block.text) - header_cells(printed)
            assert not missing, f"{block.place}: the tables have no column {', '.join(sorted(missing))}"
        if block.language != TYPED:
            continue
        printed = ""
        for said in statements(block.text):
            if is_left_out(said):
                continue
            statement = meant_here(name, said, reader)
            try:
                for first in before(name, said):
                    perform(first, reader, trains=trains)
                printed += perform(statement, reader, trains=trains)
            except (AssertionError, OSError) as error:
                raise AssertionError(f"{block.place}: {said}\n(here: {statement})\n{error}") from error
            run_here.append(said)
    return run_here
