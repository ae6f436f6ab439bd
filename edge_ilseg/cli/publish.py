"""`edge-ilseg publish`: the publisher's repository. What it does is in `edge_ilseg.publishing`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_ilseg.cli.json_option import json_option
from edge_ilseg.cli.options import LIMIT
from edge_ilseg.errors import UpdateError

if TYPE_CHECKING:
    from edge_ilseg.devices.limits import Limits
    from edge_ilseg.devices.update.release import WatchLimits
    from edge_ilseg.publishing.keys import KeyRing

DAYS = click.IntRange(min=1, max=36_500)
PERCENT = click.FloatRange(min=0, max=100)
POSITIVE = click.IntRange(min=1)

repository_argument = click.argument("repository", metavar="REPO", type=click.Path(path_type=Path))
keys_option = click.option(
    "--keys",
    "key_folders",
    multiple=True,
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where private keys are; may be repeated, new ones go to the first.  [REPO.keys]",
)


@click.group()
def publish() -> None:
    """Send bundles to devices: a signed repository of static files, for any web server, CDN or USB stick.

    \b
    edge-ilseg publish init models                                  once: keys, and an empty repository
    edge-ilseg publish add models boat.bundle --rollout 10          a tenth of the devices
    edge-ilseg publish rollout models 1 --percent 100               all of them
    edge-ilseg publish halt models 1 --reason "boats at night"      no more of them
    edge-ilseg publish refresh models                               every few days: signatures expire
    edge-ilseg publish status models

    Private keys are files in REPO.keys, encrypted with the passphrase in EDGE_ILSEG_KEY_PASSPHRASE, or come as PEM from
    EDGE_ILSEG_KEY_TARGETS, EDGE_ILSEG_KEY_SNAPSHOT, EDGE_ILSEG_KEY_TIMESTAMP and EDGE_ILSEG_KEY_ROOT_1, _2, ...
    """


@publish.command()
@repository_argument
@keys_option
@click.option("--unencrypted-keys", is_flag=True, help="Write private keys without a passphrase.")
@click.option("--root-days", type=DAYS, default=365, show_default=True, help="How long signatures of the root hold.")
@click.option("--targets-days", type=DAYS, default=90, show_default=True, help="... of the list of releases.")
@click.option("--snapshot-days", type=DAYS, default=30, show_default=True, help="... of the snapshot.")
@click.option("--timestamp-days", type=DAYS, default=7, show_default=True, help="... of the timestamp.")
def init(repository: Path, key_folders: tuple[Path, ...], unencrypted_keys: bool, **days: int) -> None:
    """Make keys, and an empty repository in the folder REPO.

    Three root keys, of which two must sign, and one key for each other role. Move the root keys to two or three places
    that are not this machine: they are needed to replace a key, and once a year.

    \b
    edge-ilseg publish init models
    edge-ilseg publish init models --keys /media/keys --timestamp-days 14
    """
    from edge_ilseg.publishing.keys import check_publisher

    check_publisher()
    from edge_ilseg.publishing.releases import init_repository
    from edge_ilseg.publishing.state import ExpiryDays

    ring = _ring(repository, key_folders, unencrypted=unencrypted_keys)
    lengths = ExpiryDays(**{name.removesuffix("_days"): value for name, value in days.items()})
    init_repository(repository, ring, _now(), lengths)
    click.echo(f"repository: {repository}  (serve this folder)")
    click.echo(f"keys:       {ring.folders[0]}  (never serve this one; move root-*.pem off this machine)")
    click.echo(f"bootstrap:  {repository / 'metadata' / '1.root.json'}  (give it to devices by a way that you trust)")


def limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What a device must see kept before a model goes on trial, by the names that `verify` gives them."""
    for option in reversed(
        (
            click.option("--max-old-drop", type=LIMIT, help="Points of old-class mIoU that may be lost.  [2]"),
            click.option("--max-class-drop", type=LIMIT, help="Points of IoU a single old class may lose.  [10]"),
            click.option("--min-new-iou", type=LIMIT, help="Least mean IoU of the new classes, per cent."),
            click.option("--min-agreement", type=LIMIT, help="Without labels: least agreement with the model before."),
            click.option("--min-class-agreement", type=LIMIT, help="Without labels: least kept of each old class."),
            click.option("--max-moved", type=LIMIT, help="Without labels: most old pixels that became new ones."),
            click.option("--max-latency-ms", type=LIMIT, help="Highest 95th percentile of the latency."),
            click.option("--max-rss-mib", type=LIMIT, help="Highest peak memory of a process that runs the model."),
            click.option("--max-model-mib", type=LIMIT, help="Highest size of the model's files."),
            click.option("--min-golden-agreement", type=LIMIT, help="Share of golden pixels that must be equal."),
            click.option("--max-bad-images", type=click.IntRange(min=0), help="Images that may be left out.  [0]"),
            click.option("--min-images", type=POSITIVE, help="Fewer images of old classes prove nothing.  [20]"),
        )
    ):
        command = option(command)
    return command


