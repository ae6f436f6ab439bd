"""Images and masks on disk and in memory, the same in training and on the device.

1. An image in memory is uint8, H x W x 3, RGB, upright: the EXIF orientation is applied when it is read.
2. A mask in memory is as stored: its EXIF orientation, which no annotation tool writes, is not looked at (a TIFF is
   turned by Pillow).
3. `resize_image` is the only image resizer of the project; bundle manifests call it `pillow-bilinear`.
4. `resize_mask` invents no value, and its rule is exact in integers: the same bytes on every machine.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from edge_ilseg.errors import DataError
from edge_ilseg.files import write_bytes
from edge_ilseg.metrics import VOID

Color = tuple[int, int, int]
VOID_COLOR: Color = (224, 224, 192)
"""The colour that PASCAL VOC gives to void."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
SAME_SIZE_HINT = "export the mask again at the size of the image"

DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's decoders raise on damaged bytes; OSError holds its "truncated" and "cannot identify", TypeError a TIFF
page without its size."""
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DEEP_GREY = ("I", "I;16", "I;16L", "I;16B", "I;16N")


class MaskFile(msgspec.Struct, frozen=True, eq=False):
    """A mask as its file has it, before values or colours are given a meaning."""

    values: NDArray[np.int32] | NDArray[np.uint8]
    """H x W of indices (int32), or H x W x 3 of colours (uint8)."""
    palette: NDArray[np.uint8] | None
    """N x 3, the colours of the indices, where the file has a palette."""


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read an image: uint8, H x W x 3, RGB, turned upright by its EXIF orientation.

    Grey, palette and CMYK images become RGB; transparency is dropped; 16-bit grey is scaled so that 65535 becomes 255.

    Raises:
        DataError: the file is missing, truncated, no image, or of floating point.
    """
    return np.array(open_image(path))


def open_image(path: Path) -> Image.Image:
    """The image of `read_image`, decoded, in Pillow's memory: mode RGB, and the file is closed.

    What is only to be resized never becomes an array at its full size, which takes as long as resizing does.

    Raises:
        DataError: the file is missing, truncated, no image, or of floating point.
    """
    with _opened(path) as image:
        upright = _to_rgb(image, path)
        upright.load()
        return upright


def to_rgb(image: Image.Image, where: object) -> NDArray[np.uint8]:
    """An image that Pillow has opened, or the frame of it that was sought, as `read_image` gives it.

    Raises:
        DataError: it is of floating point.
    """
    return np.array(_to_rgb(image, where))


