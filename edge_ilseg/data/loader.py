"""Training batches: augmented, seeded, and the same whatever the number of worker processes. Imports torch.

1. Sample k of a run is a function of (seed, k) and of the images alone: epoch k // n has its own permutation of the n
   images, and the augmentation of sample k its own random stream.
2. Every image is seen once before any is seen twice.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, get_worker_info

from edge_ilseg.config import TrainConfig
from edge_ilseg.data.order import epoch_order as epoch_order
from edge_ilseg.data.step_view import StepView
from edge_ilseg.data.transforms import Augmentation, augment
from edge_ilseg.models.spec import ModelSpec, normalization

DECODED_CACHE_BYTES = 1 << 30
"""Decoded images that are kept in memory, all processes together."""


class TrainingSamples(Dataset[tuple[Tensor, Tensor]]):
    """Sample k -> (image uint8 H x W x 3, labels int64 H x W); rule 1 says how."""

    def __init__(self, view: StepView, spec: ModelSpec, settings: TrainConfig) -> None:
        self.view = view
        self.spec = spec
        self.settings = settings
        mean, _ = normalization(spec.backbone)
        self.fill = (round(mean[0]), round(mean[1]), round(mean[2]))
        self._decoded: dict[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]] = {}
        self._decoded_bytes = 0

    def __len__(self) -> int:
        """Samples of the whole run, not images."""
        return self.settings.iterations * self.settings.batch_size

    def _read(self, image_id: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        if image_id not in self._decoded:
            pair = self.view.read(image_id)
            size_bytes = pair[0].nbytes + pair[1].nbytes
            worker = get_worker_info()
            if self._decoded_bytes + size_bytes > DECODED_CACHE_BYTES // (worker.num_workers if worker else 1):
                return pair
            self._decoded[image_id] = pair
            self._decoded_bytes += size_bytes
        return self._decoded[image_id]

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        """Sample k of the run."""
        settings, spec = self.settings, self.spec
        epoch, position = divmod(k, len(self.view.image_ids))
        image_id = self.view.image_ids[epoch_order(len(self.view.image_ids), settings.seed, epoch)[position]]
        image_HWC, channels_HW = augment(
            *self._read(image_id),
            Augmentation(settings.scale_min, settings.scale_max, settings.flip, settings.geometry == "native"),
            height_px=spec.input_height_px,
            width_px=spec.input_width_px,
            fill=self.fill,
            rng=np.random.default_rng([settings.seed, 1, k]),
        )
        image_HWC, channels_HW = np.ascontiguousarray(image_HWC), np.ascontiguousarray(channels_HW)
        return torch.from_numpy(image_HWC), torch.from_numpy(channels_HW).long()


def training_batches(
    view: StepView,
    spec: ModelSpec,
    settings: TrainConfig,
    *,
    first_iteration: int = 0,
    workers: int = 0,
    devices: int = 1,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of a whole run in their order: images uint8 N x H x W x 3, labels int64 N x H x W.

    With several devices N is a device's part of the batch; Fabric gives each process every `devices`-th sample, so that
    together they see what one process would. A run that goes on after a kill starts with `first_iteration`; no sample
    before it is decoded (rule 1).
    """
    samples = TrainingSamples(view, spec, settings)
    left = Subset(samples, range(first_iteration * settings.batch_size, len(samples)))
    return DataLoader(
        left if first_iteration else samples,
        batch_size=settings.batch_size // devices,
        shuffle=False,
        num_workers=workers,
        persistent_workers=workers > 0,
        # A forked worker inherits locks of threads that it does not have (OpenMP's, a runtime's).
        multiprocessing_context="spawn" if workers else None,
    )
