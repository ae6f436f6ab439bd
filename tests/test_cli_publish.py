"""`edge-ilseg publish` as a user meets it."""

from __future__ import annotations

import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from bundles import write_color_folder, write_family

from edge_ilseg.cli import publish, run
from edge_ilseg.devices.update.transport import open_transport
from edge_ilseg.devices.update.trust import TrustedRepository, refresh

SUBCOMMANDS = ("init", "add", "rollout", "halt", "refresh", "rotate-key", "status")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two bundles and an empty repository `models`, keys encrypted."""
    monkeypatch.setenv("EDGE_ILSEG_KEY_PASSPHRASE", "four words and a number 7")
    write_family(tmp_path)
    assert run(["publish", "init", str(tmp_path / "models")]) == 0
    return tmp_path


def device(place: Path) -> TrustedRepository:
    bootstrap = (place / "models" / "metadata" / "1.root.json").read_bytes()
    return refresh(open_transport(str(place / "models"), timeout_s=5), place / "tuf", bootstrap, datetime.now(UTC))


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["publish", name, "--help"]) == 0
    assert f"edge-ilseg publish {name} models" in capsys.readouterr().out


def test_a_new_repository_tells_where_its_parts_are(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["publish", "init", str(place / "other")]) == 0
    text = capsys.readouterr().out
    for name in ("other", "other.keys", "other/metadata/1.root.json"):
        assert f" {place / name} " in text
    assert stat.S_IMODE((place / "other.keys").stat().st_mode) == 0o700
    assert len(list((place / "other.keys").glob("*.pem"))) == 6
    assert all(b"ENCRYPTED" in path.read_bytes() for path in (place / "other.keys").glob("*.pem"))


def test_a_release_from_the_first_devices_to_its_halt(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = str(place / "models")
    assert run(["publish", "add", models, str(place / "parent")]) == 0
    words = ["--rollout", "10", "--group", "harbour", "--group", "lab", "--max-class-drop", "5", "--max-rss-mib", "300"]
    words += ["--min-images", "30"]
    words += ["--watch-min-frames", "20", "--watch-max-latency-ms", "80", "--watch-max-old-share-drop-pct", "3"]
    capsys.readouterr()
    assert run(["publish", "add", models, str(place / "child"), *words, "--note", "boats"]) == 0
    table = capsys.readouterr().out
    assert "nothing" in table
    assert "release 1 (00-grass)" in table
    release = device(place).release(2)
    assert (release.limits.max_old_miou_drop_pct, release.limits.max_class_drop_pct) == (2.0, 5.0)
    assert (release.limits.max_rss_mib, release.limits.min_images, release.note) == (300.0, 30, "boats")
    watch = release.watch
    assert (watch.min_frames, watch.max_latency_p95_ms, watch.max_old_share_drop_pct) == (20, 80.0, 3.0)
    assert run(["publish", "rollout", models, "2", "--percent", "50"]) == 0
    assert "50 % of the devices of harbour, lab" in capsys.readouterr().out
    assert run(["publish", "rollout", models, "2", "--percent", "100", "--all-groups"]) == 0
    assert run(["publish", "halt", models, "2", "--reason", "no [boats] at night"]) == 0
    capsys.readouterr()
    assert run(["publish", "status", models]) == 0
    assert "halted: no [boats] at night" in capsys.readouterr().out
    entry = device(place).rollouts.entries[1]
    assert (entry.rollout.percent, entry.rollout.groups, entry.halted) == (100.0, (), True)


def test_add_tells_in_json_what_devices_fetch(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = str(place / "models")
    images = write_color_folder(place / "colors")
    assert run(["publish", "add", models, str(place / "parent")]) == 0
    capsys.readouterr()
    words = ["--validation", str(images), "--not-before", "2026-01-31T02:00:00+00:00", "--bases", "1", "--json"]
    assert run(["publish", "add", models, str(place / "child"), *words]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["release"]["release"] == 2
    assert [row["from_release"] for row in answer["fetches"]] == [None, 1]
    assert answer["rollout"]["not_before"] == "2026-01-31T02:00:00+00:00"


def test_status_in_json_has_the_expiry_of_each_role(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["publish", "status", str(place / "models"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [role["role"] for role in answer["roles"]] == ["root", "targets", "snapshot", "timestamp"]
    assert [round(role["days_left"]) for role in answer["roles"]] == [365, 90, 30, 7]


def test_status_and_refresh_warn_of_what_expires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = str(tmp_path / "models")
    assert run(["publish", "init", models, "--unencrypted-keys", "--snapshot-days", "20"]) == 0
    assert "without a passphrase" in capsys.readouterr().err
    now = datetime.now(UTC)
    monkeypatch.setattr(publish, "_now", lambda: now + timedelta(days=15))
    assert run(["publish", "status", models]) == 0
    warnings = capsys.readouterr().err
    assert "timestamp has expired: devices do not update" in warnings
    assert "snapshot expires in 5 days" in warnings
    for path in (tmp_path / "models.keys").glob("snapshot-*.pem"):
        path.rename(tmp_path / path.name)
    assert run(["publish", "refresh", models]) == 0
    written = capsys.readouterr()
    assert "signed anew: timestamp" in written.out
    assert "snapshot expires soon, and its keys are not at hand" in written.err
    assert run(["publish", "refresh", models, "--keys", f"{models}.keys", "--keys", str(tmp_path)]) == 0
    assert "signed anew: snapshot, timestamp" in capsys.readouterr().out


def test_root_keys_that_lie_elsewhere_replace_a_key(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models, keys, offline = str(place / "models"), place / "models.keys", place / "offline"
    offline.mkdir()
    for path in sorted(keys.glob("root-*.pem"))[:2]:
        path.rename(offline / path.name)
    assert run(["publish", "rotate-key", models, "targets"]) == 3
    assert "not enough keys are at hand to sign root" in capsys.readouterr().err
    assert run(["publish", "rotate-key", models, "targets", "--keys", str(keys), "--keys", str(offline)]) == 0
    assert str(keys) in capsys.readouterr().out
    assert len(list(keys.glob("targets-*.pem"))) == 2
    assert run(["publish", "add", models, str(place / "parent")]) == 0
    assert device(place).release(1).release == 1


def test_without_a_passphrase_and_without_a_terminal_the_error_says_what_to_set(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("EDGE_ILSEG_KEY_PASSPHRASE")
    assert run(["publish", "add", str(place / "models"), str(place / "parent")]) == 3
    assert "EDGE_ILSEG_KEY_PASSPHRASE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--max-class-drop", "nan"], "'nan' is not a finite number"),
        (["--watch-max-latency-ms", "inf"], "'inf' is not a finite number"),
        (["--min-images", "0"], "--min-images"),
        (["--not-before", "soon"], "ISO 8601"),
        (["--watch-min-seconds", "-1"], "cannot be used"),
        (["--rollout", "101"], "0<=x<=100"),
    ],
)
def test_options_that_cannot_be_signed_are_refused(
    place: Path, words: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["publish", "add", str(place / "models"), str(place / "parent"), *words]) == 3
    assert what in capsys.readouterr().err
    assert device(place).rollouts.entries == ()
