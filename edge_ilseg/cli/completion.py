"""`edge-ilseg completion`, and the values that a shell can complete.

1. A shell starts this program at every press of the key: nothing heavy is imported, no file is opened, and few folders
   are listed. What cannot be told cheaply is left to the shell.
2. A parameter is completed by its name, in every command alike: `COMPLETERS` says which.
3. Completing never fails and never prints: a folder that cannot be read has no names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

SHELLS = ("bash", "zsh", "fish")
PROGRAM = "edge-ilseg"
VARIABLE = "_EDGE_ILSEG_COMPLETE"
"""Set by the scripts; click completes in the place of running a command where it is."""
MOST_ENTRIES = 500
"""Of one folder that is looked through for bundles."""
BUNDLES_BELOW = 3
"""Folders between what is typed and a bundle, at most: WORKSPACE/bundles/NAME."""


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script that completes commands, options, steps, methods, profiles and bundles in SHELL.

    \b
    eval "$(edge-ilseg completion bash)"                 a line for ~/.bashrc
    eval "$(edge-ilseg completion zsh)"                  a line for ~/.zshrc
    edge-ilseg completion fish | source                  a line for ~/.config/fish/config.fish
    """
    from edge_ilseg.cli import group

    kind = get_completion_class(shell)
    if kind is not None:  # click knows all of SHELLS
        click.echo(kind(group, {}, PROGRAM, VARIABLE).source())


def add_completers(command: click.Command) -> None:
    """Give the parameters of a command, and of the commands in it, their completers (rule 2)."""
    for parameter in command.params:
        complete = COMPLETERS.get(parameter.name or "")
        if complete is not None:
            setattr(parameter, "shell_complete", partial(_complete, complete, parameter.shell_complete))  # noqa: B010
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            add_completers(inner)


Values = Callable[[click.Context, str], Iterable[str]]


def _complete(
    values: Values,
    otherwise: Callable[[click.Context, str], list[CompletionItem]],
    ctx: click.Context,
    incomplete: str,
) -> list[CompletionItem]:
    """What `values` gives and fits; what the parameter itself completes where there is nothing."""
    try:
        found = [CompletionItem(text) for text in values(ctx, incomplete) if text.startswith(incomplete)]
    except OSError:
        found = []
    return found or otherwise(ctx, incomplete)


def steps(ctx: click.Context, _incomplete: str) -> list[str]:
    """Names of the steps of the workspace that the line names, or of this folder."""
    # An option whose value is being typed keeps click from reading the arguments: they are left over.
    folder = Path(ctx.args[0] if ctx.args else ctx.params.get("workspace") or ".") / "steps"
    return sorted(entry.name for entry in _entries(folder) if entry.is_dir() and entry.name[0] != ".")


def methods(_ctx: click.Context, incomplete: str) -> list[str]:
    """Methods; in a list `a,b` the last one."""
    from edge_ilseg.methods import METHODS

    done, comma, _ = incomplete.rpartition(",")
    return [done + comma + name for name in METHODS]


def profiles(_ctx: click.Context, _incomplete: str) -> list[str]:
    """Names of our device profiles."""
    folder = Path(__file__).parents[1] / "devices" / "profiles"
    return sorted(entry.name.removesuffix(".toml") for entry in _entries(folder) if entry.name.endswith(".toml"))


def data_sets(_ctx: click.Context, _incomplete: str) -> list[str]:
    """Kinds of data sets."""
    from edge_ilseg.data import DATASETS

    return list(DATASETS)


def bundles(_ctx: click.Context, incomplete: str) -> list[str]:
    """Bundles at what is typed, or a few folders below."""
    folder, start = os.path.split(incomplete)
    found = _bundles(Path(folder or "."), start, BUNDLES_BELOW)
    return sorted(str(path) if not incomplete.startswith("./") else f"./{path}" for path in found)


def _bundles(folder: Path, start: str, depth: int) -> Iterator[Path]:
    for entry in _entries(folder):
        if not entry.name.startswith(start) or entry.name.startswith(".") or not entry.is_dir():
            continue
        path = folder / entry.name
        if (path / "manifest.json").is_file():
            yield path
        elif depth > 1:
            yield from _bundles(path, "", depth - 1)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """The first of a folder (rule 1); none of one that cannot be read (rule 3)."""
    try:
        with os.scandir(folder) as found:
            return [entry for _, entry in zip(range(MOST_ENTRIES), found, strict=False)]
    except OSError:
        return []


COMPLETERS: dict[str, Values] = {
    "step_name": steps,
    "parent_name": steps,
    "method": methods,
    "method_names": methods,
    "profile": profiles,
    "profile_name": profiles,
    "kind": data_sets,
    "bundle": bundles,
    "bundles": bundles,
    "against": bundles,
    "parent": bundles,
}
"""Name of a parameter -> its values."""
