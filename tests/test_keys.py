"""Private keys: where they lie, who can read them, which are opened; rules of `edge_ilseg/publishing/keys.py`."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from edge_ilseg.errors import UpdateError
from edge_ilseg.publishing.keys import KeyRing, generate_key

PASSPHRASE = "four words and a number 7"


def ring(*folders: Path, passphrase: str | None = PASSPHRASE, unencrypted: bool = False, **variables: str) -> KeyRing:
    known = {} if passphrase is None else {"EDGE_ILSEG_KEY_PASSPHRASE": passphrase}
    return KeyRing(folders, environment={**known, **variables}, unencrypted=unencrypted)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_key_is_encrypted_and_for_its_owner_alone(tmp_path: Path) -> None:
    """Rule 1."""
    key = generate_key()
    path = ring(tmp_path / "keys").add("targets", key)
    assert path.name == f"targets-{key.public_key.keyid[:16]}.pem"
    assert (mode(tmp_path / "keys"), mode(path)) == (0o700, 0o600)
    assert path.read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
    (found,) = ring(tmp_path / "keys").at_hand("targets", [key.public_key.keyid])
    assert found.public_key == key.public_key


def test_a_key_without_a_passphrase_is_written_only_on_demand(tmp_path: Path) -> None:
    path = ring(tmp_path / "keys", unencrypted=True).add("targets", generate_key())
    assert path.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    assert mode(path) == 0o600


def test_a_key_is_never_written_over(tmp_path: Path) -> None:
    key = generate_key()
    path = ring(tmp_path).add("targets", key)
    before = path.read_bytes()
    with pytest.raises(UpdateError, match="could not be read or written"):
        ring(tmp_path).add("targets", key)
    assert path.read_bytes() == before


@pytest.mark.parametrize("short", ["a", "elevenchars"])
def test_a_short_passphrase_is_refused_for_new_keys(short: str, tmp_path: Path) -> None:
    with pytest.raises(UpdateError, match="too short"):
        ring(tmp_path, passphrase=short).add("targets", generate_key())
    assert not list(tmp_path.iterdir())


def test_a_wrong_passphrase_and_none_are_named(tmp_path: Path) -> None:
    key = generate_key()
    ring(tmp_path).add("targets", key)
    with pytest.raises(UpdateError, match="cannot be read") as wrong:
        ring(tmp_path, passphrase="another one entirely").at_hand("targets", [key.public_key.keyid])
    assert "passphrase" in str(wrong.value)
    with pytest.raises(UpdateError, match="need a passphrase"):
        ring(tmp_path, passphrase=None).at_hand("targets", [key.public_key.keyid])


def test_a_passphrase_is_asked_for_once(tmp_path: Path) -> None:
    asked: list[bool] = []

    def ask(new: bool) -> str:
        asked.append(new)
        return PASSPHRASE

    keys = KeyRing([tmp_path], ask_passphrase=ask, environment={})
    ids = []
    for role in ("targets", "snapshot"):
        key = generate_key()
        keys.add(role, key)
        ids.append(key.public_key.keyid)
        assert len(keys.at_hand(role, ids)) == 1
    assert asked == [True]


@pytest.mark.parametrize("form", ["plain", "one line"])
def test_keys_come_from_the_environment_without_any_file(form: str) -> None:
    """Rule 2: as a CI keeps its secrets; some of them lose the line breaks."""
    keys = [generate_key() for _ in range(3)]
    pems = [key.private_bytes.decode() for key in keys]
    if form == "one line":
        pems = [pem.replace("\n", "\\n") for pem in pems]
    found = ring(EDGE_ILSEG_KEY_ROOT_1=pems[0], EDGE_ILSEG_KEY_ROOT_2=pems[1], EDGE_ILSEG_KEY_TARGETS=pems[2])
    ids = [key.public_key.keyid for key in keys]
    assert [key.public_key.keyid for key in found.signers("root", ids[:2], 2)] == ids[:2]
    assert [key.public_key.keyid for key in found.signers("targets", ids[2:], 1)] == ids[2:]
    assert found.at_hand("snapshot", ids) == ()


def test_an_encrypted_key_comes_from_the_environment(tmp_path: Path) -> None:
    key = generate_key()
    pem = ring(tmp_path).add("targets", key).read_text()
    (found,) = ring(EDGE_ILSEG_KEY_TARGETS=pem).at_hand("targets", [key.public_key.keyid])
    assert found.public_key == key.public_key


def test_a_key_that_the_role_does_not_know_signs_nothing(tmp_path: Path) -> None:
    """Rule 3."""
    key, other = generate_key(), generate_key()
    keys = ring(tmp_path, EDGE_ILSEG_KEY_TARGETS=other.private_bytes.decode())
    with pytest.raises(UpdateError, match="not enough keys") as caught:
        keys.signers("targets", [key.public_key.keyid], 1)
    assert key.public_key.keyid[:16] in str(caught.value)
    assert "EDGE_ILSEG_KEY_TARGETS" in str(caught.value)


def test_a_file_under_another_keys_name_signs_nothing(tmp_path: Path) -> None:
    key = generate_key()
    path = ring(tmp_path).add("targets", generate_key())
    path.rename(tmp_path / f"targets-{key.public_key.keyid[:16]}.pem")
    assert ring(tmp_path).at_hand("targets", [key.public_key.keyid]) == ()


def test_fewer_keys_than_the_threshold_are_too_few(tmp_path: Path) -> None:
    keys = [generate_key() for _ in range(3)]
    ids = [key.public_key.keyid for key in keys]
    ring(tmp_path / "a").add("root", keys[0])
    with pytest.raises(UpdateError, match="not enough keys") as caught:
        ring(tmp_path / "a").signers("root", ids, 2)
    assert "1 of the keys" in str(caught.value)
    ring(tmp_path / "b").add("root", keys[2])
    assert len(ring(tmp_path / "a", tmp_path / "b").signers("root", ids, 2)) == 2


def test_keys_of_other_roles_are_not_opened(tmp_path: Path) -> None:
    """Rule 2: a root key may be anything at all as long as nobody needs it."""
    key = generate_key()
    ring(tmp_path).add("targets", key)
    (tmp_path / f"root-{key.public_key.keyid[:16]}.pem").mkdir()
    environment = {"EDGE_ILSEG_KEY_ROOT_1": "no key"}
    assert len(ring(tmp_path, **environment).signers("targets", [key.public_key.keyid], 1)) == 1


@pytest.mark.parametrize("pem", ["no key", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_something_that_is_no_key_is_named_with_its_place(pem: str) -> None:
    with pytest.raises(UpdateError, match="a private key cannot be read") as caught:
        ring(EDGE_ILSEG_KEY_TARGETS=pem).at_hand("targets", ["0" * 64])
    assert "EDGE_ILSEG_KEY_TARGETS" in str(caught.value)
    assert pem not in str(caught.value)


def test_a_bare_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    key = generate_key()
    path = ring(tmp_path, unencrypted=True).add("targets", key)
    path.chmod(0o640)
    with pytest.raises(UpdateError, match="can be read by others"):
        ring(tmp_path).at_hand("targets", [key.public_key.keyid])
    path.chmod(0o600)
    assert len(ring(tmp_path).at_hand("targets", [key.public_key.keyid])) == 1


def test_an_encrypted_key_may_lie_where_others_can_read_it(tmp_path: Path) -> None:
    key = generate_key()
    ring(tmp_path).add("targets", key).chmod(0o644)
    assert len(ring(tmp_path).at_hand("targets", [key.public_key.keyid])) == 1


def test_a_new_key_needs_a_folder() -> None:
    with pytest.raises(UpdateError, match="no folder"):
        ring().add("targets", generate_key())


def test_what_is_kept_beside_the_keys_is_found_again(tmp_path: Path) -> None:
    """Rule 4."""
    assert ring(tmp_path / "none", tmp_path).read_kept("root.json") is None
    ring(tmp_path).write_kept("root.json", b"signed")
    assert ring(tmp_path / "none", tmp_path).read_kept("root.json") == b"signed"
    ring().write_kept("root.json", b"nowhere")
