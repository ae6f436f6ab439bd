"""A publisher and devices that follow him, in folders: everything real, nothing trained."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from edge_ilseg.bundle import read_manifest
from edge_ilseg.devices.application import Application, CurrentModel
from edge_ilseg.devices.loaded_bundle import load_bundle
from edge_ilseg.devices.update.agent import Agent
from edge_ilseg.devices.update.agent_config import AgentConfig
from edge_ilseg.devices.update.agent_setup import set_up
from edge_ilseg.devices.update.gate_records import GateSettings
from edge_ilseg.devices.update.release import WatchLimits
from edge_ilseg.publishing.keys import KeyRing
from edge_ilseg.publishing.releases import ReleaseRequest, halt, init_repository, publish_release

WATCH = WatchLimits(min_frames=3, min_seconds=0.0)
"""A trial that a test can sit through."""


class Publisher:
    """A repository with its keys."""

    def __init__(self, folder: Path) -> None:
        self.repository = folder / "repo"
        self.ring = KeyRing([folder / "keys"], environment={}, unencrypted=True)
        init_repository(self.repository, self.ring, datetime.now(UTC))

    @property
    def bootstrap(self) -> bytes:
        return (self.repository / "metadata/1.root.json").read_bytes()

    def publish(self, bundle: Path, *, validation: Path | None = None, **request: Any) -> int:
        """The number of the new release."""
        wanted = ReleaseRequest(**{"watch": WATCH, **request})
        now = datetime.now(UTC)
        published = publish_release(self.repository, bundle, self.ring, wanted, now, validation=validation)
        return published.release.release

    def halt(self, number: int, reason: str = "too many fell") -> None:
        halt(self.repository, self.ring, number, reason, datetime.now(UTC))


class Device:
    """A device that was set up with a bundle."""

    def __init__(self, root: Path, publisher: Publisher, bundle: Path, *, name: str = "cam-1", **settings: Any) -> None:
        self.root = root
        self.reports = root.with_name(f"{root.name}-reports")
        self.reports.mkdir()
        repository = str(settings.pop("repository", publisher.repository))
        fields = {key: settings.pop(key) for key in tuple(settings) if key in AgentConfig.__struct_fields__}
        gate = GateSettings(**{"latency_runs": 2, **settings})
        config = AgentConfig(repository, name, reports=str(self.reports), gate=gate, **fields)
        set_up(root, config, bundle, publisher.bootstrap)
        self.agent = Agent(root, config)

    @property
    def runs(self) -> str:
        """Bundle id of the model that `current` names."""
        return read_manifest(self.root / "current/bundle").bundle_id

    def told(self) -> list[dict[str, Any]]:
        """The reports that were delivered, in their order."""
        found = [json.loads(path.read_bytes()) for path in self.reports.glob("*.json")]
        return sorted(found, key=lambda report: report["sequence"])

    def use(self, frames: int = 5) -> CurrentModel:
        """The application starts, and runs the model on frames."""
        with Application(self.root) as application:
            current = application.current()
            manifest = read_manifest(current.folder)
            entry = manifest.models[0]
            session = load_bundle(current.folder, manifest, entry.runtime, entry.precision, None).session
            rng = np.random.default_rng(0)
            for _ in range(frames):
                size = (session.input_height_px, session.input_width_px, 3)
                application.frame_done(session.mask(rng.integers(0, 256, size, dtype=np.uint8)), 1.0)
            return current


def bundle_id(bundle: Path) -> str:
    """Of a bundle's folder."""
    return read_manifest(bundle).bundle_id
