"""Reading, resizing and writing of images and masks."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_ilseg.errors import DataError
from edge_ilseg.images import (
    VOID_COLOR,
    default_colors,
    image_size,
    open_image,
    read_image,
    read_mask,
    resize_image,
    resize_mask,
    write_mask_png,
)

DEVICE_SIDE = (
    "edge_ilseg.images", "edge_ilseg.classes", "edge_ilseg.scenario", "edge_ilseg.data", "edge_ilseg.data.census",
    "edge_ilseg.data.step_view", "edge_ilseg.data.transforms",
)  # fmt: skip
FORBIDDEN = {"torch", "onnx", "onnxruntime", "onnxscript", "openvino", "safetensors", "lightning", "lightning_fabric"}


def gradient(height: int = 20, width: int = 30) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 8, x * 8, y + x], axis=2).astype(np.uint8)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_an_rgb_image_is_read_as_it_is(tmp_path: Path) -> None:
    image_HWC = read_image(save(tmp_path / "a.png", Image.fromarray(gradient())))
    assert image_HWC.dtype == np.uint8
    assert image_HWC.flags.writeable
    np.testing.assert_array_equal(image_HWC, gradient())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_the_exif_orientation_is_applied_to_image_and_size(tmp_path: Path, orientation: int, suffix: str) -> None:
    stored = Image.fromarray(gradient())
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a.{suffix}", stored, exif=exif, lossless=True)
    upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a),
    }[orientation](gradient())
    np.testing.assert_array_equal(read_image(path), upright)
    assert image_size(path) == upright.shape[:2]


def test_the_orientation_of_a_jpeg_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.jpg", Image.fromarray(gradient()), exif=exif, quality=100)
    assert read_image(path).shape == (30, 20, 3)
    assert image_size(path) == (30, 20)


def test_grey_palette_transparent_and_cmyk_images_become_rgb(tmp_path: Path) -> None:
    rgb = Image.fromarray(gradient())
    grey_HW = np.asarray(rgb.convert("L"))
    np.testing.assert_array_equal(
        read_image(save(tmp_path / "l.png", rgb.convert("L"))), np.repeat(grey_HW[:, :, None], 3, axis=2)
    )
    flat = Image.fromarray(np.full((4, 5, 3), (10, 20, 30), dtype=np.uint8))
    palette = flat.quantize(4)
    palette.info["transparency"] = bytes([128] * 4)
    np.testing.assert_array_equal(read_image(save(tmp_path / "p.png", palette)), np.asarray(flat))
    clear = flat.copy()
    clear.putalpha(0)
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", clear)), np.asarray(flat))
    assert read_image(save(tmp_path / "c.tif", flat.convert("CMYK"))).shape == (4, 5, 3)


def test_16_bit_grey_is_scaled_so_that_the_largest_value_is_white(tmp_path: Path) -> None:
    deep_HW = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    image_HWC = read_image(save(tmp_path / "a.png", Image.fromarray(deep_HW)))
    assert image_HWC[0, :, 0].tolist() == [0, 1, 128, 255]
    assert (image_HWC == image_HWC[:, :, :1]).all()


def test_a_floating_point_image_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", Image.fromarray(np.ones((3, 3), dtype=np.float32)))
    with pytest.raises(DataError, match="floating-point"):
        read_image(path)


def noisy_bytes(kind: str) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format=kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9])
def test_a_truncated_image_is_an_error_that_names_file_and_remedy(tmp_path: Path, kind: str, share: float) -> None:
    data = noisy_bytes(kind)
    path = tmp_path / "photo.img"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=r"(?s)truncated, damaged or no image.*photo\.img.*copy the file again"):
        read_image(path)


def test_a_damaged_png_is_an_error(tmp_path: Path) -> None:
    data = bytearray(noisy_bytes("PNG"))
    for place in range(60, len(data) - 40, 97):
        data[place] ^= 0xFF
    path = tmp_path / "a.png"
    path.write_bytes(bytes(data))
    with pytest.raises(DataError):
        read_image(path)


def test_what_is_no_image_is_called_that(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"a letter")
    with pytest.raises(DataError) as caught:
        read_image(path)
    assert caught.value.found == "no kind of image that Pillow knows"


def test_a_missing_image_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)missing.*none\.jpg"):
        read_image(tmp_path / "none.jpg")


def test_a_jpeg_cannot_be_a_mask(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a mask is a JPEG"):
        read_mask(save(tmp_path / "a.jpg", Image.new("L", (4, 4))))


WRITTEN = {"tif": "RGB L P RGBA CMYK I;16", "png": "RGB L P RGBA I;16", "jpg": "RGB L CMYK", "gif": "P"}


@pytest.mark.parametrize(
    ("suffix", "mode"), [(kind, mode) for kind, modes in WRITTEN.items() for mode in modes.split()]
)
def test_an_opened_image_needs_no_file_any_more_and_is_resized_to_the_same_bytes(
    tmp_path: Path, suffix: str, mode: str
) -> None:
    deep = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = deep if mode == "I;16" else Image.fromarray(gradient()).convert(mode)
    path = save(tmp_path / f"a.{suffix}", stored, **({} if suffix == "gif" else {"exif": exif}))
    image_HWC, image = read_image(path), open_image(path)
    path.unlink()
    assert image.mode == "RGB"
    assert image_HWC.shape == ((20, 30, 3) if suffix == "gif" else (30, 20, 3))
    if suffix in ("tif", "png"):
        grey_HW = np.round(np.arange(600).reshape(20, 30) * 100 * 255 / 65535)
        shown = np.stack([grey_HW] * 3, axis=2) if mode == "I;16" else np.asarray(stored.convert("RGB"))
        np.testing.assert_array_equal(image_HWC, np.rot90(shown, -1))
    np.testing.assert_array_equal(np.asarray(image), image_HWC)
    for size in ((7, 5), image_HWC.shape[:2]):
        np.testing.assert_array_equal(resize_image(image, *size), resize_image(image_HWC, *size))


def test_resizing_shrinks_with_antialiasing_like_pillow() -> None:
    stripes_HWC = np.zeros((8, 64, 3), dtype=np.uint8)
    stripes_HWC[:, ::2] = 200
    shrunk_HWC = resize_image(stripes_HWC, 4, 8)
    assert shrunk_HWC.shape == (4, 8, 3)
    assert abs(shrunk_HWC.astype(int) - 100).max() <= 8  # without antialiasing it would be 0 or 200
    expected = Image.fromarray(gradient()).resize((7, 5), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resize_image(gradient(), 5, 7), np.asarray(expected))


def test_resizing_to_the_same_size_changes_nothing_and_shares_nothing() -> None:
    image_HWC = gradient()
    same_HWC = resize_image(image_HWC, 20, 30)
    np.testing.assert_array_equal(same_HWC, image_HWC)
    assert not np.shares_memory(same_HWC, image_HWC)


@pytest.mark.parametrize("target", [(7, 5), (20, 30), (41, 77), (1, 1)])
def test_a_mask_takes_the_nearest_pixel_centre(target: tuple[int, int]) -> None:
    mask_HW = np.random.default_rng(0).integers(0, 22, (20, 30), dtype=np.uint8)
    resized_HW = resize_mask(mask_HW, *target)
    assert resized_HW.dtype == np.uint8
    for y in range(target[0]):
        for x in range(target[1]):
            row, column = int((y + 0.5) * 20 / target[0]), int((x + 0.5) * 30 / target[1])
            assert resized_HW[y, x] == mask_HW[row, column]


def test_a_mask_resized_to_its_double_is_each_pixel_twice() -> None:
    mask_HW = np.array([[0, 1], [2, 255]], dtype=np.uint8)
    np.testing.assert_array_equal(resize_mask(mask_HW, 4, 4), mask_HW.repeat(2, axis=0).repeat(2, axis=1))


def test_the_default_colors_are_those_of_voc() -> None:
    colors = default_colors(21)
    assert colors[0] == (0, 0, 0)
    assert colors[1] == (128, 0, 0)
    assert colors[15] == (192, 128, 128)  # person
    assert colors[20] == (0, 64, 128)  # tvmonitor
    assert default_colors(256)[255] == VOID_COLOR


def test_a_mask_png_keeps_its_values_and_shows_its_colors(tmp_path: Path) -> None:
    mask_HW = np.array([[0, 1, 2, 255]], dtype=np.uint8)
    colors = ((1, 2, 3), (40, 50, 60), (7, 8, 9))
    write_mask_png(tmp_path / "m.png", mask_HW, colors)
    mask = read_mask(tmp_path / "m.png")
    np.testing.assert_array_equal(mask.values, mask_HW)
    assert mask.palette is not None
    assert mask.palette[1].tolist() == [40, 50, 60]
    np.testing.assert_array_equal(read_image(tmp_path / "m.png")[0], [*colors, VOID_COLOR])


def test_a_mask_value_without_a_color_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mask value 3 with 3 colours"):
        write_mask_png(tmp_path / "m.png", np.full((2, 2), 3, dtype=np.uint8), ((0, 0, 0),) * 3)


def test_the_data_half_imports_no_training_or_export_package() -> None:
    code = (
        "import sys, importlib\n"
        f"for name in {DEVICE_SIDE!r}: importlib.import_module(name)\n"
        f"bad = {FORBIDDEN!r} & set(sys.modules)\n"
        "sys.exit(repr(bad) if bad else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
