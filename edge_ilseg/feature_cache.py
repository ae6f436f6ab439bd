"""The features of a frozen encoder, computed once for each view of an image and read in every later epoch.

1. Batches show what `edge_ilseg.data.order` says, and in the first `augment_views` epochs exactly what they show
   without a cache. In float32 the features and labels have the bits that the network would compute each time.
2. Views are computed where they are first needed, always in the same blocks of the size of a batch: what is computed
   does not depend on where a run was interrupted, nor on the number of processes.
3. What teacher and student have in common is kept: the encoder's features or, where all but the head is frozen, what
   the classifiers read. Where a method asks nothing of the teacher but its logits, these are kept at the features' size
   too, and the teacher rests after the first epochs.
4. Every batch is read back from the store, the first time too: no epoch sees other numbers than another.
5. Each process keeps all views, and computes those that it needs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from edge_ilseg.config import TrainConfig
from edge_ilseg.data.loader import TrainingSamples
from edge_ilseg.data.order import sample_views
from edge_ilseg.feature_store import FeatureStore, ViewShape, check_fits, file_store, memory_store, row_type
from edge_ilseg.feature_views import are_views_reused, check_views, needs_logits_alone
from edge_ilseg.methods import Method
from edge_ilseg.models.deeplab import DecoderBody, DeepLabV3
from edge_ilseg.models.normalization import normalize
from edge_ilseg.models.segmentation import SegmentationModel, SegmentationOutput, TrunkOutput

if TYPE_CHECKING:
    from lightning_fabric.wrappers import _FabricModule


class CachedViews(NamedTuple):
    """What is kept of the views of one batch, on the device; in the place of the images."""

    trunk: TrunkOutput
    """As `SegmentationModel.trunk` gives it; of the stages' outputs only the last is right (see `STAGE_TERMS`)."""
    teacher_logits_NKHW: Tensor | None
    """At the features' size; None where the teacher has to be run."""


