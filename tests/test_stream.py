"""Images through a model, one after another and several under way: order, bad ones, the end, and memory."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import COLORS, GROWN, color_images, color_network, nearest_color, write_bundle
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from edge_ilseg.bundle import Runtime
from edge_ilseg.devices import stream as stream_module
from edge_ilseg.devices.runtime import Session, load_session
from edge_ilseg.devices.stream import AHEAD, Streamed, stream
from edge_ilseg.errors import BundleError, DataError
from edge_ilseg.images import read_image, resize_image

NAMES = tuple(GROWN)
PATIENCE_S = 60.0
"""How long a test waits for what must happen before it gives up; none waits so long when all is well."""


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> dict[Runtime, Session]:
    folder = tmp_path_factory.mktemp("bundles") / "both"
    manifest = write_bundle(folder, GROWN, step_id="a", models=(("onnxruntime", "fp32"), ("openvino", "fp32")))
    return {entry.runtime: load_session(folder, entry, threads=1) for entry in manifest.models}


@pytest.fixture
def session(sessions: dict[Runtime, Session]) -> Session:
    return sessions["onnxruntime"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert own_threads() == []


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("edge-ilseg")]


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.001)


class Watched:
    """A session that tells which images it is given; a test may hold it up. Images are known by their first level."""

    def __init__(self, session: Session, before: Callable[[int], None] | None = None) -> None:
        self.input_height_px, self.input_width_px = session.input_height_px, session.input_width_px
        self.concurrent_runs = session.concurrent_runs
        self._session, self._before = session, before
        self.masked: list[int] = []
        self.threads: set[int] = set()

    def mask(self, image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        number = int(image_HWC[0, 0, 0])
        self.threads.add(threading.get_ident())
        if self._before is not None:
            self._before(number)
        mask_HW = self._session.mask(image_HWC)
        self.masked.append(number)
        return mask_HW


class Source:
    """Images whose every level is their number, and which of them were asked for."""

    def __init__(self, session: Session | Watched, before: Callable[[int], None] | None = None) -> None:
        self._shape = (session.input_height_px, session.input_width_px, 3)
        self._before = before
        self.started: list[int] = []

    def read(self, image_id: str) -> tuple[NDArray[np.uint8], str]:
        number = int(image_id)
        self.started.append(number)
        if self._before is not None:
            self._before(number)
        return np.full(self._shape, number, np.uint8), f"extra of {image_id}"


def ids(count: int) -> list[str]:
    return [str(number) for number in range(count)]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_masks_come_in_the_order_of_the_ids_with_what_was_read_beside_them(
    runtime: Runtime, sessions: dict[Runtime, Session]
) -> None:
    images = dict(zip(ids(40), color_images(40, NAMES, seed=1), strict=True))
    found = list(stream(sessions[runtime], images, lambda image_id: (images[image_id], f"extra of {image_id}")))
    assert [item.image_id for item in found] == list(images)
    for item in found:
        assert item.mask_HW is not None
        np.testing.assert_array_equal(item.mask_HW, nearest_color(images[item.image_id], NAMES))
        assert (item.extra, item.error) == (f"extra of {item.image_id}", None)
        assert item.latency_ms > 0


def test_an_image_that_takes_long_to_read_is_waited_for(session: Session) -> None:
    """Image 0 is not ready before image 1 is: two are read at once, and the order stays."""
    one_is_read = threading.Event()

    def before(number: int) -> None:
        if number == 0:
            assert one_is_read.wait(PATIENCE_S)

    source = Source(session, before)

    def read(image_id: str) -> tuple[NDArray[np.uint8], str]:
        result = source.read(image_id)
        if image_id == "1":
            one_is_read.set()
        return result

    assert [item.extra for item in stream(session, ids(5), read)] == [f"extra of {number}" for number in range(5)]


def test_an_image_of_another_size_is_brought_to_the_size_of_the_model(session: Session) -> None:
    image_HWC = color_images(1, NAMES, seed=2)[0].repeat(3, axis=0).repeat(2, axis=1)[:-5]
    (item,) = stream(session, ["x"], lambda _: (image_HWC, None))
    expected_HWC = resize_image(image_HWC, session.input_height_px, session.input_width_px)
    np.testing.assert_array_equal(item.mask_HW, nearest_color(expected_HWC, NAMES))


def test_a_bad_image_in_the_middle_is_a_result_with_its_reason_and_the_others_go_on(
    session: Session, tmp_path: Path
) -> None:
    images = color_images(9, NAMES, seed=3)
    for number, image_HWC in enumerate(images):
        Image.fromarray(image_HWC).save(tmp_path / f"{number}.png")
    whole = (tmp_path / "4.png").read_bytes()
    (tmp_path / "4.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "7.png").unlink()
    found = list(stream(session, ids(9), lambda name: (read_image(tmp_path / f"{name}.png"), name)))
    assert [item.image_id for item in found] == ids(9)
    for number, item in enumerate(found):
        if number in (4, 7):
            assert (item.mask_HW, item.extra, item.latency_ms) == (None, None, 0.0)
            assert f"{number}.png" in str(item.error)
        else:
            np.testing.assert_array_equal(item.mask_HW, nearest_color(images[number], NAMES))
            assert item.error is None


def test_images_that_are_all_bad_are_all_told_and_nothing_is_run(session: Session) -> None:
    watched = Watched(session)

    def read(image_id: str) -> tuple[NDArray[np.uint8], None]:
        raise DataError(f"no {image_id}")

    found = list(stream(watched, ids(20), read))  # type: ignore[arg-type]
    assert [str(item.error) for item in found] == [f"no {number}" for number in range(20)]
    assert watched.masked == []


def test_no_images_give_no_results(session: Session) -> None:
    assert list(stream(session, [], Source(session).read)) == []


def test_the_model_is_run_in_one_thread_that_is_not_the_callers(session: Session) -> None:
    """A session is not safe for use from several threads."""
    watched = Watched(session)
    assert len(list(stream(watched, ids(30), Source(watched).read))) == 30  # type: ignore[arg-type]
    assert watched.masked == list(range(30))
    assert len(watched.threads) == 1
    assert threading.get_ident() not in watched.threads


def test_reading_the_model_and_the_callers_work_go_on_at_once(session: Session) -> None:
    """Each of them waits for what another one does with a later image: one after another, they would wait for ever."""
    read_two, masked_one = threading.Event(), threading.Event()

    def before_mask(number: int) -> None:
        if number == 0:
            assert read_two.wait(PATIENCE_S)
        if number == 1:
            masked_one.set()

    watched = Watched(session, before_mask)
    source = Source(watched, lambda number: read_two.set() if number == 2 else None)
    results = stream(watched, ids(10), source.read)  # type: ignore[arg-type]
    assert next(results).image_id == "0"
    assert masked_one.wait(PATIENCE_S)  # while image 0 is the caller's
    assert [item.image_id for item in results] == ids(10)[1:]


def test_no_more_than_a_few_images_are_under_way_however_slow_the_caller_is(session: Session) -> None:
    source = Source(session)
    asked = 0

    def endless_ids() -> Iterator[str]:
        nonlocal asked
        for number in itertools.count():
            asked += 1
            yield str(number % 200)

    results = stream(session, endless_ids(), source.read)
    for received, _ in enumerate(itertools.islice(results, 25), start=1):
        wait_until(
            lambda n=received: len(source.started) == n - 1 + AHEAD + 1
        )  # one runs; the one in hand is one of them
        time.sleep(0.002)
        assert len(source.started) == asked == received - 1 + AHEAD + 1
    results.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_session_for_throughput_gives_the_same_masks_in_the_same_order(runtime: Runtime, tmp_path: Path) -> None:
    manifest = write_bundle(tmp_path / "b", GROWN, step_id="a", models=((runtime, "fp32"),))
    session = load_session(tmp_path / "b", manifest.models[0], threads=2, hint="throughput")
    assert session.concurrent_runs >= (2 if runtime == "onnxruntime" else 1)
    images = color_images(60, NAMES, seed=9)
    found = list(stream(session, ids(60), lambda image_id: (images[int(image_id)], None)))
    assert [item.image_id for item in found] == ids(60)
    for item, image_HWC in zip(found, images, strict=True):
        assert item.mask_HW is not None
        np.testing.assert_array_equal(item.mask_HW, nearest_color(image_HWC, NAMES))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_as_many_threads_as_a_session_says_may_use_it_at_once(runtime: Runtime, tmp_path: Path) -> None:
    manifest = write_bundle(tmp_path / "b", GROWN, step_id="a", models=((runtime, "fp32"),))
    session = load_session(tmp_path / "b", manifest.models[0], threads=4, hint="throughput")
    images = color_images(200, NAMES, seed=10)
    with ThreadPoolExecutor(session.concurrent_runs) as pool:
        masks = list(pool.map(session.mask, images))
    for mask_HW, image_HWC in zip(masks, images, strict=True):
        np.testing.assert_array_equal(mask_HW, nearest_color(image_HWC, NAMES))


def failing_network() -> onnx.ModelProto:
    """The nearest colour, and an index that is out of bounds where an image has a level above 250."""
    network = color_network(NAMES)
    graph = network.graph
    graph.node[-1].output[0] = "right_mask"
    graph.node.extend(
        [
            helper.make_node("ReduceMax", ["float_NHWC"], ["highest_float"], keepdims=0),
            helper.make_node("Cast", ["highest_float"], ["highest"], to=TensorProto.INT64),
            helper.make_node("Gather", ["zeros", "highest"], ["zero"]),
            helper.make_node("Add", ["right_mask", "zero"], ["mask"]),
        ]
    )
    graph.initializer.append(numpy_helper.from_array(np.zeros(251, np.uint8), "zeros"))
    return network


def test_what_the_model_cannot_do_ends_the_stream_after_the_images_before(tmp_path: Path) -> None:
    manifest = write_bundle(tmp_path / "b", GROWN, step_id="a", network=failing_network())
    session = load_session(tmp_path / "b", manifest.models[0], threads=1)
    source = Source(session)

    def read(image_id: str) -> tuple[NDArray[np.uint8], str]:
        image_HWC, extra = source.read(image_id)
        image_HWC[0, 0, 0] = 255 if image_id == "5" else 0
        return image_HWC, extra

    seen: list[str] = []
    with pytest.raises(BundleError, match="onnxruntime could not run the model"):
        collect(seen, stream(session, ids(100), read))
    assert seen == ids(5)
    assert max(source.started) < 5 + AHEAD + 1
    assert own_threads() == []


def collect(seen: list[str], results: Iterator[Streamed[str]]) -> None:
    for item in results:
        seen.append(item.image_id)


def test_a_defect_in_reading_is_no_bad_image(session: Session) -> None:
    def read(image_id: str) -> tuple[NDArray[np.uint8], None]:
        raise ZeroDivisionError(image_id)

    with pytest.raises(ZeroDivisionError):
        list(stream(session, ids(3), read))
    assert own_threads() == []


class Stopped:
    """A stream that is held up in the middle until its caller has stopped.

    Image 0 is in the caller's hands and image 1 has been run; images 2 and 3 are being read, and get no further before
    the pools are shut down; 4 and 5 wait.
    """

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        stopped = threading.Event()

        class Pool(ThreadPoolExecutor):
            def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
                super().shutdown(wait=False, cancel_futures=cancel_futures)
                stopped.set()
                super().shutdown(wait=wait)

        def before(number: int) -> None:
            if number >= 2:
                assert stopped.wait(PATIENCE_S)

        monkeypatch.setattr(stream_module, "ThreadPoolExecutor", Pool)
        self.watched = Watched(session)
        self.source = Source(session, before)

    def results(self) -> Iterator[Streamed[str]]:
        return stream(self.watched, ids(50), self.source.read)  # type: ignore[arg-type]

    def wait_for_the_middle(self) -> None:
        wait_until(lambda: self.watched.masked == [0, 1] and sorted(self.source.started) == [0, 1, 2, 3])

    def check_nothing_more_was_run(self) -> None:
        assert own_threads() == []
        assert sorted(self.source.started) == [0, 1, 2, 3]
        assert self.watched.masked in ([0, 1], [0, 1, 2])  # the model was waiting for image 2


def test_a_caller_that_stops_early_lets_nothing_else_start_and_leaves_no_thread(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = Stopped(session, monkeypatch)
    results = stopped.results()
    assert next(results).image_id == "0"
    stopped.wait_for_the_middle()
    results.close()  # type: ignore[attr-defined]
    stopped.check_nothing_more_was_run()
    assert list(results) == []


def test_a_caller_that_fails_lets_nothing_else_start_and_leaves_no_thread(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = Stopped(session, monkeypatch)

    def work(results: Iterator[Streamed[str]]) -> None:
        for item in results:
            stopped.wait_for_the_middle()
            raise BundleError(f"not {item.image_id}")

    with contextlib.suppress(BundleError):
        work(stopped.results())
    stopped.check_nothing_more_was_run()


def test_a_stream_that_nobody_asks_reads_nothing(session: Session) -> None:
    source = Source(session)
    results = stream(session, ids(5), source.read)
    assert source.started == []
    results.close()  # type: ignore[attr-defined]


def test_memory_is_flat_over_ten_thousand_images(tmp_path: Path) -> None:
    size_px = 8
    network = color_network(NAMES, height_px=size_px, width_px=size_px)
    manifest = write_bundle(tmp_path / "b", GROWN, step_id="a", network=network, input_px=(size_px, size_px))
    session = load_session(tmp_path / "b", manifest.models[0], threads=1)
    image_HWC = np.full((size_px, size_px, 3), COLORS["boat"], np.uint8)
    held_bytes = {}
    tracemalloc.start()
    try:
        numbers = (str(number) for number in range(10_000))
        for done, item in enumerate(stream(session, numbers, lambda _: (image_HWC.copy(), None)), start=1):
            assert item.mask_HW is not None
            assert (item.mask_HW == NAMES.index("boat")).all()
            if done in (1000, 10_000):
                held_bytes[done] = tracemalloc.get_traced_memory()[0]
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert done == 10_000
    assert held_bytes[10_000] - held_bytes[1000] < 9000 * 10  # a mask and its array are 180 bytes
    assert peak_bytes - held_bytes[1000] < 200_000
