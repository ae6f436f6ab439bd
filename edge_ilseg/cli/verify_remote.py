"""`edge-ilseg verify --on`: the same command on other devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from edge_ilseg.cli.options import parse_data_text
from edge_ilseg.errors import ConfigError

if TYPE_CHECKING:
    from edge_ilseg.data.dataset import Dataset
    from edge_ilseg.devices.remote import Job, Outcome, RemoteSettings
    from edge_ilseg.devices.ssh import Device
    from edge_ilseg.progress import ProgressCallback

DEFAULT_PYTHON, DEFAULT_FOLDER = "python3", "~/.cache/edge-ilseg/remote"
"""As in `edge_ilseg.devices.remote_store`, whose import would make every `verify` start later."""
REMOTE_PARAMETERS = frozenset({"on", "ssh_option_items", "remote_pythons", "remote_folders"})
PLACED_PARAMETERS = frozenset({"bundle", "against", "data_text", "split", "profile_name", "as_json", "out"})
"""Those whose values are other ones on the device, or which are for here; every other one is forwarded as it was given.
"""


def remote_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `REMOTE_PARAMETERS`."""
    for option in reversed(
        (
            click.option(
                "--on",
                multiple=True,
                metavar="ssh://[USER@]HOST[:PORT]",
                help="Verify on that device; may be repeated.",
            ),
            click.option(
                "--ssh-option", "ssh_option_items", multiple=True, metavar="KEY=VALUE", help="For ssh: -o KEY=VALUE."
            ),
            click.option(
                "--remote-python",
                "remote_pythons",
                multiple=True,
                metavar="PATH",
                help=f"The device's Python with edge-ilseg; once for all, or once for each --on.  [{DEFAULT_PYTHON}]",
            ),
            click.option(
                "--remote-folder",
                "remote_folders",
                multiple=True,
                metavar="PATH",
                help=f"Where the device keeps files; once for all, or for each --on.  [{DEFAULT_FOLDER}]",
            ),
        )
    ):
        command = option(command)
    return command


def verify_remotely(
    ctx: click.Context, dataset: Dataset | None, split: str | None, limits: Mapping[str, float | None]
) -> int:
    """Run the command of `ctx` on the devices that it names, show what they say, and return the exit code.

    Args:
        ctx: of `edge-ilseg verify`.
        dataset: labelled images, opened here.
        split: which of them.
        limits: those that were given, by name in `Limits`; None: not given.

    Raises:
        ConfigError: an option cannot be used.
        BundleError: a bundle cannot be read here.
        RemoteError: there is one device, and it gave no report.
    """
    import msgspec

    from edge_ilseg.cli.progress_bar import progress_bar
    from edge_ilseg.devices.limits import Limits
    from edge_ilseg.devices.remote import verify_on_devices
    from edge_ilseg.devices.verdicts import check_limits

    devices = _devices(ctx.params)
    check_limits(
        msgspec.convert({name: value for name, value in limits.items() if value is not None}, Limits),
        has_images=dataset is not None,
        has_parent=ctx.params["against"] is not None,
        has_unlabelled=ctx.params["images"] is not None,
    )
    with progress_bar("verify") as progress:
        job = _job(ctx, dataset, split, progress)
        outcomes = verify_on_devices(devices, job, progress)
    return _show(outcomes, as_json=ctx.params["as_json"], out=ctx.params["out"])


def _devices(params: Mapping[str, Any]) -> list[tuple[Device, RemoteSettings]]:
    from edge_ilseg.devices.remote import RemoteSettings
    from edge_ilseg.devices.ssh import check_remote_path, parse_device, parse_ssh_option

    if not params["on"]:
        raise ConfigError(
            "--ssh-option, --remote-python and --remote-folder are for another device, and none is given",
            hint="add --on ssh://USER@HOST",
        )
    ssh_options = tuple(parse_ssh_option(item) for item in params["ssh_option_items"])
    devices = [parse_device(text) for text in params["on"]]
    pythons = _one_each("--remote-python", params["remote_pythons"], DEFAULT_PYTHON, len(devices))
    folders = _one_each("--remote-folder", params["remote_folders"], DEFAULT_FOLDER, len(devices))
    found = []
    for device, python, folder in zip(devices, pythons, folders, strict=True):
        check_remote_path(python, "--remote-python")
        check_remote_path(folder, "--remote-folder")
        found.append((device, RemoteSettings(python, folder, ssh_options)))
    for place, item in enumerate(found):
        if item in found[:place]:
            raise ConfigError("a device is given twice", where="--on", found=item[0], hint="name each device once")
    return found


