"""What the documentation says to type: the code blocks of its pages, and the commands in them.

1. A block marked `bash` is meant to be typed as it stands, and is run: those of a page one after another, in one folder
   (test_docs_followed.py). A command stands in no other block.
2. A block marked `text` shows what the block above it printed; any other block is there to be read.
3. A command is a line of a block that begins with `edge-ilseg`, behind settings (`NAME=value`) and a prompt (`$`). A
   line that ends in a backslash goes on. What follows a `#`, `|`, `;`, `&&`, `>` belongs to the shell.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PROGRAM = "edge-ilseg"
TYPED = "bash"
SHELL_WORDS = {"|", "||", "&", "&&", ";", ">", ">>", "<", "2>"}
LOOKS_TYPED = re.compile(
    rf"^ *(\$ |# )?(sudo )?([A-Z_]+=\S+ )*({PROGRAM}|make|pip|python3?|torchrun|ssh|scp|git|curl|docker|systemctl) ",
    re.MULTILINE,
)
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>[\w+-]*)(?P<more>[^`\n]*)$")
INLINE = re.compile(rf"`({PROGRAM} [^`]+)`")
HEREDOC = re.compile(r"<<-?\s*'?(\w+)'?")


class Block(NamedTuple):
    """A fenced code block."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return f"{name_of(self.page)}:{self.line}"


class Command(NamedTuple):
    """One call of the program: its words without the program's name."""

    place: str
    words: tuple[str, ...]


def pages() -> tuple[Path, ...]:
    """Every page for users: those beside the README, and all of docs/."""
    return (*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")))


def name_of(page: Path, root: Path = ROOT) -> str:
    """What a page is called: its path from the top of the repository, or all of it where it lies elsewhere."""
    return page.relative_to(root).as_posix() if page.is_relative_to(root) else str(page)


def page_statements(page: Path) -> list[str]:
    """All that a page tells to type, in its order."""
    return [line for block in blocks(page) if block.language == TYPED for line in statements(block.text)]


def strays(page: Path) -> Iterator[str]:
    """What looks typed and stands in a block that nobody runs (rule 1)."""
    for block in blocks(page):
        if block.language != TYPED and (found := LOOKS_TYPED.search(block.text)):
            line = block.text.count("\n", 0, found.start()) + 1
            yield f"{block.place}+{line}: {block.text.splitlines()[line - 1]}"


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, without their indentation."""
    opened: re.Match[str] | None = None
    start, lines = 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = FENCE.match(line)
        if opened is None and fence:
            opened, start, lines = fence, number, []
        elif opened is not None and line.strip() == opened["ticks"]:
            yield Block(page, start, opened["language"], "\n".join(lines))
            opened = None
        elif opened is not None:
            lines.append(line.removeprefix(opened["indent"]))
    if opened is not None:
        raise AssertionError(f"{page}:{start}: the code block is not closed")


def statements(text: str) -> Iterator[str]:
    """What a shell runs one after another: lines joined at their backslashes, with their here-documents."""
    lines = iter(text.splitlines())
    for line in lines:
        while line.endswith("\\"):
            line = line[:-1].rstrip() + " " + next(lines).strip()
        if heredoc := HEREDOC.search(line):
            for more in lines:
                line += "\n" + more
                if more == heredoc[1]:
                    break
        if line.strip() and not line.lstrip().startswith("#"):
            yield line


def words_of(statement: str) -> tuple[str, ...] | None:
    """The words of a call of the program, or None where a line is something else (rule 3)."""
    text = statement.strip().removeprefix("$ ")
    if PROGRAM not in text:
        return None
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    words = list(lexer)
    while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", words[0]):
        del words[0]
    if not words or words[0] != PROGRAM:
        return None
    end = next((index for index, word in enumerate(words) if word in SHELL_WORDS), len(words))
    return tuple(words[1:end])


def commands(page: Path) -> Iterator[Command]:
    """Every call of the program in a page's blocks."""
    for block in blocks(page):
        yield from commands_of(block)


def commands_of(block: Block) -> Iterator[Command]:
    """The calls in one block; output and files have none."""
    if block.language == TYPED:
        for statement in statements(block.text):
            for part in re.split(r"\s(?:&&|\|\||;|\|)\s", statement):
                words = words_of(part)
                if words is not None:
                    yield Command(block.place, words)


def mentions(page: Path) -> Iterator[Command]:
    """Calls of the program that are named in running text, such as `edge-ilseg export --profile`."""
    fenced = {number for block in blocks(page) for number in range(block.line, block.line + block.text.count("\n") + 2)}
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if number not in fenced:
            for text in INLINE.findall(line):
                yield Command(f"{name_of(page)}:{number}", tuple(shlex.split(text)[1:]))
