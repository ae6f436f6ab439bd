"""Tables of releases and of what they cost a device."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from edge_ilseg.publishing.releases import Published, RepositoryStatus


def published_table(published: Published) -> Table:
    """What devices fetch of a new release, by what they have."""
    release, rollout = published.release, published.rollout
    whole_bytes = published.fetches[0].bytes
    table = Table(
        title=Text(f"release {release.release}: {release.step_name}"),
        caption=Text(
            f"content {release.content_id[:12]}, pack {release.pack.bytes} bytes; "
            f"{rollout.percent:g} % of the devices of {', '.join(rollout.groups) or 'every group'}"
        ),
    )
    table.add_column("a device that has")
    for column in ("fetches bytes", "of all", "in requests"):
        table.add_column(column, justify="right")
    for row in published.fetches:
        name = "nothing" if row.from_release is None else f"release {row.from_release} ({row.step_name})"
        table.add_row(Text(name), str(row.bytes), f"{100 * row.bytes / whole_bytes:.1f} %", str(row.ranges))
    return table


def status_tables(status: RepositoryStatus) -> tuple[Table, Table]:
    """The releases, and the signatures."""
    releases = Table(title=f"releases, as published {status.published}")
    for column in ("release", "step", "content", "roll-out", "groups", "not before", "state"):
        releases.add_column(column)
    for entry in status.entries:
        plan = entry.rollout
        cells = (
            str(entry.release),
            entry.step_name,
            entry.content_id[:12],
            f"{plan.percent:g} %",
            ", ".join(plan.groups) or "all",
            plan.not_before or "-",
            f"halted: {entry.reason}" if entry.halted else "out",
        )
        releases.add_row(*map(Text, cells))
    signatures = Table(title="signatures")
    for column in ("role", "version", "expires", "days left", "keys needed", "keys"):
        signatures.add_column(column)
    for role in status.roles:
        keys = " ".join(key_id[:16] for key_id in role.key_ids)
        needed = f"{role.threshold} of {len(role.key_ids)}"
        signatures.add_row(role.role, str(role.version), role.expires, f"{role.days_left:.1f}", needed, keys)
    return releases, signatures
