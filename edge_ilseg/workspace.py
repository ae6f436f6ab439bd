"""A workspace: `edge-ilseg.toml` and the steps that were trained in it.

1. A step's folder is `<index>-<name>`, with two digits; its lineage is what the records say, not what folders are
   called.
2. A damaged step is named when it is used; it never hides or harms the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_ilseg.checkpoint import StepRecord, read_record
from edge_ilseg.config import CONFIG_NAME, Config, read_config, render_config
from edge_ilseg.errors import WorkspaceError, choice_hint
from edge_ilseg.files import disk_error, write_bytes

BASE_STEP = "00-base"


@dataclass(frozen=True)
class Workspace:
    """A folder with a configuration and steps."""

    root: Path
    config: Config

    @property
    def steps_folder(self) -> Path:
        """Where the steps are."""
        return self.root / "steps"

    def step_names(self) -> tuple[str, ...]:
        """Names of all step folders, damaged ones too, in order."""
        if not self.steps_folder.is_dir():
            return ()
        found = [p.name for p in self.steps_folder.iterdir() if p.is_dir() and _number(p.name) is not None]
        return tuple(sorted(found, key=lambda name: (_number(name), name)))

    def step_folder(self, name: str) -> Path:
        """Where the step of that name is, or would be."""
        return self.steps_folder / name

    def bundle_folder(self, name: str) -> Path:
        """Where `export` puts the bundle of the step of that name, unless it is told another place."""
        return self.root / "bundles" / name

    def read_step(self, name: str) -> StepRecord:
        """The record of a step, by its name or by the number at its start where one step has that number.

        Raises:
            WorkspaceError: there is no such step, the number is ambiguous, or the step is damaged.
        """
        names = self.step_names()
        number = int(name) if name.isascii() and name.isdecimal() else None
        matches = [name] if name in names else [n for n in names if number is not None and _number(n) == number]
        if len(matches) != 1:
            raise WorkspaceError(
                "there is no such step" if not matches else "several steps have that number",
                where=self.steps_folder,
                found=repr(name),
                expected=", ".join(matches or names) or "no step yet",
                hint=choice_hint(name, names) if names else "train step 0 first: edge-ilseg train",
            )
        record = read_record(self.step_folder(matches[0]))
        if record.name != matches[0]:
            raise WorkspaceError(
                "the step's folder was renamed",
                where=self.step_folder(matches[0]),
                found=f"the record of step {record.name}",
                expected=f"a folder named {record.name}",
                hint="rename it back",
            )
        return record

    def latest_step(self) -> StepRecord:
        """The step with the highest index, when there is one alone.

        Raises:
            WorkspaceError: there is no step, or several have the highest index, or it is damaged.
        """
        names = self.step_names()
        if not names:
            raise WorkspaceError(
                "the workspace has no step yet",
                where=self.steps_folder,
                hint=f"train step 0 first: edge-ilseg train {self.root}",
            )
        highest = [name for name in names if _number(name) == _number(names[-1])]
        if len(highest) > 1:
            raise WorkspaceError(
                "several steps are the latest",
                where=self.steps_folder,
                found=", ".join(highest),
                expected="one",
                hint="say which: --from NAME for a new step, --step NAME otherwise",
            )
        return self.read_step(highest[0])

    def parent_of(self, record: StepRecord) -> StepRecord | None:
        """The step that `record` was made from; None for step 0.

        Raises:
            WorkspaceError: the parent is not here, or is another one than it was.
        """
        if record.parent_name is None:
            return None
        parent = self.read_step(record.parent_name)
        if parent.id != record.parent_id:
            raise WorkspaceError(
                f"the parent of step {record.name} is not the one that it was made from",
                where=self.step_folder(record.parent_name),
                found=f"step {parent.id[:12]}",
                expected=f"step {str(record.parent_id)[:12]}",
                hint=f"restore it from a copy, or train step {record.name} again",
            )
        return parent


def _number(name: str) -> int | None:
    """The number at the start of a step's name; None for a name that is no step's."""
    number, dash, _ = name.partition("-")
    return int(number) if dash and number.isdecimal() and number.isascii() else None


def open_workspace(root: Path) -> Workspace:
    """Open a workspace.

    Raises:
        ConfigError: the folder is none, or its configuration cannot be used.
    """
    return Workspace(root, read_config(root / CONFIG_NAME))


def create_workspace(root: Path, config: Config) -> Workspace:
    """Write a new workspace's configuration.

    Raises:
        WorkspaceError: there is one already.
    """
    path = root / CONFIG_NAME
    if path.exists():
        raise WorkspaceError("there is a workspace already", where=path, hint="edit it, or choose another folder")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, root) from error
    write_bytes(path, render_config(config).encode())
    return Workspace(root, config)