def view_shape(network: SegmentationModel, *, with_body: bool, with_teacher: bool) -> ViewShape:
    """Sizes of what is kept of a view, without running the network."""
    spec = network.spec
    height, width = (-(-side // spec.output_stride) for side in (spec.input_height_px, spec.input_width_px))
    is_merged = with_body and isinstance(network.decoder, DeepLabV3)
    channels = network.encoder.out_channels
    if is_merged:
        channels = spec.decoder_channels + (channels if spec.skip_classifier else 0)
    return ViewShape(
        features_CHW=(channels, height, width),
        labels_HW=(spec.input_height_px, spec.input_width_px),
        teacher_KHW=(network.class_count, height, width) if with_teacher else None,
    )


def cache_bytes(settings: TrainConfig, image_count: int, shape: ViewShape) -> int:
    """How much a run will keep; 0 where nothing would be shown again."""
    if not are_views_reused(settings, image_count):
        return 0
    return settings.augment_views * image_count * row_type(shape, settings.feature_cache_dtype).itemsize


class FeatureCache:
    """The views of one run: an iterable of (views, labels), as often as wanted. Built by `open_cache`, to be closed."""

    def __init__(
        self,
        samples: TrainingSamples,
        network: SegmentationModel,
        store: FeatureStore,
        *,
        with_body: bool,
        autocast: Callable[[], AbstractContextManager[None]],
        memory_format: torch.memory_format,
        first: int,
        workers: int,
        process: tuple[int, int],
    ) -> None:
        self.store = store
        self._samples, self._network, self._with_body = samples, network, with_body
        self._autocast, self._images_format, self._workers = autocast, memory_format, workers
        self._first = first
        self._rank, self._world = process
        settings = samples.settings
        self._batch = settings.batch_size
        self._views = sample_views(len(samples), len(samples.view), settings.seed, settings.augment_views)
        self._kept_format, self._skip_format = self._find_formats()

    def __iter__(self) -> Iterator[tuple[CachedViews, Tensor]]:
        """The batches from the first iteration on, on the device; in several processes, this one's share of them."""
        decoded = iter(self._decoder())
        for iteration in range(self._first, self._samples.settings.iterations):
            numbers = self._numbers(iteration)
            for block in dict.fromkeys((numbers // self._batch).tolist()):
                if not self._is_kept(block):
                    self._fill(block, *next(decoded))
            yield self._read(numbers)

    def close(self) -> None:
        """Forget the views, and remove their file."""
        self.store.close()

    def _numbers(self, iteration: int) -> NDArray[np.int64]:
        batch = self._views[iteration * self._batch : (iteration + 1) * self._batch]
        return batch[self._rank :: self._world]

    def _decoder(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Images and labels of the blocks that are missing, in the order in which they are needed (rule 2)."""
        needed = (
            self._views[self._first * self._batch :].reshape(-1, self._batch)[:, self._rank :: self._world]
        ).ravel()
        blocks, places = np.unique(needed // self._batch, return_index=True)
        missing = [block for block in blocks[np.argsort(places)].tolist() if not self._is_kept(block)]
        return DataLoader(
            self._samples,
            batch_sampler=[list(self._block(block)) for block in missing],
            num_workers=self._workers,
            multiprocessing_context="spawn" if self._workers else None,
        )

    def _block(self, block: int) -> range:
        """The views that are computed together: always as many, so the last block begins within the one before."""
        count = len(self.store.is_kept)
        end = min((block + 1) * self._batch, count)
        return range(max(end - self._batch, 0), end)

    def _run_trunk(self, images_NHWC: Tensor) -> TrunkOutput:
        images_NCHW = normalize(images_NHWC.to(_device(self._network)), self._network.spec)
        images_NCHW = images_NCHW.contiguous(memory_format=self._images_format)
        return self._network.trunk(images_NCHW, len(self._network.encoder.stages), with_body=self._with_body)

    @torch.no_grad()
    def _find_formats(self) -> tuple[torch.memory_format, torch.memory_format]:
        """How the trunk lays out what is kept, from two black images: the tails' last bits depend on it.

        The second is that of what a second classifier reads; with none, of the features.
        """
        spec = self._network.spec
        black_NHWC = torch.zeros(2, spec.input_height_px, spec.input_width_px, 3, dtype=torch.uint8)
        with self._autocast():
            trunk = self._run_trunk(black_NHWC)
        return _format(trunk.body.merged_NCHW if trunk.body else trunk.x_NCHW), _format(trunk.x_NCHW)

    def _is_kept(self, block: int) -> bool:
        views = self._block(block)
        return bool(self.store.is_kept[views.start : views.stop].all())

    @torch.no_grad()
    def _fill(self, block: int, images_NHWC: Tensor, labels_NHW: Tensor) -> None:
        network = self._network
        logits_NKHW = None
        with self._autocast():
            trunk = self._run_trunk(images_NHWC)
            if self.store.has_teacher:
                logits_NKHW = network.decoder.classify(trunk.body or network.decoder.body(trunk.x_NCHW))[0]
        kept_NCHW = _kept(trunk)
        self.store.write(
            self._block(block),
            kept_NCHW.float().cpu().numpy(),
            labels_NHW.numpy().astype(np.uint8),
            None if logits_NKHW is None else logits_NKHW.float().cpu().numpy(),
        )

    def _read(self, numbers: NDArray[np.int64]) -> tuple[CachedViews, Tensor]:
        network, device = self._network, _device(self._network)
        features, labels, logits = self.store.read(numbers)
        x_NCHW = torch.from_numpy(features).to(device, non_blocking=True, memory_format=self._kept_format)
        trunk = TrunkOutput(
            x_NCHW=x_NCHW,
            stages=(x_NCHW,) * len(network.encoder.stages),
            body=_kept_body(network, x_NCHW, self._kept_format, self._skip_format) if self._with_body else None,
            height_px=labels.shape[1],
            width_px=labels.shape[2],
        )
        labels_NHW = torch.from_numpy(labels).to(device, non_blocking=True).long()
        return CachedViews(trunk, None if logits is None else torch.from_numpy(logits).to(device)), labels_NHW


def open_cache(
    loader: DataLoader[tuple[Tensor, Tensor]],
    network: SegmentationModel,
    method: Method,
    *,
    has_teacher: bool,
    autocast: Callable[[], AbstractContextManager[None]],
    memory_format: torch.memory_format = torch.channels_last,
    folder: Path | None = None,
    first: int = 0,
    process: tuple[int, int] = (0, 1),
) -> FeatureCache | None:
    """A cache in the place of a run's loader; None where no view would be shown twice.

    Args:
        loader: from `training_batches`; its workers decode and augment what is missing.
        network: the teacher, or the student where there is none: in eval mode in what is frozen, on its device.
        method: of the step.
        has_teacher: whether the method asks anything of the teacher.
        autocast: the precision in which features are computed.
        memory_format: of the images; what `normalize` gives if left out.
        folder: where the file is made, the step's hidden folder; None keeps everything in memory.
        first: iteration to begin with.
        process: number of this process, and how many there are.

    Raises:
        ConfigError: the method has no use for cached features.
        TrainingError: they do not fit into `feature_cache_mib`.
        EdgeIlsegError: the disk is full.
    """
    samples = loader.dataset.dataset if isinstance(loader.dataset, Subset) else loader.dataset
    if not isinstance(samples, TrainingSamples):
        raise TypeError(f"not a loader of training samples: {type(samples).__name__}")
    settings, image_count = samples.settings, len(samples.view)
    check_views(settings, method, network.spec.backbone)
    if not are_views_reused(settings, image_count):
        return None
    with_body = method.freeze == "all_but_head"
    shape = view_shape(network, with_body=with_body, with_teacher=has_teacher and needs_logits_alone(method))
    row = row_type(shape, settings.feature_cache_dtype)
    check_fits(settings.augment_views, image_count, row.itemsize, settings.feature_cache_mib)
    count = settings.augment_views * image_count
    if folder is None:
        store = memory_store(count, row)
    else:
        store = file_store(folder / f"features-{process[0]}", cache_key(samples, network, row), count, row)
    return FeatureCache(
        samples,
        network,
        store,
        with_body=with_body,
        autocast=autocast,
        memory_format=memory_format,
        first=first,
        workers=loader.num_workers,
        process=process,
    )


def cache_key(samples: TrainingSamples, network: SegmentationModel, row: np.dtype[np.void]) -> str:
    """SHA-256 over all that the views depend on: the network's state, the images' names, the settings, the row."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    view = samples.view
    digest.update(msgspec.json.encode([samples.spec, samples.settings, view.image_ids, view.lookup.tolist(), str(row)]))
    return digest.hexdigest()


def forward_cached(
    student: _FabricModule, teacher: SegmentationModel | None, views: CachedViews
) -> tuple[SegmentationOutput, SegmentationOutput | None]:
    """The outputs of the student and, where there is one, of the teacher: `trunk.forward_pair` from the trunk on.

    With kept logits the teacher is not run: its output has no branches then (rule 3).
    """
    trunk = views.trunk
    seen = None
    if teacher is not None and views.teacher_logits_NKHW is not None:
        size = (trunk.height_px, trunk.width_px)
        seen = SegmentationOutput(views.teacher_logits_NKHW, trunk.x_NCHW, (), trunk.stages, *size)
    elif teacher is not None:
        with torch.no_grad():
            seen = teacher.tail(trunk)
    output: SegmentationOutput = student.tail(trunk)
    return output, seen


def _kept(trunk: TrunkOutput) -> Tensor:
    """All that the rest of the network reads, side by side."""
    if trunk.body is None:
        return trunk.x_NCHW
    if trunk.body.skip_NCHW is None:
        return trunk.body.merged_NCHW
    return torch.cat([trunk.body.merged_NCHW, trunk.body.skip_NCHW], dim=1)


def _format(x_NCHW: Tensor) -> torch.memory_format:
    is_last = x_NCHW.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


def _kept_body(
    network: SegmentationModel, kept_NCHW: Tensor, merged_format: torch.memory_format, skip_format: torch.memory_format
) -> DecoderBody:
    """What the classifiers read, from what `_kept` has put together, laid out as they would get it (rule 1)."""
    if not network.spec.skip_classifier:
        return DecoderBody(kept_NCHW, ())
    merged = network.spec.decoder_channels
    merged_NCHW = kept_NCHW[:, :merged].contiguous(memory_format=merged_format)
    return DecoderBody(merged_NCHW, (), kept_NCHW[:, merged:].contiguous(memory_format=skip_format))


def _device(network: SegmentationModel) -> torch.device:
    return next(network.parameters()).device
