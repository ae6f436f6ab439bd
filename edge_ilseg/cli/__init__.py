"""The command line: a skin. Parse, one call, print; one error boundary.

1. Nothing heavy is imported before a command runs: `edge-ilseg --help` imports click alone.
2. Results go to standard output, progress and errors to standard error.
3. Exit codes, for every command: 0 done or passed; 1 verify: retention or another limit, doctor: a problem; 2 parity;
   3 everything else that is wrong (input, artefact, environment, usage); 4 verify: too few images to tell; 70 a defect
   of this program, with its traceback; 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from edge_ilseg import __version__
from edge_ilseg.errors import EXIT_ARTEFACT, EXIT_CLOSED_PIPE, EXIT_DEFECT, EXIT_INTERRUPTED, EdgeIlsegError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

COMMANDS: dict[str, tuple[str, str, str]] = {
    # name: module, attribute, one line of help (so that --help need not import the module)
    "init": ("edge_ilseg.cli.workspace", "init", "Make a workspace: which data, which base classes, which network."),
    "data": ("edge_ilseg.cli.data", "data", "Look at a data set and at what each step would see of it."),
    "train": ("edge_ilseg.cli.training", "train", "Train step 0 on the base classes."),
    "step": ("edge_ilseg.cli.training", "step", "Teach the model new classes without the old images."),
    "evaluate": ("edge_ilseg.cli.training", "evaluate", "Score a step: IoU per class, mIoU old / new / all."),
    "statistics": (
        "edge_ilseg.cli.statistics_command",
        "statistics",
        "Collect what an analytic step goes on from, for a step that has none.",
    ),
    "scenario": ("edge_ilseg.cli.scenario", "scenario", "Compare methods over whole scenarios and several seeds."),
    "reproduce": (
        "edge_ilseg.cli.reproduce",
        "reproduce",
        "Run a published experiment on VOC beside its results.",
    ),
    "steps": ("edge_ilseg.cli.workspace", "steps", "List the steps of a workspace."),
    "export": ("edge_ilseg.cli.export", "export", "Make a bundle: ONNX and OpenVINO, fp32, fp16 and int8."),
    "verify": ("edge_ilseg.cli.verify", "verify", "Judge a bundle on this device, without torch."),
    "bench": ("edge_ilseg.cli.bench", "bench", "Measure the models of bundles on this device, in turns."),
    "predict": ("edge_ilseg.cli.predict", "predict", "Run a bundle on images: masks and overlays to look at."),
    "device": ("edge_ilseg.cli.device", "device", "This device: what it is, and the updates of its model."),
    "publish": ("edge_ilseg.cli.publish", "publish", "Send bundles to devices: a signed repository of releases."),
    "fleet": ("edge_ilseg.cli.fleet", "fleet", "All devices, by the reports that they sent."),
    "card": ("edge_ilseg.cli.card", "card", "A model card of a bundle, in Markdown."),
    "doctor": ("edge_ilseg.cli.doctor", "doctor", "Examine this machine and this installation, with the mends."),
    "completion": ("edge_ilseg.cli.completion", "completion", "Print the script that completes commands in a shell."),
    "report": ("edge_ilseg.cli.report", "report", "One HTML file to look at: learned, forgotten, may it go out."),
    "demo": ("edge_ilseg.cli.demo", "demo", "The whole way on generated images, in minutes."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are run (rule 1)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order in which a user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        if ctx.resilient_parsing:  # a shell asks for what could stand here
            from edge_ilseg.cli.completion import add_completers

            add_completers(command)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """What a line can go on with: the commands, without importing them, or the options."""
        from click.shell_completion import CompletionItem

        found = [CompletionItem(name, help=text) for name, (_, _, text) in COMMANDS.items()]
        return [item for item in found if item.value.startswith(incomplete)] + click.Command.shell_complete(
            self, ctx, incomplete
        )

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Add "did you mean" to an unknown command."""
        from edge_ilseg.errors import did_you_mean

        if args and args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            near = did_you_mean(args[0], COMMANDS)
            ctx.fail(f"No such command {args[0]!r}" + (f": {near}" if near else "."))
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="edge-ilseg")
def group() -> None:
    """Teach a deployed segmentation model a new class without the old data, and prove that it forgot nothing.

    \b
    edge-ilseg demo                                   the whole way, on generated images
    edge-ilseg init work --dataset msrc --root DATA --later-classes boat
    edge-ilseg train work && edge-ilseg step work --add-classes boat
    edge-ilseg export work --precision int8 --out boat.bundle
    edge-ilseg verify boat.bundle --data msrc:DATA
    """


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code (rule 3)."""
    try:
        result = group.main(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except click.ClickException as error:
        _show(error)
        return EXIT_ARTEFACT
    except EdgeIlsegError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted: nothing half-done was written", err=True)
        return EXIT_INTERRUPTED
    except SystemExit:  # click's, where nobody reads on; its 1 would be the verdict "it forgot"
        return EXIT_CLOSED_PIPE
    except (OSError, MemoryError) as error:
        told = EdgeIlsegError(
            "this machine did not do what was asked of it",
            where=getattr(error, "filename", None),
            found=getattr(error, "strerror", None) or str(error) or "out of memory",
            hint="look at permissions, free space and memory, and run the same command again",
        )
        click.echo(f"error: {told}", err=True)
        return EXIT_ARTEFACT
    except Exception:  # noqa: BLE001 - a defect: Python's own exit code, 1, would read as the verdict "it forgot"
        import traceback

        traceback.print_exc()
        click.echo("error: this is a defect of edge-ilseg: please report it with the lines above", err=True)
        return EXIT_DEFECT
    return result if isinstance(result, int) else 0


def _show(error: click.ClickException) -> None:
    """What click has against a command line, in the style of our own errors."""
    ctx = getattr(error, "ctx", None)
    if not isinstance(error, click.UsageError) or ctx is None or error.message == ctx.get_help():
        error.show()  # the last: a group without a command shows its help
        return
    ours = EdgeIlsegError(error.format_message(), where=ctx.command_path, hint=f"{ctx.command_path} --help")
    click.echo(f"error: {ours}", err=True)


def main() -> None:
    """Entry point of the command `edge-ilseg`."""
    sys.exit(run())