def _one_each(option: str, values: tuple[str, ...], default: str, count: int) -> tuple[str, ...]:
    """One value for each device."""
    if len(values) == count:
        return values
    if len(values) > 1:
        raise ConfigError(
            "there is not one value for each device",
            where=option,
            found=f"{len(values)} values and {count} devices",
            expected="one for all, or as many as --on, in the same order",
            hint=f"give {option} once, or {count} times",
        )
    return (values or (default,)) * count


def _job(ctx: click.Context, dataset: Dataset | None, split: str | None, progress: ProgressCallback) -> Job:
    """The verification as the devices are to run it, and the files for it."""
    from edge_ilseg.devices.remote import Job, Placed
    from edge_ilseg.devices.remote_files import FilesNeeded, bundle_files, data_files, hash_files

    params = ctx.params
    needed: list[FilesNeeded] = [bundle_files(params["bundle"], "bundle")]
    arguments: list[str | Placed] = ["verify", Placed("", "bundle"), "--json"]
    places = {"bundle": str(params["bundle"])}
    if params["against"] is not None:
        needed.append(bundle_files(params["against"], "parent"))
        arguments.append(Placed("--against=", "parent"))
        places["parent"] = str(params["against"])
    if dataset is not None and split is not None:
        data = parse_data_text(params["data_text"])
        if data.root is None:
            arguments.append(f"--data={data.kind}:")
        else:
            needed.append(data_files(data.kind, Path(data.root), dataset, split, params["max_images"]))
            arguments.append(Placed(f"--data={data.kind}:", "data"))
            places["data"] = data.root
        arguments.append(f"--split={split}")
    profile: str | None = params["profile_name"]
    if profile is not None and profile.endswith(".toml"):
        place = f"profile/{Path(profile).name}"
        needed.append(FilesNeeded(((Path(profile), place),), ()))
        arguments.append(Placed("--profile=", place))
        places[place] = profile
    elif profile is not None:
        arguments.append(f"--profile={profile}")
    folders = tuple(folder for item in needed for folder in item.folders)
    return Job(hash_files(needed, progress), folders, (*arguments, *_forwarded(ctx)), places)


def _forwarded(ctx: click.Context) -> list[str]:
    """The options that were given and mean the same on a device, as words of a command line."""
    images = ctx.params["images"]
    if images is not None and not images.is_absolute():
        raise ConfigError(
            "with --on, the folder of --images is one on the device",
            where="--images",
            found=images,
            expected="an absolute path, the same on every device",
            hint="give the folder of the device's camera, such as /var/camera",
        )
    words = []
    for parameter in ctx.command.params:
        name = parameter.name or ""
        is_given = ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if not is_given or name in REMOTE_PARAMETERS | PLACED_PARAMETERS:
            continue
        value = ctx.params[name]
        if isinstance(value, bool):
            words += parameter.opts[:1] if value else parameter.secondary_opts[:1]
        else:
            words += [f"{parameter.opts[0]}={item}" for item in (value if isinstance(value, tuple) else (value,))]
    return words


def _show(outcomes: tuple[Outcome, ...], *, as_json: bool, out: Path | None) -> int:
    """Print one report like that of a local run, or a table over devices; write the same as JSON to `out`."""
    from rich.console import Console

    from edge_ilseg.devices.remote_table import device_table, encode_outcomes, gravest
    from edge_ilseg.devices.verdict_table import verdict_table
    from edge_ilseg.devices.verify_report import encode_report
    from edge_ilseg.files import write_bytes

    for outcome in outcomes:
        if outcome.copied is not None:
            click.echo(f"{outcome.device}: {outcome.copied}", err=True)
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    first = outcomes[0]
    if len(outcomes) == 1 and first.error is not None:
        raise first.error
    report = first.report if len(outcomes) == 1 else None
    encoded = encode_outcomes(outcomes) if report is None else encode_report(report)
    if out is not None:
        write_bytes(out, encoded)
    if as_json:
        click.echo(encoded)
    elif report is not None:
        console.print(verdict_table(report))
    else:
        console.print(device_table(outcomes))
    return gravest(outcome.exit_code for outcome in outcomes)
