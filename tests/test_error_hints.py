"""Every error that a user can meet says what to do next, and what it names is there to be used.

1. Whoever makes an `EdgeIlsegError` gives it a hint, or its class has one for all of them (`default_hint`). A hint may
   come from elsewhere, but not be one that is missing at times: no `None` in any branch, no bare `did_you_mean`.
2. Commands and options that a hint names are those of the command line. A hint is followed from its name to where its
   text is written: in this module or another, in a table, in what a function returns. What is filled in is an X.
3. A hint is one line that goes on after `do:`: it begins small, and ends without a full stop.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
from documents import Command
from test_docs_commands import check_mention
from test_help import TREE

ROOT = Path(__file__).parents[1]
FOLDERS = ("edge_ilseg", "export", "devices", "calibration")
OTHER_PROGRAMS = {"--force-reinstall": "pip", "--nproc-per-node": "torchrun"}
"""Options in hints that are none of ours."""
PROSE = ("on", "here", "and")
"""Words behind `edge-ilseg` that make it the program itself: `update edge-ilseg on this device`."""


def modules() -> Iterator[Path]:
    """Every module, once: the links in edge_ilseg/ lead to the other folders."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(parent.is_symlink() for parent in path.parents):
                yield path


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in modules()}


def last_name(node: ast.expr) -> str:
    return ast.unparse(node).rpartition(".")[2]


def error_classes() -> dict[str, bool]:
    """Every class of errors for users, and whether it has a hint of its own or of a class above."""
    defined = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    found = {"EdgeIlsegError": False}
    while True:
        new = {
            node.name: any(found.get(last_name(base), False) for base in node.bases)
            or any(isinstance(item, ast.Assign) and last_name(item.targets[0]) == "default_hint" for item in node.body)
            for node in defined
            if node.name not in found and any(last_name(base) in found for base in node.bases)
        }
        if not new:
            return found
        found |= new


CLASSES = error_classes()


class Made(NamedTuple):
    """An error, where it is made."""

    path: Path
    call: ast.Call

    @property
    def place(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.call.lineno}"

    @property
    def hint(self) -> ast.expr | None:
        return next((keyword.value for keyword in self.call.keywords if keyword.arg == "hint"), None)


def errors_in(path: Path, tree: ast.AST) -> Iterator[Made]:
    """Every error that is made in a module, and every class that is raised without being called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and last_name(node.func) in CLASSES:
            yield Made(path, node)
        is_class = isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name | ast.Attribute)
        if is_class and last_name(node.exc) in CLASSES:
            yield Made(path, ast.copy_location(ast.Call(node.exc, [], []), node))


ERRORS = [made for path, tree in TREES.items() for made in errors_in(path, tree)]


def may_be_none(hint: ast.expr | None) -> bool:
    """Whether a hint is missing, or can be seen to be missing at times."""
    match hint:
        case None | ast.Constant(value=None):
            return True
        case ast.Call(func=function):
            return last_name(function) == "did_you_mean"
        case ast.IfExp(body=one, orelse=other):
            return may_be_none(one) or may_be_none(other)
        case ast.BoolOp(op=ast.Or(), values=values):
            return may_be_none(values[-1])
        case ast.BoolOp(op=ast.And()):
            return True
    return False


def test_every_error_says_what_to_do() -> None:
    without = [made.place for made in ERRORS if may_be_none(made.hint) and not CLASSES[last_name(made.call.func)]]
    assert without == []


@pytest.mark.parametrize(
    "text",
    [
        "DataError('x')",
        "raise DataError",
        "errors.DataError('x', hint=None)",
        "DataError('x', hint=did_you_mean(name, names))",
        "DataError('x', hint='give it' if full else None)",
        "DataError('x', hint=hint and plain(hint))",
    ],
)
def test_an_error_without_a_hint_is_found(text: str) -> None:
    (made,) = errors_in(ROOT, ast.parse(text))
    assert may_be_none(made.hint)


def test_all_modules_and_classes_are_looked_at() -> None:
    assert len(TREES) > 200
    assert len(ERRORS) > 450
    assert {name for name, has_hint in CLASSES.items() if has_hint} == {
        "PackError",
        "TransportError",
        "_WrongChunkError",
    }
    assert {"RemoteError", "ParityError", "NotFiniteError", "TrainingError"} <= set(CLASSES)


# The texts of hints.


def named(tree: ast.AST) -> dict[str, list[ast.expr]]:
    """What a module gives names to: values that are assigned or gone through, and what functions return."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=targets, value=value):
                pairs = [(target, value) for target in targets]
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                pairs = [(target, value)]
            case ast.For(target=target, iter=value) | ast.comprehension(target=target, iter=value):
                pairs = [(target, value)]
            case ast.FunctionDef(name=name):
                returned = [item.value for item in ast.walk(node) if isinstance(item, ast.Return) and item.value]
                found.setdefault(name, []).extend(returned)
                continue
            case _:
                continue
        for target, value in pairs:
            for place, item in _unpacked(target, value):
                found.setdefault(place, []).append(item)
    return found


def _unpacked(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple):
        fits = isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts)
        for number, item in enumerate(target.elts):
            column = ast.Subscript(value, ast.Constant(number), ast.Load())
            yield from _unpacked(item, value.elts[number] if fits else column)


NAMES = {path: named(tree) for path, tree in TREES.items()}


