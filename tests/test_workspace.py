"""Workspaces: steps are found by name or number, and a damaged one is named without harming the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from records import SPEC, make_record

from edge_ilseg.checkpoint import RECORD_NAME, StepRecord, write_step
from edge_ilseg.config import ClassesConfig, Config, DataConfig
from edge_ilseg.errors import WorkspaceError
from edge_ilseg.models.segmentation import build_model
from edge_ilseg.workspace import Workspace, create_workspace, open_workspace

CONFIG = Config(data=DataConfig("shapes"), classes=ClassesConfig(("sky", "sea")), model=SPEC, weights="none")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return create_workspace(tmp_path / "work", CONFIG)


def add_step(workspace: Workspace, name: str, parent: StepRecord | None = None) -> StepRecord:
    torch.manual_seed(0)
    record = make_record(
        name=name,
        index=int(name[:2]),
        parent_id=parent.id if parent else None,
        parent_name=parent.name if parent else None,
    )
    return write_step(workspace.step_folder(name), record, build_model(SPEC, (2, 1)))


def test_a_workspace_opens_as_it_was_made(workspace: Workspace) -> None:
    assert open_workspace(workspace.root) == workspace


def test_a_workspace_is_never_written_over(workspace: Workspace) -> None:
    with pytest.raises(WorkspaceError, match="workspace already"):
        create_workspace(workspace.root, CONFIG)


def test_steps_are_found_by_name_and_by_number(workspace: Workspace) -> None:
    base = add_step(workspace, "00-base")
    boat = add_step(workspace, "01-boat", base)
    assert workspace.step_names() == ("00-base", "01-boat")
    assert workspace.read_step("01-boat") == workspace.read_step("1") == workspace.latest_step() == boat
    assert workspace.parent_of(boat) == base
    assert workspace.parent_of(base) is None


def test_a_wrong_name_gets_the_nearest_one(workspace: Workspace) -> None:
    with pytest.raises(WorkspaceError, match="edge-ilseg train"):
        workspace.read_step("00-base")
    add_step(workspace, "00-base")
    with pytest.raises(WorkspaceError, match="did you mean '00-base'"):
        workspace.read_step("00-bse")
    with pytest.raises(WorkspaceError, match="no such step"):
        workspace.read_step("²")


def test_two_latest_steps_must_be_told_apart(workspace: Workspace) -> None:
    base = add_step(workspace, "00-base")
    add_step(workspace, "01-a", base)
    add_step(workspace, "01-b", base)
    with pytest.raises(WorkspaceError, match="01-a, 01-b"):
        workspace.latest_step()
    with pytest.raises(WorkspaceError, match="several steps have that number"):
        workspace.read_step("1")
    assert workspace.read_step("0") == base


def test_a_damaged_step_does_not_harm_the_others(workspace: Workspace) -> None:
    base = add_step(workspace, "00-base")
    add_step(workspace, "01-boat", base)
    (workspace.step_folder("01-boat") / RECORD_NAME).write_bytes(b"{")
    assert workspace.read_step("0") == base
    with pytest.raises(WorkspaceError, match="01-boat"):
        workspace.latest_step()


def test_a_parent_that_was_exchanged_is_found(workspace: Workspace) -> None:
    base = add_step(workspace, "00-base")
    boat = add_step(workspace, "01-boat", base)
    folder = workspace.step_folder("00-base")
    folder.rename(workspace.root / "aside")
    add_step(workspace, "00-base", boat)
    with pytest.raises(WorkspaceError, match="not the one that it was made from"):
        workspace.parent_of(boat)


def test_half_written_folders_are_not_steps(workspace: Workspace) -> None:
    add_step(workspace, "00-base")
    (workspace.steps_folder / ".01-boat.abc.part").mkdir()
    assert workspace.step_names() == ("00-base",)


def test_a_renamed_step_is_refused(workspace: Workspace) -> None:
    add_step(workspace, "00-base")
    workspace.step_folder("00-base").rename(workspace.step_folder("00-other"))
    with pytest.raises(WorkspaceError, match=r"folder was renamed(.|\n)*00-base"):
        workspace.read_step("00-other")


def test_stray_folders_are_not_steps_and_numbers_are_numbers(workspace: Workspace) -> None:
    base = add_step(workspace, "00-base")
    (workspace.steps_folder / "notes").mkdir()
    for name in ("99-a", "100-b"):
        torch.manual_seed(0)
        record = make_record(name=name, index=1, parent_id=base.id, parent_name=base.name)
        write_step(workspace.step_folder(name), record, build_model(SPEC, (2, 1)))
    assert workspace.step_names() == ("00-base", "99-a", "100-b")
    assert workspace.latest_step().name == "100-b"
