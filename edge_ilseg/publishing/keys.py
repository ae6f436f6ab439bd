"""The private keys of a publisher: made here, kept outside of the repository, read only when something is to be signed.

1. A key is an ed25519 key in a PEM file (PKCS8), encrypted with a passphrase unless the user says otherwise, in a file
   of mode 0600 in a folder of mode 0700. A key file is never written over.
2. Keys come from the environment (`EDGE_ILSEG_KEY_TARGETS`, `EDGE_ILSEG_KEY_ROOT_1`, ... hold a PEM) or from folders; a
   key of a role that is not asked for is never opened, so that root keys can stay offline.
3. A key is found by its id, which is in its file's name: one of another repository is never signed with.
4. Beside the keys lies what the publisher has signed last (`root.json`, `timestamp.json`, nothing secret), by which
   `edge_ilseg.publishing.state` knows a repository that somebody has exchanged.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge_ilseg.errors import EdgeIlsegError, UpdateError, check_extra
from edge_ilseg.files import disk_error, sync_folder, write_bytes

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

PASSPHRASE_VARIABLE = "EDGE_ILSEG_KEY_PASSPHRASE"
KEY_VARIABLE = "EDGE_ILSEG_KEY_"
MIN_PASSPHRASE_CHARACTERS = 12
SHORT_ID = 16
"""Characters of a key's id that stand in the name of its file."""


def check_publisher() -> None:
    """Raise `MissingPackageError` when the packages that sign are not installed."""
    check_extra("publish", ("tuf", "securesystemslib", "cryptography"), "publishing a release")


def generate_key() -> CryptoSigner:
    """A new ed25519 key."""
    from securesystemslib.signer import CryptoSigner

    return CryptoSigner.generate_ed25519()