def watch_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What the application must have seen of a model on trial."""
    for option in reversed(
        (
            click.option("--watch-min-frames", type=POSITIVE, help="Frames before it is confirmed.  [100]"),
            click.option("--watch-min-seconds", type=LIMIT, help="Seconds before it is confirmed.  [60]"),
            click.option("--watch-deadline-s", type=LIMIT, help="Seconds until it is rolled back.  [86400]"),
            click.option("--watch-max-starts", type=POSITIVE, help="Starts of the application.  [3]"),
            click.option("--watch-max-failures", type=click.IntRange(min=0), help="Frames that failed.  [0]"),
            click.option("--watch-max-constant-pct", type=PERCENT, help="Masks of one class whole, per cent.  [50]"),
            click.option("--watch-max-old-share-drop-pct", type=PERCENT, help="Points of the pixels of old classes."),
            click.option("--watch-max-latency-ms", type=LIMIT, help="95th percentile of the latency."),
        )
    ):
        command = option(command)
    return command


@publish.command()
@repository_argument
@click.argument("bundle", type=click.Path(path_type=Path))
@keys_option
@click.option("--rollout", "percent", type=PERCENT, default=100.0, show_default=True, help="Per cent of the devices.")
@click.option("--group", "groups", multiple=True, metavar="G", help="Only devices of this group; may be repeated.")
@click.option("--not-before", metavar="TIME", help="ISO 8601 with time zone, as 2026-01-31T02:00:00+00:00.")
@click.option(
    "--validation", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Images shipped for the gate."
)
@limit_options
@watch_options
@click.option("--note", default="", help="A line for whoever reads the list.")
@click.option(
    "--bases",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    metavar="N",
    help="Keep differences against the N latest contents.",
)
@click.option("--again", is_flag=True, help="Publish a bundle that is out already: to send devices back to it.")
@json_option
def add(
    repository: Path,
    bundle: Path,
    key_folders: tuple[Path, ...],
    percent: float,
    groups: tuple[str, ...],
    not_before: str | None,
    validation: Path | None,
    note: str,
    bases: int,
    again: bool,
    as_json: bool,
    **limits: float | None,
) -> None:
    """Publish BUNDLE as the next release of REPO.

    The bundle is checked whole and packed; limits are signed with it. Prints what a device on each earlier release
    would fetch.

    \b
    edge-ilseg publish add models boat.bundle
    edge-ilseg publish add models boat.bundle --rollout 10 --group harbour --validation boats
    edge-ilseg publish add models base.bundle --again --note "boat.bundle is bad at night"
    """
    from edge_ilseg.publishing.keys import check_publisher

    check_publisher()
    from edge_ilseg.cli.publish_tables import published_table
    from edge_ilseg.cli.tables import print_table
    from edge_ilseg.publishing.releases import ReleaseRequest, publish_release

    request = ReleaseRequest(
        percent=percent,
        groups=groups,
        not_before=not_before,
        limits=_limits(limits),
        watch=_watch(limits),
        note=note,
        bases=bases,
        again=again,
    )
    ring = _ring(repository, key_folders)
    published = publish_release(repository, bundle, ring, request, _now(), validation=validation)
    if as_json:
        _print_json(published)
    else:
        print_table(published_table(published))


@publish.command()
@repository_argument
@click.argument("release", type=POSITIVE)
@click.option("--percent", type=PERCENT, required=True, help="Per cent of the devices, not less than before.")
@click.option("--all-groups", is_flag=True, help="Devices of every group.")
@click.option("--resume", is_flag=True, help="Go on with a release that was halted.")
@keys_option
def rollout(
    repository: Path, release: int, percent: float, all_groups: bool, resume: bool, key_folders: tuple[Path, ...]
) -> None:
    """Widen the roll-out of RELEASE.

    \b
    edge-ilseg publish rollout models 4 --percent 50
    """
    from edge_ilseg.publishing.keys import check_publisher

    check_publisher()
    from edge_ilseg.publishing.releases import set_rollout

    ring = _ring(repository, key_folders)
    entry = set_rollout(repository, ring, release, _now(), percent=percent, all_groups=all_groups, resume=resume)
    groups = ", ".join(entry.rollout.groups) or "every group"
    click.echo(f"release {release} ({entry.step_name}): {entry.rollout.percent:g} % of the devices of {groups}")


@publish.command()
@repository_argument
@click.argument("release", type=POSITIVE)
@click.option("--reason", required=True, metavar="TEXT", help="Signed, and shown wherever the release is.")
@keys_option
def halt(repository: Path, release: int, reason: str, key_folders: tuple[Path, ...]) -> None:
    """Halt RELEASE: no device takes it any more. One that has confirmed it keeps it.

    \b
    edge-ilseg publish halt models 4 --reason "no boats at night"
    """
    from edge_ilseg.publishing.keys import check_publisher

    check_publisher()
    from edge_ilseg.publishing.releases import halt as halt_release

    entry = halt_release(repository, _ring(repository, key_folders), release, reason, _now())
    click.echo(f"release {release} ({entry.step_name}): halted: {entry.reason}")


@publish.command()
@repository_argument
@keys_option
def refresh(repository: Path, key_folders: tuple[Path, ...]) -> None:
    """Sign the timestamp anew, and every other role that is near its expiry and whose keys are at hand.

    Devices stop updating when signatures expire, so run it from a timer, every few days.

    \b
    edge-ilseg publish refresh models
    edge-ilseg publish refresh models --keys models.keys --keys /media/root-keys
    """
    from edge_ilseg.publishing.keys import check_publisher

    check_publisher()
    from edge_ilseg.publishing.repository import refresh as refresh_repository

    done = refresh_repository(repository, _ring(repository, key_folders), _now())
    click.echo(f"signed anew: {', '.join(done.renewed)}")
    for role in done.lacking:
        click.echo(f"warning: {role} expires soon, and its keys are not at hand: name them with --keys", err=True)


@publish.command("rotate-key")
@repository_argument
@click.argument("role", type=click.Choice(["root", "targets", "snapshot", "timestamp"]))
@keys_option
@click.option("--unencrypted-keys", is_flag=True, help="Write the new keys without a passphrase.")
def rotate_key(repository: Path, role: str, key_folders: tuple[Path, ...], unencrypted_keys: bool) -> None:
    """Replace the keys of ROLE by new ones; devices follow by themselves. Needs two root keys.

    A key that was stolen: replace the timestamp's and the snapshot's, too, so that versions that the thief has signed
    are forgotten.

    \b
    edge-ilseg publish rotate-key models targets --keys models.keys --keys /media/root-keys
    """
    from edge_ilseg.publishing.keys import check_publisher

    check_publisher()
    from edge_ilseg.publishing.repository import rotate_keys

    ring = _ring(repository, key_folders, unencrypted=unencrypted_keys)
    for path in rotate_keys(repository, ring, role, _now()):
        click.echo(f"new key of {role}: {path}")
    click.echo("the old ones sign nothing any more, and can be destroyed")


@publish.command()
@repository_argument
@keys_option
@json_option
def status(repository: Path, key_folders: tuple[Path, ...], as_json: bool) -> None:
    """Releases, how far they have gone, and when which signatures expire. Needs no private key.

    \b
    edge-ilseg publish status models
    """
    from edge_ilseg.publishing.keys import check_publisher

    check_publisher()
    from edge_ilseg.cli.publish_tables import status_tables
    from edge_ilseg.cli.tables import print_table
    from edge_ilseg.publishing.releases import read_status

    found = read_status(repository, _ring(repository, key_folders), _now())
    if as_json:
        _print_json(found)
    else:
        for table in status_tables(found):
            print_table(table)
    for role in found.roles:
        if role.is_near_expiry:
            when = (
                "has expired: devices do not update" if role.days_left <= 0 else f"expires in {role.days_left:g} days"
            )
            click.echo(f"warning: {role.role} {when}; run edge-ilseg publish refresh", err=True)


def _now() -> datetime:
    return datetime.now(UTC)


def _ring(repository: Path, folders: tuple[Path, ...], *, unencrypted: bool = False) -> KeyRing:
    from edge_ilseg.publishing.keys import KeyRing

    if unencrypted:
        click.echo("warning: new private keys are written without a passphrase: whoever reads them can sign", err=True)
    default = repository.with_name(repository.name + ".keys")
    return KeyRing(folders or (default,), ask_passphrase=_ask_passphrase, unencrypted=unencrypted)


def _ask_passphrase(new: bool) -> str:
    """Ask on a terminal; elsewhere there is nobody to answer."""
    if not sys.stdin.isatty():
        return ""
    answer: str = click.prompt(
        "Passphrase of the private keys", hide_input=True, confirmation_prompt=new, err=True, default=""
    )
    return answer


def _limits(given: dict[str, float | None]) -> Limits:
    import msgspec

    from edge_ilseg.publishing.releases import DEFAULT_LIMITS

    names = {
        "max_old_drop": "max_old_miou_drop_pct",
        "max_class_drop": "max_class_drop_pct",
        "min_new_iou": "min_new_miou_pct",
        "min_agreement": "min_agreement_pct",
        "min_class_agreement": "min_class_agreement_pct",
        "max_moved": "max_moved_pct",
        "max_latency_ms": "max_latency_p95_ms",
        "max_rss_mib": "max_rss_mib",
        "max_model_mib": "max_model_mib",
        "min_golden_agreement": "min_golden_agreement",
        "max_bad_images": "max_bad_images",
        "min_images": "min_images",
    }
    values = {name: given[option] for option, name in names.items() if given[option] is not None}
    return msgspec.structs.replace(DEFAULT_LIMITS, **values)


def _watch(given: dict[str, float | None]) -> WatchLimits:
    import msgspec

    from edge_ilseg.devices.update.release import WatchLimits

    values = {
        name.removeprefix("watch_").replace("max_latency_ms", "max_latency_p95_ms"): value
        for name, value in given.items()
        if name.startswith("watch_") and value is not None
    }
    try:
        return msgspec.convert(values, WatchLimits)
    except msgspec.ValidationError as error:
        raise UpdateError(
            "an option of the watch has a value that cannot be used",
            found=str(error),
            hint="the --watch- options and their units: edge-ilseg publish add --help",
        ) from error


def _print_json(value: Any) -> None:
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=1).decode())
