"""`edge-ilseg report`: one file, whole or not at all, never over somebody else's; wrong usage is told in full."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from report_world import HOSTILE, make_workspace, verify

from edge_ilseg.cli import run
from edge_ilseg.workspace import Workspace, open_workspace

SECTIONS = [
    *("verdicts", "classes", "matrix", "confusion", "images", "int8", "devices", "updates", "training"),
    *("lineage", "provenance"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """With a class of a hostile name, and a verification that failed. Tests leave steps and bundles as they are."""
    workspace = make_workspace(tmp_path_factory.mktemp("world"), new=HOSTILE)
    verify(workspace)
    return workspace


def report(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, object]:
    assert run(["report", *map(str, arguments), "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_a_page_with_everything_is_written_where_it_is_looked_for(
    world: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = report(capsys, world.root)
    path = world.root / "reports" / "01-step.html"
    html = path.read_text(encoding="utf-8")
    assert (outcome["out"], outcome["bytes"]) == (str(path), len(html.encode()))
    assert (outcome["verdict"], outcome["images_scored"], outcome["images_shown"]) == ("May not go out", 6, 6)
    assert list(outcome["left_out"]) == ["training"]  # type: ignore[call-overload]
    assert re.findall(r'<section id="([a-z0-9]*)"', html) == SECTIONS
    assert "<script" not in html
    assert "forgotten" in html
    assert html.count("data:image/") == 6 * 5


def test_the_same_workspace_gives_the_same_bytes(world: Workspace, tmp_path: Path) -> None:
    pages = []
    for name in ("a.html", "b.html"):
        assert run(["report", str(world.root), "--out", str(tmp_path / name)]) == 0
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_an_earlier_page_is_replaced_and_any_other_file_is_left(
    world: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    few = ["report", str(world.root), "--images", "0", "--out", str(out)]
    assert run(few) == 0
    assert run(few) == 0
    out.write_text("my own page")
    capsys.readouterr()
    assert run(few) == 3
    assert "is no report of this program" in capsys.readouterr().err
    assert out.read_text() == "my own page"
    assert run([*few[:-1], str(tmp_path / "absent" / "page.html")]) == 3
    assert "the folder for the page is missing" in capsys.readouterr().err


def test_without_bundles_images_and_reports_the_page_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = make_workspace(tmp_path, with_bundles=False)
    shutil.rmtree(tmp_path / "data")
    outcome = report(capsys, workspace.root)
    left_out = outcome["left_out"]
    assert isinstance(left_out, dict)
    assert set(left_out) == {"verdicts", "confusion", "images", "int8", "devices", "updates", "training"}
    assert "does not exist" in left_out["images"]
    assert outcome["verdict"] == "Not judged yet"


def test_step_zero_alone_has_a_page(world: Workspace, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    outcome = report(capsys, world.root, "--step", "0", "--out", tmp_path / "base.html")
    html = (tmp_path / "base.html").read_text()
    assert 'id="matrix"' not in html
    assert "nothing was there to forget" in html
    assert outcome["verdict"] == "Not judged yet"


def test_data_that_was_named_and_is_not_there_is_an_error(world: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(world.root), "--data", "folder:/nowhere"]) == 3
    assert "does not exist" in capsys.readouterr().err
    assert run(["report", str(world.root), "--data", "floder:x"]) == 3
    assert "did you mean 'folder'" in capsys.readouterr().err


def test_a_page_keeps_to_its_size(world: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = report(capsys, world.root, "--out", tmp_path / "a.html")
    bare = report(capsys, world.root, "--pictures", "0", "--out", tmp_path / "b.html")
    assert bare["images_shown"] == 0
    middle_mib = (int(str(whole["bytes"])) * 2 + int(str(bare["bytes"]))) / 3 / (1 << 20)
    smaller = report(capsys, world.root, "--max-mib", middle_mib, "--out", tmp_path / "c.html")
    assert int(str(smaller["bytes"])) <= middle_mib * (1 << 20)
    assert "To keep the page small" in str(smaller["note"])
    assert str(smaller["note"]) in (tmp_path / "c.html").read_text()
    assert run(["report", str(world.root), "--max-mib", "0.01"]) == 3
    assert "cannot be made that small" in capsys.readouterr().err


# Two side by side


def test_two_steps_are_compared(world: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = report(capsys, world.root, "--compare", "00-base", "01-step")
    html = Path(str(outcome["out"])).read_text(encoding="utf-8")
    assert re.findall(r'<section id="([a-z0-9]*)"', html) == ["scores", "classes", "verdicts", "provenance"]
    assert "<script" not in html
    assert "May not go out" in html


def test_two_workspaces_are_compared_and_told_apart(
    world: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(world.root, other)
    out = tmp_path / "two.html"
    report(capsys, tmp_path, "--compare", world.root, other / "steps" / "01-step", "--out", out)
    html = out.read_text()
    assert "<title>01-step of work and 01-step of other</title>" in html
    assert open_workspace(other).root == other
    capsys.readouterr()
    assert run(["report", str(tmp_path), "--compare", str(world.root), str(other)]) == 3
    assert "needs a place for the page" in capsys.readouterr().err


def test_two_devices_are_compared(world: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = world.root / "reports" / "01-step.verify.json"
    two = tmp_path / f"{HOSTILE.replace('/', '-')}.json"
    text = one.read_text().replace('"machine": "', '"machine": "other-')
    two.write_text(text)
    out = tmp_path / "two.html"
    report(capsys, world.root, "--compare", one, two, "--out", out)
    html = out.read_text()
    assert re.findall(r'<section id="([a-z0-9]*)"', html) == ["verdicts", "classes", "devices", "provenance"]
    assert "other-" in html
    assert "<script" not in html


@pytest.mark.parametrize("second", ["absent", "reports/01-step.verify.json", "data"])
def test_what_cannot_be_compared_is_refused(world: Workspace, second: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = world.root / second if second.endswith(".json") else second
    assert run(["report", str(world.root), "--compare", "00-base", str(path)]) == 3
    assert "error:" in capsys.readouterr().err
