"""Every command in the documentation is one that the program has, in blocks and in sentences; nothing is run here.

That each does what its page says is for test_docs_followed.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import click
import pytest
from documents import Command, commands, mentions, name_of, pages

from edge_ilseg.cli import group
from edge_ilseg.cli.options import parse_data_text, parse_settings
from edge_ilseg.config import StepConfig, TrainConfig
from edge_ilseg.data import check_kind
from edge_ilseg.devices.device_profile import read_profile
from edge_ilseg.methods import METHODS, resolve_method
from edge_ilseg.models.freezing import parse_freeze

NAMES = {name_of(path): path for path in pages()}


def parse(words: tuple[str, ...]) -> click.Context:
    """Let the real command line parse a call: commands, options, types and choices, and run nothing."""
    context: click.Context | None = None
    command: click.Command = group
    name, rest = "edge-ilseg", list(words)
    while isinstance(command, click.Group):
        context = command.make_context(name, rest, parent=context)
        found, resolved, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert resolved is not None
        assert found is not None
        name, command = found, resolved
    return command.make_context(name, rest, parent=context)


def check_values(params: Mapping[str, Any]) -> None:
    """What click takes for text, and only the command itself would refuse."""
    methods = params.get("method_names") or params.get("method") or ""
    for method in methods.split(","):
        assert method in ("", "all", *METHODS) or method.isupper(), method  # METHOD stands for any of them
    if params.get("kind"):
        check_kind(params["kind"])
    for name in ("data_text", "eval_data_text"):
        if params.get(name):
            parse_data_text(params[name])
    for item in params.get("setting_items") or ():
        parse_settings(StepConfig() if "freeze" in params else TrainConfig(), [item])
    for item in params.get("losses") or ():
        resolve_method("finetune", losses={item.partition("=")[0]: 1.0})
    if params.get("freeze"):
        parse_freeze(params["freeze"])
    for name in ("profile", "profile_name"):
        if params.get(name) and not params[name].endswith(".toml"):
            read_profile(params[name])


@pytest.mark.parametrize("name", NAMES)
def test_every_command_of_a_page_is_understood(name: str) -> None:
    for command in commands(NAMES[name]):
        try:
            check_values(parse(command.words).params)
        except click.exceptions.Exit:  # --help and --version
            pass
        except Exception as error:
            raise AssertionError(f"{command.place}: edge-ilseg {shlex.join(command.words)}: {error}") from error


@pytest.mark.parametrize("name", NAMES)
def test_every_command_that_is_named_in_a_sentence_has_these_options(name: str) -> None:
    for mention in mentions(NAMES[name]):
        check_mention(mention)


def check_mention(mention: Command) -> None:
    """A sentence may leave out arguments and values; the commands and options that it names are there."""
    command: click.Command = group
    options = set()
    for word in mention.words:
        if word.startswith("-"):
            options.add(word)
        elif isinstance(command, click.Group) and word.islower():
            found = command.get_command(click.Context(command), word)
            assert found is not None, f"{mention.place}: there is no command {word!r}"
            command = found
    known = {text for item in command.params for text in (*item.opts, *item.secondary_opts)} | {"--help"}
    assert options <= known, f"{mention.place}: {command.name} has no option {', '.join(sorted(options - known))}"


def test_the_documentation_has_commands_in_all_kinds_of_pages() -> None:
    found = {name: len(list(commands(path))) for name, path in NAMES.items()}
    for name in ("README.md", "docs/int8.md", "docs/remote.md", "docs/tutorial/new-class.md", "docs/how-to/keys.md"):
        assert found[name] >= 3, name
    assert sum(found.values()) > 100
