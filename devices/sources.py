"""Which images a person means, what their results are called, and how a moving image is read frame by frame.

1. An argument is a file, a folder (every image in it and below) or, where nothing has that very name, a pattern with
   `*`, `**`, `?` or `[...]`, which stands for the files and folders that it finds. Hidden files are left out.
2. An image is taken once, however often it is meant; earlier results are left out.
3. A result is called like its image, by the path from the folder that all arguments have in common, without the suffix:
   `a/x.jpg` and `b/x.jpg` give `a/x` and `b/x`. Where two results would get one name, every name keeps its suffix.
4. A GIF, PNG, WebP or TIFF of several frames, and a video, is an image a frame: `clip/0000`, `clip/0001` and so on.
5. Frames are RGB and upright, as `edge_ilseg.images.read_image` makes an image.
6. The frames of a file are decoded in their order, once, whoever asks first. Those that build on a damaged one are
   damaged too. Where the list of a TIFF's pages breaks off, the first that cannot be found is a damaged frame.
"""

from __future__ import annotations

import glob
import itertools
import os
import threading
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_ilseg.devices.video import VIDEO_SUFFIXES, VideoFrames, most_frames
from edge_ilseg.errors import DataError, check_extra
from edge_ilseg.images import DECODE_ERRORS, IMAGE_SUFFIXES, decode_error_text, read_image, to_rgb

MOVING_FORMATS = frozenset({"GIF", "PNG", "WEBP", "TIFF"})
MOVING_SUFFIXES = (".gif", ".png", ".apng", ".webp", ".tif", ".tiff")
SUFFIXES = tuple(dict.fromkeys((*IMAGE_SUFFIXES, *MOVING_SUFFIXES, *VIDEO_SUFFIXES)))
LEAST_DIGITS = 4
NEW_SUBFILE_TYPE, REDUCED = 254, 1  # TIFF 6.0, section 8: bit 0 is set for a smaller version of another page


class Source(NamedTuple):
    """One image to look at."""

    path: Path
    """As it was given."""
    frame: int | None
    """Which one, from 0; `None`: the file is one image, or cannot be opened."""
    name: str
    """Of the result: relative, with `/`, without a suffix of its own, different for every source."""


def find_sources(arguments: Sequence[str], leave_out: Sequence[Path] = ()) -> tuple[Source, ...]:
    """The images that the arguments mean, in their order (rules 1 to 4).

    A file that is missing or damaged is a source as well: reading it says what is wrong.

    Args:
        arguments: files, folders and patterns.
        leave_out: folders in which nothing is an image: those that results are written to.

    Raises:
        DataError: an argument means no image, or the results of two would stand in each other's way.
        MissingPackageError: there is a video, and what reads it is not installed.
    """
    found, common = _find_files(arguments, [Path(os.path.realpath(folder)) for folder in leave_out])
    files = [(path, absolute.relative_to(common), frame_numbers(path)) for absolute, path in found.items()]
    for keeps_suffix in (False, True):
        sources = tuple(
            source
            for path, relative, frames in files
            for source in _sources(path, relative if keeps_suffix else relative.with_suffix(""), frames)
        )
        clash = _first_clash(source.name for source in sources)
        if clash is None:
            return sources
    raise DataError(
        "the results of two images would stand in each other's way", where=clash, hint="rename one, or use two commands"
    )


def _find_files(arguments: Sequence[str], leave_out: Sequence[Path]) -> tuple[dict[Path, Path], Path]:
    """Absolute path -> path as given of every image, in order, and the folder that all arguments have in common."""
    found: dict[Path, Path] = {}
    roots: set[Path] = set()
    for argument in arguments:
        any_found = False
        for place in _places(argument):
            root, paths = (place, _images_in(place)) if place.is_dir() else (place.parent, [place])
            for path in paths:
                real = Path(os.path.realpath(path))
                if not any(real.is_relative_to(folder) for folder in leave_out):
                    found.setdefault(_absolute(path), path)
                    any_found = True
            roots.add(_absolute(root))
        if not any_found:
            raise DataError(
                "there is no image to look at",
                where=argument,
                expected=f"a file, a folder with files that end in {', '.join(SUFFIXES)}, or a pattern; "
                "what lies where the results go is left out",
                hint="correct the path, or choose another folder for the results: --out",
            )
    return found, Path(os.path.commonpath(roots))


def shown_path(path: Path) -> str:
    """The path as text that can be printed and encoded: bytes that are no UTF-8 become `?` signs."""
    return os.fsencode(path).decode("utf-8", "replace")


def frame_numbers(path: Path) -> tuple[int, ...]:
    """Numbers of the frames of a moving image; empty for a file that is one image, or that cannot be opened.

    The still picture that an APNG holds for programs that cannot move it, and the small versions of a TIFF's pages,
    are no frames. A video may have fewer frames than numbers: a number too many is a `NoFrameError` when it is read.

    Raises:
        MissingPackageError: what a video is read with is not installed.
    """
    if path.suffix.lower() in VIDEO_SUFFIXES:
        check_extra("video", ["av"], f"the video {shown_path(path)}")
        return tuple(range(most_frames(path)))
    if path.suffix.lower() not in MOVING_SUFFIXES:
        return ()
    try:
        with Image.open(path) as image:
            if image.format == "TIFF":
                numbers = _tiff_pages(image)
            else:
                numbers = list(range(getattr(image, "n_frames", 1) if image.format in MOVING_FORMATS else 1))
                if image.info.get("default_image"):
                    del numbers[0]
    except DECODE_ERRORS:
        return ()
    return tuple(numbers) if len(numbers) > 1 else ()


