"""Step records for tests."""

from __future__ import annotations

import msgspec

from edge_ilseg.checkpoint import FORMAT, FORMAT_VERSION, ClassRecord, DataRecord, StepRecord
from edge_ilseg.config import TrainConfig
from edge_ilseg.methods import METHODS
from edge_ilseg.models.spec import ModelSpec

SPEC = ModelSpec(backbone="tiny", decoder_channels=16, input_height_px=32, input_width_px=48)


def make_record(**changes: object) -> StepRecord:
    record = StepRecord(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        id="",
        index=1,
        name="01-boat",
        created="2026-01-01T00:00:00+00:00",
        parent_id="0" * 64,
        parent_name="00-base",
        classes=(ClassRecord("sky", 0, (1, 2, 3)), ClassRecord("sea", 0, (4, 5, 6)), ClassRecord("boat", 1, (7, 8, 9))),
        background=None,
        method=METHODS["kd-output"],
        model=SPEC,
        initial_weights="0" * 64,
        initial_weights_sha256=None,
        training=TrainConfig(),
        data=DataRecord("shapes", {"seed": 1}, True, "train", "sequential", 0, ("a", "b"), "1" * 64),
        packages={"torch": "2"},
        accelerator="cpu",
        training_seconds=1.5,
        weights_sha256="",
        weights_bytes=0,
        encoder_sha256="",
        metrics={},
        parent_metrics={},
    )
    return msgspec.structs.replace(record, **changes)
