"""A device is set up: its folder, whom it trusts, and the model that it begins with.

1. The model is staged like any other: in a slot of its own, read back, and named by `current`.
2. `agent.toml` is written last: a device whose set-up was cut off is not set up, and the same command goes on.
3. What is there already stays: a second set-up with another model is refused, with the same one it changes nothing.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from edge_ilseg.devices.update import lifecycle
from edge_ilseg.devices.update.agent import AGENT_LOCK, INCOMING
from edge_ilseg.devices.update.agent_config import CONFIG_NAME, ROOT_NAME, AgentConfig, encode_agent_config
from edge_ilseg.devices.update.disk import RealDisk
from edge_ilseg.devices.update.lock import held
from edge_ilseg.devices.update.release import PackRef
from edge_ilseg.devices.update.slots import prepare, stage
from edge_ilseg.devices.update.state import AgentState
from edge_ilseg.errors import ConfigError, EdgeIlsegError, UpdateError
from edge_ilseg.files import disk_error, write_bytes
from edge_ilseg.progress import ProgressCallback, no_progress

FACTORY_PACK = "factory.pack"
MAX_ROOT_BYTES = 512_000


def set_up(
    root: Path, config: AgentConfig, bundle: Path, bootstrap: bytes, *, progress: ProgressCallback = no_progress
) -> AgentState:
    """Make `root` the folder of a device that begins with `bundle` (rules 1 to 3).

    Args:
        root: of the device; made if it is not there.
        config: written to `agent.toml`.
        bundle: the model that the device was delivered with.
        bootstrap: root metadata of the publisher, of any version.
        progress: told what is being done.

    Raises:
        BundleError: the bundle is damaged.
        ConfigError: the device is set up already, in another way.
        UpdateError: the root metadata is none, or the device was set up with another model.
    """
    check_bootstrap(bootstrap)
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / INCOMING).mkdir(exist_ok=True)
    except OSError as error:
        raise disk_error(error, root) from error
    with held(root / AGENT_LOCK, deadline_s=config.lock_deadline_s):
        _check_config(root, config)
        state = _install(root, bundle, progress)
        write_bytes(root / ROOT_NAME, bootstrap)
        write_bytes(root / CONFIG_NAME, encode_agent_config(config).encode())
    return state


def read_bootstrap(path: Path | None, repository: str) -> bytes:
    """The publisher's root metadata: of the file `path` or, without one, of a repository that is a folder.

    Raises:
        UpdateError: it cannot be read, or has to be named.
    """
    if path is None:
        path = Path(repository) / "metadata" / "1.root.json"
        if "://" in repository or not path.is_file():
            raise UpdateError(
                "the publisher's root metadata has to be given: trust cannot begin with what a server says",
                hint="copy metadata/1.root.json of the repository by a safe way, and name it: --trust FILE",
            )
    try:
        return path.read_bytes()[: MAX_ROOT_BYTES + 1]
    except OSError as error:
        raise UpdateError(
            "the root metadata cannot be read",
            where=path,
            found=error.strerror,
            hint="name a file that this user may read: --trust FILE",
        ) from error


def check_bootstrap(data: bytes) -> None:
    """Raise `UpdateError` when `data` is no root metadata that its own keys have signed."""
    from tuf.api.exceptions import RepositoryError
    from tuf.api.metadata import Metadata, Root

    hint = "give the publisher's metadata/1.root.json, or a later one"
    if len(data) > MAX_ROOT_BYTES:
        raise UpdateError("the root metadata is too large", found=f"{len(data)} bytes", hint=hint)
    try:
        metadata = Metadata[Root].from_bytes(data)
        if metadata.signed.type != Root.type:
            raise UpdateError("this is no root metadata", found=metadata.signed.type, expected=Root.type, hint=hint)
        metadata.signed.verify_delegate(Root.type, metadata.signed_bytes, metadata.signatures)
    except (RepositoryError, ValueError) as error:
        raise UpdateError("the root metadata cannot be used", found=str(error), hint=hint) from error


def _install(root: Path, bundle: Path, progress: ProgressCallback) -> AgentState:
    """Rule 1, by the same way that a published model takes."""
    from edge_ilseg.bundle import read_manifest
    from edge_ilseg.chunks import ChunkSource
    from edge_ilseg.devices.update.fetching import fetch_content, open_chunks
    from edge_ilseg.devices.update.transport import open_transport
    from edge_ilseg.pack import write_pack

    disk = RealDisk(root)
    created = datetime.fromisoformat(read_manifest(bundle).created)
    prepare(disk)
    progress("reading the bundle", 0.0)
    pack = root / INCOMING / FACTORY_PACK
    try:
        facts = write_pack(pack, bundle)
        reference = PackRef(FACTORY_PACK, facts.pack_bytes, facts.index_bytes, facts.content_id)
        source = ChunkSource(())
        transport = open_transport(str(root / INCOMING), timeout_s=60.0)
        fetched = fetch_content(transport, reference, source, root / INCOMING, deadline_s=3600.0, progress=progress)
        stage(disk, facts.content_id, fetched.index, open_chunks(fetched, source))
        now = datetime.now(UTC)
        state = lifecycle.install(
            disk, facts.content_id, release=0, time_floor=min(now, created.astimezone(UTC)), now=now
        )
        lifecycle.collect_garbage(disk)
        return state
    finally:
        pack.unlink(missing_ok=True)


def _check_config(root: Path, config: AgentConfig) -> None:
    """Rule 3."""
    from edge_ilseg.devices.update.agent_config import parse_agent_config, read_agent_config

    if not (root / CONFIG_NAME).exists():
        return
    try:
        found = read_agent_config(root)
    except EdgeIlsegError as error:
        raise ConfigError(
            "the device's agent.toml is damaged", where=root / CONFIG_NAME, found=error.what, hint="mend or remove it"
        ) from error
    if found != parse_agent_config(encode_agent_config(config), root / CONFIG_NAME):
        raise ConfigError(
            "this device is set up already, with other settings",
            where=root / CONFIG_NAME,
            hint="edit agent.toml; the model changes by a release alone",
        )