class KeyRing:
    """Finds the keys of a role by their ids, in the environment and in folders."""

    def __init__(
        self,
        folders: Sequence[Path] = (),
        *,
        ask_passphrase: Callable[[bool], str] | None = None,
        environment: Mapping[str, str] = os.environ,
        unencrypted: bool = False,
    ) -> None:
        """Nothing is read yet.

        Args:
            folders: searched in this order; new keys are written to the first.
            ask_passphrase: called at most once, when the environment holds none; its argument tells whether the
                passphrase is for new keys. `None`: an encrypted key without one is an error.
            environment: where keys and the passphrase may be.
            unencrypted: write new keys without a passphrase.
        """
        self.folders = tuple(folders)
        self._ask = ask_passphrase
        self._environment = environment
        self._unencrypted = unencrypted
        self._passphrase: bytes | None = None

    def signers(self, role: str, key_ids: Sequence[str], threshold: int) -> tuple[CryptoSigner, ...]:
        """All keys of a role that are at hand.

        Raises:
            UpdateError: fewer than the threshold.
        """
        found = self.at_hand(role, key_ids)
        if len(found) < threshold:
            raise UpdateError(
                f"not enough keys are at hand to sign {role}",
                where=", ".join(map(str, self.folders)) or None,
                found=f"{len(found)} of the keys {', '.join(item[:SHORT_ID] for item in key_ids)}",
                expected=f"at least {threshold}",
                hint=f"name their folder with --keys, or put the PEM into {KEY_VARIABLE}{role.upper()}",
            )
        return found

    def at_hand(self, role: str, key_ids: Sequence[str]) -> tuple[CryptoSigner, ...]:
        """The keys of a role that are at hand, which may be none (rules 2 and 3)."""
        check_publisher()
        found: dict[str, CryptoSigner] = {}
        for where, pem in self._candidates(role, key_ids):
            signer = self._load(where, pem)
            found.setdefault(signer.public_key.keyid, signer)
        return tuple(found[key_id] for key_id in key_ids if key_id in found)

    def add(self, role: str, signer: CryptoSigner) -> Path:
        """Write a new key into the first folder (rule 1).

        Raises:
            UpdateError: there is no folder, no passphrase, or the disk refuses.
        """
        if not self.folders:
            raise UpdateError("a new key has no folder to be written to", hint="name one with --keys")
        path = self.folders[0] / f"{role}-{signer.public_key.keyid[:SHORT_ID]}.pem"
        data = signer.private_bytes if self._unencrypted else _encrypt(signer, self._read_passphrase(new=True))
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_private(path, data)
        except OSError as error:
            raise as_update_error(disk_error(error, path)) from error
        return path

    def read_kept(self, name: str) -> bytes | None:
        """A public file that is kept beside the keys (rule 4); `None`: no folder has it."""
        for folder in self.folders:
            path = folder / name
            if path.is_file():
                return path.read_bytes()
        return None

    def write_kept(self, name: str, data: bytes) -> None:
        """Keep a public file beside the keys; where keys come from the environment alone, there is no place for it."""
        if self.folders and self.folders[0].is_dir():
            write_bytes(self.folders[0] / name, data)

    def _candidates(self, role: str, key_ids: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        plain = KEY_VARIABLE + role.upper()
        for name in sorted(self._environment):
            number = name.removeprefix(plain + "_")
            if (name == plain or (number != name and number.isdigit())) and self._environment[name].strip():
                yield name, self._environment[name].replace("\\n", "\n").encode()
        for folder in self.folders:
            for key_id in key_ids:
                path = folder / f"{role}-{key_id[:SHORT_ID]}.pem"
                if path.is_file():
                    yield str(path), _read_private(path)

    def _load(self, where: str, pem: bytes) -> CryptoSigner:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
        from securesystemslib.signer import CryptoSigner

        passphrase = self._read_passphrase(new=False) if b"ENCRYPTED" in pem else None
        try:
            return CryptoSigner(load_pem_private_key(pem, passphrase))
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise UpdateError(
                "a private key cannot be read",
                where=where,
                found=str(error),
                expected="a PEM file (PKCS8)",
                hint="is the passphrase right?"
                if passphrase
                else "put the file back that edge-ilseg publish init wrote",
            ) from error

    def _read_passphrase(self, *, new: bool) -> bytes:
        if self._passphrase is None:
            text = self._environment.get(PASSPHRASE_VARIABLE) or (self._ask(new) if self._ask else "")
            if not text:
                raise UpdateError(
                    "the private keys need a passphrase and there is none", hint=f"set {PASSPHRASE_VARIABLE}"
                )
            self._passphrase = text.encode()
        if new and len(self._passphrase.decode()) < MIN_PASSPHRASE_CHARACTERS:
            raise UpdateError(
                "the passphrase is too short for new keys",
                expected=f"at least {MIN_PASSPHRASE_CHARACTERS} characters",
                hint="five words that have nothing to do with each other",
            )
        return self._passphrase


def as_update_error(error: EdgeIlsegError) -> UpdateError:
    """The same error, as one of an update."""
    return UpdateError(error.what, where=error.where, found=error.found, expected=error.expected, hint=error.hint)


def _encrypt(signer: CryptoSigner, passphrase: bytes) -> bytes:
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
        load_pem_private_key,
    )

    key = load_pem_private_key(signer.private_bytes, None)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(passphrase))


def _write_private(path: Path, data: bytes) -> None:
    """`files.write_bytes` would let others read it, and would write over a key."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def _read_private(path: Path) -> bytes:
    """Raise `UpdateError` for a bare key that others can read."""
    data = path.read_bytes()
    mode = path.stat().st_mode
    if b"ENCRYPTED" not in data and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UpdateError(
            "a private key without a passphrase can be read by others",
            where=path,
            found=f"mode {stat.S_IMODE(mode):04o}",
            expected="mode 0600",
            hint=f"chmod 600 {path}; if somebody may have read it: edge-ilseg publish rotate-key",
        )
    return data