def _to_rgb(image: Image.Image, where: object) -> Image.Image:
    turn = _UPRIGHT.get(_orientation(image))
    upright = image.transpose(turn) if turn is not None else image
    if upright.mode in _DEEP_GREY:
        deep_HW = np.clip(np.asarray(upright).astype(np.int64), 0, 65535)
        return Image.fromarray(((deep_HW * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if upright.mode == "F":
        raise DataError(
            "an image holds floating-point numbers, whose black and white are unknown",
            where=where,
            expected="8 or 16 bits a channel",
            hint="convert it to an 8-bit PNG",
        )
    if upright.mode in ("P", "PA"):  # straight to RGB would warn where the palette has transparency
        upright = upright.convert("RGBA")
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of the image that `read_image` gives, from the file's header alone (a TIFF is decoded).

    Raises:
        DataError: the file is missing or no image.
    """
    with _opened(path) as image:
        turned = _orientation(image) >= 5
        width, height = image.size
        return (width, height) if turned else (height, width)


def read_mask(path: Path) -> MaskFile:
    """Read a mask file without giving its values a meaning. Transparency is dropped.

    Raises:
        DataError: the file is missing, truncated, no image, or of a kind that cannot be a mask (JPEG, CMYK, float).
    """
    with _opened(path) as image:
        if image.format in ("JPEG", "MPO"):
            raise DataError(
                "a mask is a JPEG, which changes the values of its pixels",
                where=path,
                expected="PNG or BMP",
                hint="export the masks again without loss",
            )
        if image.mode in ("RGB", "RGBA"):
            return MaskFile(values=np.array(image)[:, :, :3], palette=None)
        if image.mode == "P":
            colors = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
            return MaskFile(values=np.array(image).astype(np.int32), palette=colors)
        if image.mode in ("1", "L", "LA", *_DEEP_GREY):
            index = image.getchannel(0) if image.mode == "LA" else image
            return MaskFile(values=np.array(index).astype(np.int32), palette=None)
        raise DataError(
            "a mask is of a kind that cannot be read",
            where=path,
            found=f"image mode {image.mode}",
            expected="one channel of label ids, a palette, or RGB colours",
            hint="save the mask as an 8-bit PNG",
        )


def resize_image(image: NDArray[np.uint8] | Image.Image, height_px: int, width_px: int) -> NDArray[np.uint8]:
    """Stretch an image to `height_px` x `width_px` with Pillow's bilinear filter, which antialiases when it shrinks.

    Args:
        image: uint8, H x W x 3, or the same pixels as `open_image` gives them.

    Returns:
        uint8, height_px x width_px x 3, a new array.
    """
    if isinstance(image, np.ndarray):
        if image.shape[:2] == (height_px, width_px):
            return image.copy()
        image = Image.fromarray(np.ascontiguousarray(image))
    return np.array(image.resize((width_px, height_px), Image.Resampling.BILINEAR))


def resize_mask(mask_HW: NDArray[np.uint8], height_px: int, width_px: int) -> NDArray[np.uint8]:
    """Stretch a mask by the nearest pixel centre: row y comes from row floor((y + 1/2) * H / height_px), columns alike.

    Computed in integers, `((2 y + 1) H) // (2 height_px)`. Brings labels to the size of the net and predictions back
    to the full size of the label.

    Args:
        mask_HW: uint8, H x W.

    Returns:
        uint8, height_px x width_px, a new array.
    """
    rows = (2 * np.arange(height_px) + 1) * mask_HW.shape[0] // (2 * height_px)
    columns = (2 * np.arange(width_px) + 1) * mask_HW.shape[1] // (2 * width_px)
    resized_HW: NDArray[np.uint8] = mask_HW.take(rows, axis=0).take(columns, axis=1)
    return resized_HW


def default_colors(count: int) -> tuple[Color, ...]:
    """The first `count` colours of the PASCAL VOC colour map: the bits of the index, dealt out to R, G, B from the top.

    Source: the VOC development kit, VOClabelcolormap.
    """
    colors = []
    for index in range(count):
        channels = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                channels[channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
        colors.append((channels[0], channels[1], channels[2]))
    return tuple(colors)


def write_mask_png(path: Path, mask_HW: NDArray[np.uint8], colors: Sequence[Color]) -> None:
    """Write a mask as a palette PNG: the file holds the values, a viewer shows `colors`, and void in VOC's void colour.

    Args:
        mask_HW: uint8, H x W; each value is below `len(colors)` or 255.

    Raises:
        ValueError: a value has no colour.
        EdgeIlsegError: the disk is full or refuses the write.
    """
    values = np.unique(mask_HW)
    if values[(values >= len(colors)) & (values != VOID)].size:
        raise ValueError(f"mask value {values[values != VOID].max()} with {len(colors)} colours")
    palette = [*colors[:VOID], *[VOID_COLOR] * (256 - len(colors[:VOID]))]
    image = Image.fromarray(np.ascontiguousarray(mask_HW))
    image.putpalette([level for color in palette for level in color])  # turns a grey image into a palette image
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open `path`; whatever goes wrong inside the block is told as a `DataError` that names the file."""
    try:
        # Given a path, Pillow maps an uncompressed TIFF into memory, and scrambles one that is turned by a quarter.
        with path.open("rb") as file, Image.open(file) as image:
            yield image
    except FileNotFoundError as error:
        raise DataError(
            "an image file is missing", where=path, hint="put the file back, or leave its id out"
        ) from error
    except DECODE_ERRORS as error:
        raise DataError(
            "an image file cannot be decoded: it is truncated, damaged or no image",
            where=path,
            found=decode_error_text(error),
            hint="copy the file again from its source, or leave its id out of the split",
        ) from error


def decode_error_text(error: Exception) -> str:
    """What Pillow says of damaged bytes; of what is no image at all it would show the open file."""
    if isinstance(error, UnidentifiedImageError):
        return "no kind of image that Pillow knows"
    return str(error) or type(error).__name__


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8 that is still to be undone.

    A PNG's EXIF counts only where it stands before the pixels, which is where it belongs. Pillow turns a TIFF by itself
    when it decodes it, and takes the tag away.
    """
    if image.format == "TIFF":
        image.load()
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    return int(image.getexif().get(_ORIENTATION_TAG, 1))
