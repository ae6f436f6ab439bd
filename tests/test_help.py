"""Every command and group says what it does, with an example that can be typed."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import click
import pytest

from edge_ilseg.cli import COMMANDS, group, run

LONGEST_EXAMPLE = 116
"""What a line of source has room for; such lines are never wrapped."""


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command and group below, with the words that call it."""
    yield path, command
    if isinstance(command, click.Group):
        ctx = click.Context(command)
        for name in command.list_commands(ctx):
            inner = command.get_command(ctx, name)
            assert inner is not None
            yield from commands(inner, (*path, name))


TREE = dict(commands(group))


def examples(command: click.Command) -> list[str]:
    """The lines of its help that are command lines."""
    blocks = (command.help or "").split("\b\n")[1:]
    return [line.strip() for block in blocks for line in block.split("\n\n")[0].splitlines() if "edge-ilseg" in line]


def test_the_whole_tree_is_walked() -> None:
    assert {path[0] for path in TREE if path} == set(COMMANDS)
    assert {("device", "run"), ("publish", "rotate-key"), ("fleet", "report"), ("scenario", "run")} <= set(TREE)


@pytest.mark.parametrize("path", TREE, ids=" ".join)
def test_every_command_says_what_it_does_and_has_an_example(path: tuple[str, ...]) -> None:
    command = TREE[path]
    first = (command.help or "").strip().split("\n\n")[0]
    assert first.endswith((".", "?")), f"{path}: no sentence at the top of its help: {first!r}"
    called = [line for line in examples(command) if line.startswith(" ".join(("edge-ilseg", *path)))]
    if path == ("completion",):  # a line for a shell's own file
        called = examples(command)
    assert called, f"edge-ilseg {' '.join(path)}: no example in its help"
    assert max(map(len, called), default=0) <= LONGEST_EXAMPLE


@pytest.mark.parametrize(
    "path", [path for path, command in TREE.items() if not isinstance(command, click.Group)], ids=" ".join
)
def test_every_option_of_an_example_is_one_of_the_command(path: tuple[str, ...]) -> None:
    known = {name for parameter in TREE[path].params for name in (*parameter.opts, *parameter.secondary_opts)}
    for line in examples(TREE[path]):
        start = ["edge-ilseg", *path]
        words = shlex.split(line.replace("\\", " ").split("   ")[0])
        if words[: len(start)] == start:
            given = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert given <= known, line


@pytest.mark.parametrize("path", TREE, ids=" ".join)
def test_every_option_is_explained(path: tuple[str, ...]) -> None:
    for parameter in TREE[path].params:
        if isinstance(parameter, click.Option):
            assert parameter.help or parameter.metavar or isinstance(parameter.type, click.Choice), parameter.name


@pytest.mark.parametrize(
    ("words", "what", "where"),
    [
        (["verify"], "Missing argument 'BUNDLE'.", "verify"),
        (["bench", "x", "--rounds", "0"], "Invalid value for '--rounds'", "bench"),
        (["device", "confrm"], "No such command 'confrm'", "device"),
        (["step", "--no-such-option"], "No such option", "step"),
        (["verfy"], "did you mean 'verify'", ""),
    ],
)
def test_wrong_usage_is_told_in_the_style_of_every_error(
    words: list[str], what: str, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == 3
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ")
    assert what in first
    assert rest[0].startswith("  where:    ")
    assert rest[0].endswith(where)
    assert rest[-1].endswith(f"{where} --help")
    assert rest[-1].startswith("  do:       ")


def test_a_group_without_a_command_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["device"]) == 3
    assert capsys.readouterr().err.startswith("Usage: ")
