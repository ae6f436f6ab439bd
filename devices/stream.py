"""Images through a model, with all that can overlap overlapping: decode and resize, run, and what the caller does.

1. Decoding and resizing run in a few threads, the model in as many as its session runs images at the same time (one,
   unless it was loaded for throughput), and the caller's work in the caller's: Pillow and both runtimes give up
   Python's lock while they compute.
2. Results come in the order of the ids. A few images are on their way (`ahead`), so memory does not grow with their
   number.
3. An image that cannot be read is a result with the reason; it ends nothing. What the model itself cannot do ends the
   stream: the next image would not fare better.
4. When the caller stops early, or fails, nothing that was not started is run.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_ilseg.devices.runtime import Session
from edge_ilseg.errors import DataError
from edge_ilseg.images import resize_image

READERS = 2
AHEAD = 5
"""Images on their way beside those that the model runs."""

T = TypeVar("T")
Read = Callable[[str], tuple[NDArray[np.uint8] | Image.Image, T]]
"""Image id -> the image at its own size (uint8, H x W x 3, or as `edge_ilseg.images.open_image` gives it), and what the
caller wants with it; raises `DataError`."""


class Streamed(NamedTuple, Generic[T]):
    """One image after the model, or the reason why it could not be read."""

    image_id: str
    mask_HW: NDArray[np.uint8] | None
    """Channels, uint8, at the model's input size."""
    extra: T | None
    """What `read` gave beside the image."""
    latency_ms: float
    """Wall time of the model alone."""
    error: DataError | None


class _Ready(NamedTuple, Generic[T]):
    input_HWC: NDArray[np.uint8] | None
    extra: T | None
    error: DataError | None


def stream(session: Session, ids: Iterable[str], read: Read[T]) -> Iterator[Streamed[T]]:
    """Run a model over images (rules 1 to 4).

    Args:
        session: the model.
        ids: which images, in order.
        read: gives an image; called from several threads.

    Raises:
        BundleError: the runtime cannot run the model.
    """

    def prepare(image_id: str) -> _Ready[T]:
        try:
            image, extra = read(image_id)
        except DataError as error:
            return _Ready(None, None, error)
        return _Ready(resize_image(image, session.input_height_px, session.input_width_px), extra, None)

    def run(image_id: str, waiting: Future[_Ready[T]]) -> Streamed[T]:
        ready = waiting.result()
        if ready.input_HWC is None:
            return Streamed(image_id, None, None, 0.0, ready.error)
        start_ns = time.perf_counter_ns()
        mask_HW = session.mask(ready.input_HWC)
        return Streamed(image_id, mask_HW, ready.extra, (time.perf_counter_ns() - start_ns) / 1e6, None)

    ahead = AHEAD + session.concurrent_runs
    with (
        ThreadPoolExecutor(READERS, "edge-ilseg-read") as readers,
        ThreadPoolExecutor(session.concurrent_runs, "edge-ilseg-run") as runner,
    ):
        under_way: deque[Future[Streamed[T]]] = deque()
        waiting_ids = iter(ids)
        try:
            for image_id in waiting_ids:
                under_way.append(runner.submit(run, image_id, readers.submit(prepare, image_id)))
                if len(under_way) >= ahead:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for waiting in under_way:
                waiting.cancel()
            readers.shutdown(wait=False, cancel_futures=True)