def _tiff_pages(image: Image.Image) -> list[int]:
    """Numbers of the pages that are no smaller versions of others; the first that is damaged is the last (rule 6)."""
    numbers: list[int] = []
    for number in itertools.count():
        try:
            image.seek(number)
            is_reduced = int(getattr(image, "tag_v2", {}).get(NEW_SUBFILE_TYPE, 0)) & REDUCED
        except EOFError:  # there are no more
            break
        except DECODE_ERRORS:
            numbers.append(number)
            break
        if not is_reduced:
            numbers.append(number)
    return numbers


class SourceReader:
    """Reads images for any number of threads. Each frame of a moving image is to be asked for once.

    Leaving the context closes what is open.
    """

    def __init__(self, sources: Iterable[Source]) -> None:
        numbers: dict[Path, list[int]] = {}
        for source in sources:
            if source.frame is not None:
                numbers.setdefault(source.path, []).append(source.frame)
        self._moving = {path: _MovingImage(path, items) for path, items in numbers.items()}

    def __enter__(self) -> SourceReader:
        """The reader itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files whose last frame was not asked for."""
        for moving in self._moving.values():
            moving.close()

    def read(self, source: Source) -> NDArray[np.uint8]:
        """The image, uint8, H x W x 3, RGB, upright.

        Raises:
            DataError: it is missing, damaged or no image.
        """
        if source.frame is not None:
            return self._moving[source.path].read(source.frame)
        if source.path.suffix.lower() not in VIDEO_SUFFIXES:
            return read_image(source.path)
        with closing(VideoFrames(source.path, shown_path(source.path))) as frames:
            found = frames.decode(0)
        if isinstance(found, DataError):
            raise found
        return found


class _MovingImage:
    """The frames of one file, each decoded once and in order (rule 6); closed after the last."""

    def __init__(self, path: Path, numbers: Sequence[int]) -> None:
        self._shown = shown_path(path)
        is_video = path.suffix.lower() in VIDEO_SUFFIXES
        self._frames = VideoFrames(path, self._shown) if is_video else _ImageFrames(path, self._shown)
        self._left = deque(numbers)
        self._lock = threading.Lock()
        self._decoded: dict[int, NDArray[np.uint8] | DataError] = {}
        self._closed: DataError | None = None

    def read(self, number: int) -> NDArray[np.uint8]:
        with self._lock:
            while number not in self._decoded:
                following = self._left.popleft()
                self._decoded[following] = self._closed or self._frames.decode(following)
            frame = self._decoded.pop(number)
            if not self._left:
                self._frames.close()
        if isinstance(frame, DataError):
            raise frame
        return frame

    def close(self) -> None:
        with self._lock:
            self._closed = DataError(
                "a file was closed before all its frames were read",
                where=self._shown,
                hint="run the same command again",
            )
            self._frames.close()


class _ImageFrames:
    """Decodes the frames of an image that Pillow reads; nothing is open before the first, and after `close`."""

    def __init__(self, path: Path, shown: str) -> None:
        self._path = path
        self._shown = shown
        self._file: BinaryIO | None = None
        self._image: Image.Image | None = None
        self._broken: DataError | None = None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._image = None

    def decode(self, number: int) -> NDArray[np.uint8] | DataError:
        if self._broken is not None:
            return self._broken
        try:
            if self._image is None:
                self._file = self._path.open("rb")  # not by its path: `images._opened`
                self._image = Image.open(self._file)
            self._image.seek(number)
            return to_rgb(self._image, f"{self._shown}, frame {number}")
        except DataError as error:
            return error
        except DECODE_ERRORS as error:
            if self._image is None:
                self.close()
            damage = DataError(
                "a frame cannot be decoded: the file is truncated or damaged",
                where=f"{self._shown}, frame {number}",
                found=decode_error_text(error),
                hint="copy the file again from its source",
            )
            if self._image is None or self._image.format != "TIFF":  # elsewhere a frame builds on the one before
                self._broken = damage
            return damage


def _places(argument: str) -> list[Path]:
    """Files and folders that an argument names (rule 1); what is missing is named as well."""
    if not os.path.lexists(argument) and glob.has_magic(argument):
        return [Path(item) for item in sorted(glob.glob(argument, recursive=True))]
    return [Path(argument)]


def _images_in(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # `resolve` would follow links, and with them leave the arguments' folder


def _sources(path: Path, relative: Path, frames: Sequence[int]) -> Iterable[Source]:
    if not frames:
        yield Source(path, None, relative.as_posix())
    digits = max(LEAST_DIGITS, len(str(max(frames, default=0))))
    for number in frames:
        yield Source(path, number, (relative / f"{number:0{digits}}").as_posix())


def _first_clash(names: Iterable[str]) -> str | None:
    """A name that two have, or whose file would stand where another needs a folder."""
    counts = Counter(names)
    folders = {str(parent) for name in counts for parent in PurePosixPath(name).parents}
    return next((name for name, count in counts.items() if count > 1 or f"{name}.png" in folders), None)
