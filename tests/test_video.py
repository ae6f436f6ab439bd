"""Videos: their frames are those that were encoded, upright, in order, and damage is named and never a traceback."""

from __future__ import annotations

import struct
import sys
import threading
from pathlib import Path

import av
import numpy as np
import pytest
from bundles import GROWN, color_images, nearest_color, write_bundle
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

from edge_ilseg.cli.predict import predict
from edge_ilseg.devices import video
from edge_ilseg.devices.prediction import Predictions, parse_predictions, predict_images
from edge_ilseg.devices.sources import Source, SourceReader, find_sources, frame_numbers
from edge_ilseg.devices.video import NoFrameError, VideoFrames, most_frames
from edge_ilseg.errors import DataError, MissingPackageError

NAMES = list(GROWN)
COUNT = 6
ENCODERS = {
    # suffix -> codec, pixel format, options: good enough that no pixel comes near another class
    ".mp4": ("libx264", "yuv420p", {"crf": "1"}),
    ".mov": ("mpeg4", "yuv420p", {"b": "5M"}),
    ".mkv": ("ffv1", "bgr0", {}),
    ".webm": ("libvpx", "yuv420p", {"b": "5M"}),
    ".avi": ("mpeg4", "yuv420p", {"b": "5M"}),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "boat"
    write_bundle(folder, GROWN, step_id="b" * 64, parent_id="a" * 64)
    return folder


@pytest.fixture(scope="module")
def frames() -> NDArray[np.uint8]:
    """Images with noise: uint8, N x H x W x 3."""
    return color_images(COUNT, NAMES, seed=21)


def encode(
    path: Path,
    frames_NHWC: NDArray[np.uint8],
    *,
    turned_deg: int | None = None,
    layout: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """A video of the frames.

    Args:
        turned_deg: to be turned counter-clockwise by so much when it is shown.
        layout: options of the file; `options` are the encoder's.
    """
    codec, pixels, quality = ENCODERS[path.suffix]
    with av.open(path, "w", options=layout) as container:
        stream = container.add_stream(codec, rate=10, options={**quality, **options})
        stream.height, stream.width, stream.pix_fmt = *frames_NHWC.shape[1:3], pixels
        if turned_deg is not None:
            stream.set_display_rotation(turned_deg)
        for frame_HWC in frames_NHWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode())
    return path


def packet_places(path: Path) -> list[tuple[int, int]]:
    """Where the packets of a video lie in its file, and how long they are: bytes."""
    with av.open(path) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def look(bundle: Path, out: Path, *arguments: object) -> Predictions:
    return predict_images(bundle, [str(item) for item in arguments], out, runtime="onnxruntime", threads=1)


def stored_mask(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.array(image)


@pytest.mark.parametrize("suffix", ENCODERS)
def test_a_video_gives_a_mask_a_frame(suffix: str, bundle: Path, frames: NDArray[np.uint8], tmp_path: Path) -> None:
    found = look(bundle, tmp_path / "out", encode(tmp_path / f"clip{suffix}", frames))
    assert (found.exit_code, found.bad_images) == (0, ())
    assert [(item.frame, item.mask) for item in found.images] == [
        (number, f"masks/clip/{number:04}.png") for number in range(COUNT)
    ]
    for frame_HWC, image in zip(frames, found.images, strict=True):
        np.testing.assert_array_equal(stored_mask(tmp_path / "out" / image.mask), nearest_color(frame_HWC, NAMES))


def test_the_pixels_of_a_video_without_loss_are_those_that_were_encoded(
    frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    sources = find_sources([str(encode(tmp_path / "clip.mkv", frames))])
    with SourceReader(sources) as reader:
        np.testing.assert_array_equal(np.stack([reader.read(source) for source in sources]), frames)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_video_that_was_filmed_with_a_turned_camera_is_turned_upright(
    quarters: int, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    """The oracle is the matrix of the track: where it sends a point that lies to the right (y is down)."""
    path = encode(tmp_path / "clip.mp4", frames, turned_deg=90 * quarters)
    data = path.read_bytes()
    across, down = (value >> 16 for value in struct.unpack_from(">2i", data, data.index(b"tkhd") + 44))
    assert (across, down) == {1: (0, -1), 2: (-1, 0), 3: (0, 1)}[quarters]  # right goes up, to the left, down
    (source, *_) = sources = find_sources([str(path)])
    with SourceReader(sources) as reader:
        found_HWC = reader.read(source)
    assert found_HWC.flags.c_contiguous
    np.testing.assert_array_equal(nearest_color(found_HWC, NAMES), np.rot90(nearest_color(frames[0], NAMES), quarters))


def test_frames_that_are_asked_for_from_several_threads_are_the_right_ones(tmp_path: Path) -> None:
    many = color_images(24, NAMES, seed=5)
    sources = find_sources([str(encode(tmp_path / "clip.mkv", many))])
    found: dict[int, NDArray[np.uint8]] = {}
    with SourceReader(sources) as reader:

        def read_every_third(start: int) -> None:
            for source in sources[start::3]:
                found[source.frame or 0] = reader.read(source)

        threads = [threading.Thread(target=read_every_third, args=(start,)) for start in (2, 1, 0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    np.testing.assert_array_equal(np.stack([found[number] for number in range(24)]), many)


def test_frames_are_decoded_when_they_are_asked_for_and_not_all_at_once(
    frames: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    upright = VideoFrames._upright

    def counted(self: VideoFrames, frame: av.VideoFrame, number: int) -> NDArray[np.uint8] | DataError:
        made.append(number)
        return upright(self, frame, number)

    monkeypatch.setattr(VideoFrames, "_upright", counted)
    decoder = VideoFrames(encode(tmp_path / "clip.mkv", frames), "clip.mkv")
    assert made == []
    for number in range(3):
        decoder.decode(number)
        assert made == list(range(number + 1))
    decoder.close()


def test_a_video_is_closed_after_its_last_frame_and_by_a_reader_that_is_left(
    frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    paths = [str(encode(tmp_path / f"{number}.mp4", frames)) for number in range(3)]
    sources = find_sources(paths)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with SourceReader(sources) as reader:
        for source in sources:
            reader.read(source)
        assert len(list(Path("/proc/self/fd").iterdir())) == before
    with SourceReader(sources) as reader:
        reader.read(sources[0])
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    with pytest.raises(DataError, match="was closed"):
        reader.read(sources[1])


def test_a_video_of_one_frame_is_a_video(frames: NDArray[np.uint8], tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mp4", frames[:1])
    assert find_sources([str(path)]) == (Source(path, 0, "clip/0000"),)


def test_videos_in_a_folder_are_found_beside_images(frames: NDArray[np.uint8], tmp_path: Path) -> None:
    encode(tmp_path / "clip.webm", frames[:2])
    Image.fromarray(frames[0]).save(tmp_path / "a.png")
    assert [source.name for source in find_sources([str(tmp_path)])] == ["a", "clip/0000", "clip/0001"]


# what is not installed, and what is damaged


def test_without_pyav_a_video_is_an_error_that_names_the_extra_before_anything_is_run(
    bundle: Path, frames: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = encode(tmp_path / "clip.mp4", frames)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'edge-ilseg\[video\]'") as raised:
        look(bundle, tmp_path / "out", path)
    assert str(path) in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_damaged_packet_spoils_the_frames_up_to_the_next_key_frame(
    bundle: Path, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    path = encode(tmp_path / "clip.avi", frames, g="3")  # frames 0 and 3 are key frames
    places = packet_places(path)
    data = bytearray(path.read_bytes())
    place, size = places[1]
    place = data.index(b"00dc", place) + 8 if data[place : place + 4] == b"00dc" else place
    data[place : place + size] = b"\0" * size
    path.write_bytes(data)
    found = look(bundle, tmp_path / "out", path)
    assert [item.frame for item in found.images] == [0, 3, 4, 5]
    assert [item.frame for item in found.bad_images] == [1, 2]
    assert f"{path}, frame 1" in found.bad_images[0].reason
    assert found.exit_code == 3
    shown = CliRunner().invoke(predict, [str(bundle), str(path), "--out", str(tmp_path / "again"), "--threads", "1"])
    assert shown.output.count("bad image:") == 1
    assert "and 1 more" in " ".join(shown.output.split())
    assert "4 of 6 images" in shown.output


@pytest.mark.parametrize("suffix", ENCODERS)
@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_a_video_that_breaks_off_gives_the_frames_before_and_no_traceback(
    suffix: str, share: float, bundle: Path, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    path = encode(tmp_path / f"clip{suffix}", frames)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    found = look(bundle, tmp_path / "out", path)
    assert [item.frame for item in found.images] == list(range(len(found.images)))
    assert len(found.images) < COUNT
    assert all(str(path) in item.reason for item in found.bad_images)
    if suffix not in (".mkv", ".webm"):  # these are made to be cut anywhere, and do not tell
        assert len(found.bad_images) == 1


def test_an_mp4_whose_index_says_more_than_there_is_has_a_bad_image_where_it_breaks_off(
    bundle: Path, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    path = encode(tmp_path / "clip.mp4", frames, layout={"movflags": "+faststart"}, g="1")
    place, size = packet_places(path)[3]
    path.write_bytes(path.read_bytes()[: place + size // 2])
    found = look(bundle, tmp_path / "out", path)
    assert [item.frame for item in found.images] == [0, 1, 2]
    assert [item.frame for item in found.bad_images] == [3]


@pytest.mark.parametrize(
    "content", [b"", b"no video", b"#EXTM3U\n#EXTINF:10,\nhttp://localhost/a.mp4\n#EXT-X-ENDLIST\n"]
)
def test_a_file_that_is_no_video_is_one_bad_image_that_is_named(content: bytes, bundle: Path, tmp_path: Path) -> None:
    """A playlist would make FFmpeg open what it names."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    result = CliRunner().invoke(predict, [str(bundle), str(path), "--out", str(tmp_path / "out"), "--json"])
    found = parse_predictions(result.stdout_bytes)
    assert [(item.file, item.frame) for item in found.bad_images] == [(str(path), None)]
    assert "the video is truncated or damaged" in found.bad_images[0].reason
    assert (result.exit_code, found.images) == (3, ())


def test_a_video_that_is_missing_is_a_bad_image(bundle: Path, tmp_path: Path) -> None:
    found = look(bundle, tmp_path / "out", tmp_path / "nowhere.mp4")
    assert "a video is missing" in found.bad_images[0].reason


def test_a_file_of_sound_alone_has_no_frames(bundle: Path, tmp_path: Path) -> None:
    with av.open(tmp_path / "clip.mp4", "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    assert frame_numbers(tmp_path / "clip.mp4") == ()
    found = look(bundle, tmp_path / "out", tmp_path / "clip.mp4")
    assert (len(found.images), len(found.bad_images)) == (0, 1)
    assert "there is no picture in it" in found.bad_images[0].reason


def test_packets_that_show_nothing_are_no_images_and_not_bad(
    bundle: Path, frames: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = encode(tmp_path / "clip.mp4", frames)
    monkeypatch.setattr("edge_ilseg.devices.sources.most_frames", lambda path: most_frames(path) + 2)
    sources = find_sources([str(path)])
    assert len(sources) == COUNT + 2
    with SourceReader(sources) as reader, pytest.raises(NoFrameError):
        [reader.read(source) for source in sources]
    found = look(bundle, tmp_path / "out", path)
    assert (len(found.images), found.bad_images, found.exit_code) == (COUNT, (), 0)


class FakeFrame:
    is_corrupt = True


class FakeVideo:
    """A file of one packet, and the frames that it is decoded to."""

    size = 1
    video = (None,)

    def __init__(self, *frames: FakeFrame) -> None:
        self.frames, self.streams = frames, self

    def __enter__(self) -> FakeVideo:
        return self

    def __exit__(self, *_: object) -> None: ...

    def demux(self, _: object) -> list[FakeVideo]:
        return [self]

    def decode(self) -> tuple[FakeFrame, ...]:
        return self.frames


@pytest.mark.parametrize(
    ("shown", "reason"),
    [((), "no frame that can be decoded"), ((FakeFrame(),), "what it builds on is missing")],
)
def test_a_video_that_shows_nothing_and_a_frame_without_what_it_builds_on_are_damaged(
    shown: tuple[FakeFrame, ...], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "_opened", lambda _: FakeVideo(*shown))
    (tmp_path / "clip.mp4").touch()
    found = VideoFrames(tmp_path / "clip.mp4", "clip.mp4").decode(0)
    assert isinstance(found, DataError)
    assert not isinstance(found, NoFrameError)
    assert reason in str(found)
