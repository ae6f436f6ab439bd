"""`edge-ilseg device init | check | fetch | stage | gate | activate | confirm | …`: the update agent by hand.

Every command can be run again at any time, after a kill too: what was done stays done, what was half-done is finished.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_ilseg.cli.json_option import json_option, print_json
from edge_ilseg.errors import EXIT_ARTEFACT

if TYPE_CHECKING:
    from edge_ilseg.devices.update.agent import Agent, Outcome

DEFAULT_ROOT = "/var/lib/edge-ilseg"

root_option = click.option(
    "--root",
    type=click.Path(path_type=Path),
    default=DEFAULT_ROOT,
    envvar="EDGE_ILSEG_ROOT",
    show_default=True,
    show_envvar=True,
    help="Folder of this device's models and state.",
)


def _stage_command(name: str, help_text: str, act: Callable[[Agent], Outcome]) -> click.Command:
    """A command that does one stage and says what came of it."""

    @click.command(name, help=f"{help_text}\n\n\b\nedge-ilseg device {name}\nedge-ilseg device {name} --json")
    @root_option
    @json_option
    @click.pass_context
    def command(ctx: click.Context, root: Path, as_json: bool) -> None:
        outcome = _with_agent(root, act)
        _print(outcome, as_json)
        ctx.exit(outcome.exit_code)

    return command


check = _stage_command("check", "Look for a release for this device.", lambda agent: agent.check())
fetch = _stage_command(
    "fetch", "Fetch the bytes that this device lacks; goes on where it was cut.", lambda a: a.fetch()
)
stage = _stage_command("stage", "Put the new model together beside the old one, and read it back.", lambda a: a.stage())
gate = _stage_command(
    "gate", "Prove on this device that the new model has forgotten nothing (exit code 1: refused).", lambda a: a.gate()
)
activate = _stage_command("activate", "Switch to the model that has passed, on trial.", lambda agent: agent.activate())
gc = _stage_command("gc", "Remove models and downloads that nothing needs.", lambda agent: agent.collect())


@click.command()
@root_option
@click.option("--force", is_flag=True, help="Confirm whatever the application has seen so far.")
@json_option
@click.pass_context
def confirm(ctx: click.Context, root: Path, force: bool, as_json: bool) -> None:
    """End the trial by what the application has seen: confirm, go back, or wait on.

    \b
    edge-ilseg device confirm
    edge-ilseg device confirm --force
    """
    outcome = _with_agent(root, lambda agent: agent.confirm(force=force))
    _print(outcome, as_json)
    ctx.exit(outcome.exit_code)


@click.command()
@root_option
@click.option("--reason", default="by hand", show_default=True, help="Kept in the history and reported.")
@json_option
def rollback(root: Path, reason: str, as_json: bool) -> None:
    """Go back to the model before this one; this release is not taken again.

    \b
    edge-ilseg device rollback --reason "no boats at night"
    """
    _print(_with_agent(root, lambda agent: agent.roll_back(reason)), as_json)


@click.command()
@root_option
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--repository", required=True, help="http(s) URL or folder of the publisher's repository.")
@click.option(
    "--trust",
    type=click.Path(path_type=Path),
    help="The publisher's root metadata. Default: metadata/1.root.json of a repository that is a folder.",
)
@click.option("--device-id", help="Of this device in the fleet. Default: the host's name.")
@click.option("--group", default="", help="For roll-outs to some groups.")
@click.option("--reports", help="URL that reports are posted to, or a folder.")
@click.option("--data", help="Labelled images that a release is judged by, as KIND:ROOT.")
@click.option("--images", help="Folder of this device's frames, without labels.")
@json_option
def init(
    root: Path,
    bundle: Path,
    repository: str,
    trust: Path | None,
    device_id: str | None,
    group: str,
    reports: str | None,
    data: str | None,
    images: str | None,
    as_json: bool,
) -> None:
    """Set this device up with the BUNDLE that it is delivered with.

    \b
    edge-ilseg device init base.bundle --root /var/lib/edge-ilseg --repository https://models.example/fleet \\
        --trust 1.root.json --group lab --images /var/lib/camera/frames --reports https://fleet.example/reports
    """
    import platform

    from edge_ilseg.cli.progress_bar import progress_bar
    from edge_ilseg.devices.update.agent_config import make_agent_config
    from edge_ilseg.devices.update.agent_setup import read_bootstrap, set_up

    gate = {key: value for key, value in (("data", data), ("images", images)) if value is not None}
    table: dict[str, Any] = {"repository": repository, "device_id": device_id or platform.node(), "group": group}
    if reports is not None:
        table["reports"] = reports
    config = make_agent_config({**table, "gate": gate}, Path.cwd() / "options of device init")
    bootstrap = read_bootstrap(trust, config.repository)
    with progress_bar("init") as progress:
        state = set_up(root, config, bundle, bootstrap, progress=progress)
    if as_json:
        print_json(state)
        return
    click.echo(f"set up: {root / 'current'} names {state.active.content_id[:12]}, the model of {bundle}")
    if not gate:
        click.echo(
            "note: a release is judged by images that the publisher ships with it alone; "
            f"give this device images of its own in {root / 'agent.toml'}: [gate] data or images",
            err=True,
        )


@click.command()
@root_option
@json_option
@click.pass_context
def run(ctx: click.Context, root: Path, as_json: bool) -> None:
    """One whole pass, for a timer: watch or look, fetch, stage, prove, switch, report.

    \b
    edge-ilseg device run --root /var/lib/edge-ilseg
    edge-ilseg device units --root /var/lib/edge-ilseg --out /etc/systemd/system     a timer for it
    """
    from edge_ilseg.devices.update.agent_run import run_pass

    result = _with_agent(root, run_pass)
    if as_json:
        print_json(result)
    else:
        for outcome in result.outcomes:
            _print(outcome, as_json)
        for problem in result.problems:
            click.echo(f"not now: {problem}", err=True)
    ctx.exit(result.exit_code)


@click.command(name="import")
@root_option
@click.argument("repository", metavar="DIR", type=click.Path(path_type=Path))
@json_option
@click.pass_context
def import_release(ctx: click.Context, root: Path, repository: Path, as_json: bool) -> None:
    """Take a release from a copy of the repository: a USB stick, a mounted share. Check, fetch and stage.

    \b
    edge-ilseg device import /media/stick/models
    """
    from edge_ilseg.devices.update.agent_run import import_from

    result = _with_agent(root, lambda agent: import_from(agent, repository))
    if as_json:
        print_json(result)
    else:
        for outcome in result.outcomes:
            _print(outcome, as_json)
    ctx.exit(result.exit_code)


@click.command()
@root_option
@json_option
def status(root: Path, as_json: bool) -> None:
    """What runs, what is on its way, what was refused, and what happened last.

    \b
    edge-ilseg device status
    edge-ilseg device status --json
    """
    from edge_ilseg.devices.update.agent_status import read_status

    found = read_status(root)
    if as_json:
        print_json(found)
        return
    from edge_ilseg.cli.device_tables import status_tables
    from edge_ilseg.cli.tables import print_table

    for table in status_tables(found):
        print_table(table)


@click.command()
@root_option
@json_option
def report(root: Path, as_json: bool) -> None:
    """Send the reports that were not delivered yet. What cannot be delivered now is kept; the exit code is then 3.

    \b
    edge-ilseg device report
    """
    from edge_ilseg.devices.update.agent_config import read_agent_config
    from edge_ilseg.devices.update.agent_run import send_reports

    sent = send_reports(root, read_agent_config(root))
    if as_json:
        print_json(sent)
    else:
        click.echo(sent.message)
    if sent.problem is not None:
        click.echo(f"not now: {sent.problem}", err=True)
        raise click.exceptions.Exit(EXIT_ARTEFACT)


@click.command()
@root_option
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Where they go, such as /etc/systemd/system."
)
@click.option("--program", help="The command. Default: edge-ilseg of this installation.")
def units(root: Path, out: Path, program: str | None) -> None:
    """Write the systemd service and timer that run the agent.

    \b
    edge-ilseg device units --out /etc/systemd/system
    systemctl daemon-reload && systemctl enable --now edge-ilseg-update.timer
    """
    from edge_ilseg.devices.update.units import write_units

    for path in write_units(out, root, program):
        click.echo(path)


def _with_agent(root: Path, act: Callable[[Agent], Any]) -> Any:
    from edge_ilseg.cli.progress_bar import progress_bar
    from edge_ilseg.devices.update.agent import Agent
    from edge_ilseg.devices.update.agent_config import read_agent_config

    config = read_agent_config(root)
    with progress_bar("update") as progress:
        return act(Agent(root, config, progress=progress))


def _print(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        print_json(outcome)
        return
    for note in outcome.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"{outcome.command}: {outcome.message}")


COMMANDS = (
    init,
    check,
    fetch,
    stage,
    gate,
    activate,
    confirm,
    rollback,
    run,
    status,
    report,
    gc,
    import_release,
    units,
)