@cache
def everywhere(name: str) -> tuple[tuple[Path, ast.expr], ...]:
    """A constant of some module, for one that has imported it."""
    return tuple((path, value) for path, names in NAMES.items() for value in names.get(name, ()) if name.isupper())


def values_of(path: Path, name: str) -> tuple[tuple[Path, ast.expr], ...]:
    """What a name stands for in a module."""
    return tuple((path, value) for value in NAMES.get(path, {}).get(name, ())) or everywhere(name)


def texts(path: Path, node: ast.expr, seen: frozenset[str] = frozenset()) -> list[str]:
    """The texts that an expression may be (rule 2)."""
    match node:
        case ast.Constant(value=str() as text):
            return [text]
        case ast.Constant():
            return []
        case ast.JoinedStr(values=parts):
            found = [texts(path, part, seen) for part in parts]
            return ["".join(choice) for choice in product(*found)]
        case ast.FormattedValue(value=ast.Name(id=name) as value) if name.isupper():
            return texts(path, value, seen)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return ["".join(choice) for choice in product(texts(path, left, seen), texts(path, right, seen))]
        case ast.IfExp(body=one, orelse=other):
            return texts(path, one, seen) + texts(path, other, seen)
        case ast.BoolOp(values=items) | ast.Tuple(elts=items) | ast.List(elts=items) | ast.Dict(values=items):
            return [text for item in items for text in texts(path, item, seen)]
        case ast.Call(func=ast.Attribute(attr="format" | "get", value=value)):
            return texts(path, value, seen)
        case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=int() as column)):
            tables = [(place, row) for place, table in values_of(path, name) for row in getattr(table, "elts", ())]
            cells = [(place, row.elts[column]) for place, row in tables if isinstance(row, ast.Tuple)]
            return [text for place, cell in cells for text in texts(place, cell, seen)]
        case ast.Subscript(value=ast.Name(id=name) as value) if name.isupper():
            return texts(path, value, seen)
        case ast.Call(func=ast.Name(id=name)) | ast.Name(id=name) | ast.Attribute(attr=name):
            found_at = () if name in seen else values_of(path, name)
            return [text for place, value in found_at for text in texts(place, value, seen | {name})] or ["X"]
    return ["X"]


def hints() -> Iterator[tuple[str, str]]:
    """Every text of a hint and its place: of an error, of what makes errors of it (`parse_versioned`), of a class."""
    for path, tree in TREES.items():
        given = [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "hint"]
        for value in (*(node.value for node in given), *NAMES[path].get("default_hint", ())):
            for text in texts(path, value):
                yield f"{path.relative_to(ROOT)}:{value.lineno}", text


HINTS = sorted(set(hints()))
OPTIONS = {text for command in TREE.values() for item in command.params for text in (*item.opts, *item.secondary_opts)}


def calls(hint: str) -> Iterator[list[str]]:
    """The calls of the program that a hint names, each up to the next one or the next sign of punctuation."""
    for part in re.split(r"\bedge-ilseg ", hint)[1:]:
        words = re.split(r"[;:,`()]", part)[0].split()
        if words and words[0] not in PROSE:
            yield words


def check_hint(hint: str, place: str) -> None:
    """Rule 2."""
    for words in calls(hint):
        check_mention(Command(place, tuple(words)))
    for option in re.findall(r"(?<![\w-])--[a-z0-9][a-z0-9-]*", hint):
        known = option in (*OPTIONS, *OTHER_PROGRAMS, "--help")
        is_beginning = option.endswith("-") and any(name.startswith(option) for name in OPTIONS)
        assert known or is_beginning, f"{place}: no command has an option {option}: {hint!r}"


def test_every_command_and_option_of_a_hint_is_there() -> None:
    for place, hint in HINTS:
        check_hint(hint, place)


@pytest.mark.parametrize(
    "hint",
    [
        "first: edge-ilseg devise run",
        "edge-ilseg device rum fetches it again",
        "give the images (edge-ilseg verify --dta KIND:ROOT)",
        "see `edge-ilseg publish state`",
        "raise --calibration-imagez",
        "edge-ilseg verify --json, or edge-ilseg verify --plot",
    ],
)
def test_a_hint_with_what_is_not_there_is_found(hint: str) -> None:
    with pytest.raises(AssertionError):
        check_hint(hint, "here")


@pytest.mark.parametrize(
    "hint",
    [
        "edge-ilseg device run fetches it again",  # a constant of another module
        "edge-ilseg device run mends it from the slots; edge-ilseg device init BUNDLE sets a device up",  # filled in
        "see whether sshd runs there, and on which port",  # a column of a table
        "let the server give it to everybody: what is signed needs no login, and a device keeps none",  # by a function
        "fetch or publish the pack again; the model in use goes on running",  # of a class
        "any command of `edge-ilseg device` puts its copy in its place, and says so",  # given to what raises the error
    ],
)
def test_a_hint_is_followed_to_where_it_is_written(hint: str) -> None:
    assert hint in {text for _, text in HINTS}


def test_most_hints_are_read() -> None:
    assert len(HINTS) > 450
    assert sum(text == "X" for _, text in HINTS) < 40  # rebuilt from another error, or a name that was meant


def test_hints_are_written_in_one_style() -> None:
    for place, hint in HINTS:
        assert "\n" not in hint, f"{place}: more than one line: {hint!r}"
        assert not hint.endswith(".") or hint.endswith("..."), f"{place}: a full stop at the end: {hint!r}"
        assert not re.match(r"[A-Z][a-z]", hint), f"{place}: a capital at the start: {hint!r}"
