"""The frames of a video, one after another, through PyAV, which brings FFmpeg: `pip install 'edge-ilseg[video]'`.

1. PyAV is imported when a video is met, and not before. It gets the opened file, never a name, and may take it for
   nothing but a container of `CONTAINERS`: no video makes it open another file, or an address.
2. A frame is RGB, of its stored size, and turned upright where the file says how it was filmed.
3. Frames are numbered from 0, in the order in which they are shown. There are at most as many as packets, which are
   counted without decoding; packets that show nothing make it fewer. A number without a frame is a `NoFrameError`.
4. What cannot be decoded is a frame that is damaged, and so is every one after it up to the next key frame: they build
   on each other. Where the file itself cannot be read on, one damaged frame is the last.
5. One frame is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_ilseg.errors import DataError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")
CONTAINERS = "mov,mp4,matroska,webm,avi"
COPY_AGAIN = "copy the video again from its source, or convert it: ffmpeg -i VIDEO repaired.mp4"
QUARTER_DEG = 90


class NoFrameError(DataError):
    """A number of a video for which there is no frame: a packet that showed nothing was counted (rule 3)."""


def most_frames(path: Path) -> int:
    """How many frames a video has at most, without decoding one (rules 3 and 4); 0 where it cannot be opened."""
    import av

    count = 0
    try:
        with path.open("rb") as file, _opened(file) as container:
            if not container.streams.video:
                return 0
            with suppress(av.FFmpegError):  # damage: reading tells, as the frame after those that were counted
                for packet in container.demux(container.streams.video[0]):
                    if not packet.size:  # the last of all: there is nothing in it
                        return count
                    count += 1
    except (av.FFmpegError, OSError):
        return 0
    return count + 1


class VideoFrames:
    """Decodes the frames of a video in their order; nothing is open before the first, and after `close`."""

    def __init__(self, path: Path, shown: str) -> None:
        """A video.

        Args:
            path: its file.
            shown: what to call it in errors.
        """
        self._shown = shown
        self._frames = self._decoded(path)

    def decode(self, number: int) -> NDArray[np.uint8] | DataError:
        """The next frame, uint8, H x W x 3, RGB, upright, or why it cannot be had.

        Args:
            number: its own, from 0: one more than that of the call before.
        """
        frame = next(self._frames, None)
        if frame is not None:
            return frame
        if number == 0:
            return DataError("a video has no frame that can be decoded", where=self._shown, hint=COPY_AGAIN)
        return NoFrameError("a video has no such frame", where=f"{self._shown}, frame {number}", hint="leave it out")

    def close(self) -> None:
        """Close the file."""
        self._frames.close()

    def _decoded(self, path: Path) -> Generator[NDArray[np.uint8] | DataError]:
        """Rules 2, 4 and 5; closing the generator closes the file."""
        import av

        number = 0
        broken: DataError | None = None
        try:
            with path.open("rb") as file, _opened(file) as container:
                if not container.streams.video:
                    yield self._damage(number, "there is no picture in it")
                    return
                for packet in container.demux(container.streams.video[0]):
                    try:
                        frames = packet.decode()
                    except (av.FFmpegError, MemoryError) as error:
                        broken = self._damage(number, error)
                        yield broken
                        number += 1
                        continue
                    for frame in frames:
                        if frame.is_corrupt:
                            broken = self._damage(number, "what it builds on is missing")
                        elif frame.key_frame:
                            broken = None
                        yield broken or self._upright(frame, number)
                        number += 1
        except FileNotFoundError:
            yield DataError("a video is missing", where=self._shown, hint="put the file back")
        except (av.FFmpegError, OSError) as error:
            yield self._damage(number, error)

    def _upright(self, frame: VideoFrame, number: int) -> NDArray[np.uint8] | DataError:
        """Rule 2. The angle of the display matrix is counter-clockwise, as that of `np.rot90`."""
        import av

        try:
            image_HWC = frame.to_ndarray(format="rgb24")
        except (av.FFmpegError, ValueError, MemoryError) as error:
            return self._damage(number, error)
        return np.ascontiguousarray(np.rot90(image_HWC, round(frame.rotation / QUARTER_DEG)))

    def _damage(self, number: int, found: object) -> DataError:
        return DataError(
            "a frame cannot be decoded: the video is truncated or damaged",
            where=f"{self._shown}, frame {number}",
            found=getattr(found, "strerror", None) or str(found) or type(found).__name__,
            hint=COPY_AGAIN,
        )


def _opened(file: IO[bytes]) -> InputContainer:
    """Rule 1."""
    import av

    return av.open(file, "r", options={"format_whitelist": CONTAINERS, "protocol_whitelist": "none"})
