"""What `predict` writes: masks that are known to the pixel, overlays, and what stands in the way of both."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
from bundles import BASE, COLORS, GROWN, HEIGHT_PX, WIDTH_PX, color_images, color_network, nearest_color, write_bundle
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image, ImageFont
from PIL._util import DeferredError

from edge_ilseg.bundle import Runtime, read_manifest, write_manifest
from edge_ilseg.cli.predict import DEFAULT_ALPHA, predict
from edge_ilseg.devices import prediction
from edge_ilseg.devices.drawing import load_style, plain_text, shorten, text_width_px
from edge_ilseg.devices.overlay import PAPER, PaintedClass, class_shares, draw_overlay, percent_text
from edge_ilseg.devices.prediction import Predictions, encode_predictions, parse_predictions, predict_images
from edge_ilseg.devices.sources import Source, SourceReader, find_sources, frame_numbers
from edge_ilseg.errors import BundleError, ConfigError, DataError, EdgeIlsegError, ReportError
from edge_ilseg.images import read_image, resize_image, resize_mask

NAMES = list(GROWN)
BOTH = pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "boat"
    models = (("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("openvino", "fp32"))
    write_bundle(folder, GROWN, step_id="b" * 64, parent_id="a" * 64, models=models)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def frames() -> NDArray[np.uint8]:
    """Four images with noise: uint8, N x H x W x 3."""
    return color_images(4, NAMES, seed=11)


def save(path: Path, image_HWC: NDArray[np.uint8], **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image_HWC).save(path, **options)
    return path


def look(bundle: Path, out: Path, *arguments: object, **options: object) -> Predictions:
    options = {"runtime": "onnxruntime", "precision": "fp32", "threads": 1, **options}
    return predict_images(bundle, [str(item) for item in arguments], out, **options)  # type: ignore[arg-type]


def command(*arguments: object) -> Result:
    return CliRunner().invoke(predict, [*map(str, arguments), "--threads", "1"])


def stored_mask(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.array(image)


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# what is written


@BOTH
def test_the_mask_of_an_image_is_its_channels_with_the_colors_of_the_bundle(
    runtime: Runtime, bundle: Path, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    found = look(bundle, tmp_path / "out", save(tmp_path / "a.png", frames[0]), runtime=runtime)
    (image,) = found.images
    path = tmp_path / "out" / image.mask
    expected_HW = nearest_color(frames[0], NAMES)
    np.testing.assert_array_equal(stored_mask(path), expected_HW)
    with Image.open(path) as stored:
        colors = np.array(stored.getpalette()).reshape(-1, 3)[: len(NAMES)]
    np.testing.assert_array_equal(colors, [COLORS[name] for name in NAMES])
    shares = {name: float((expected_HW == channel).mean()) for channel, name in enumerate(NAMES)}
    assert image.classes == shares
    assert list(image.classes.values()) == sorted(shares.values(), reverse=True)
    assert (found.exit_code, found.bad_images, found.model.runtime) == (0, (), runtime)
    assert image.latency_ms > 0


@pytest.mark.parametrize(("options", "count"), [((), 2), (("--hint", "throughput"), 2), (("--hint", "latency"), 1)])
def test_images_run_side_by_side_and_the_latency_says_so(
    options: tuple[str, ...], count: int, bundle: Path, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    asked = [str(bundle), str(save(tmp_path / "a.png", frames[0])), "--threads", "2", *options]
    shown = CliRunner().invoke(predict, [*asked, "--out", str(tmp_path / "out")])
    assert ("2 images side by side)" in shown.output) == (count == 2), shown.output
    printed = CliRunner().invoke(predict, [*asked, "--out", str(tmp_path / "more"), "--json"])
    assert parse_predictions(printed.stdout.encode()).side_by_side == count


def test_a_mask_comes_to_the_images_own_size_by_nearest_neighbour(bundle: Path, tmp_path: Path) -> None:
    image_HWC = np.random.default_rng(0).integers(0, 256, (101, 83, 3)).astype(np.uint8)
    (image,) = look(bundle, tmp_path / "out", save(tmp_path / "a.png", image_HWC)).images
    assert (image.height_px, image.width_px) == (101, 83)
    small_HW = nearest_color(resize_image(image_HWC, HEIGHT_PX, WIDTH_PX), NAMES)
    np.testing.assert_array_equal(stored_mask(tmp_path / "out" / image.mask), resize_mask(small_HW, 101, 83))


def test_results_stand_upright_as_the_image_is_looked_at(
    bundle: Path, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the picture is to be turned clockwise
    (image,) = look(bundle, tmp_path / "out", save(tmp_path / "a.png", frames[0], exif=exif)).images
    assert (image.height_px, image.width_px) == (WIDTH_PX, HEIGHT_PX)
    upright_HWC = np.rot90(frames[0], -1)
    small_HW = nearest_color(resize_image(upright_HWC, HEIGHT_PX, WIDTH_PX), NAMES)
    expected_HW = resize_mask(small_HW, WIDTH_PX, HEIGHT_PX)
    np.testing.assert_array_equal(stored_mask(tmp_path / "out" / image.mask), expected_HW)
    assert image.overlay is not None
    overlay_HWC = read_image(tmp_path / "out" / image.overlay)[:WIDTH_PX, :HEIGHT_PX]
    is_background = expected_HW == 0
    np.testing.assert_array_equal(overlay_HWC[is_background], upright_HWC[is_background])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_an_overlay_is_the_image_with_the_colors_over_it_and_leaves_the_background_alone(
    alpha: float, bundle: Path, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    (image,) = look(bundle, tmp_path / "out", save(tmp_path / "a.png", frames[1]), alpha=alpha).images
    assert image.overlay is not None
    overlay_HWC = read_image(tmp_path / "out" / image.overlay)
    assert overlay_HWC.shape[0] > HEIGHT_PX  # the legend is under the image
    mask_HW = nearest_color(frames[1], NAMES)
    colors_HWC = np.array([COLORS[name] for name in NAMES], dtype=float)[mask_HW]
    expected_HWC = (1 - alpha) * frames[1] + alpha * colors_HWC
    expected_HWC[mask_HW == 0] = frames[1][mask_HW == 0]
    assert np.abs(overlay_HWC[:HEIGHT_PX, :WIDTH_PX] - expected_HWC).max() <= 1


def legend(classes: list[PaintedClass], mask_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    image_HWC = np.full((*mask_HW.shape, 3), 90, np.uint8)
    overlay = draw_overlay(image_HWC, mask_HW, classes, class_shares(mask_HW, len(classes)), 0.5)
    return np.array(overlay)[mask_HW.shape[0] :]


def has_color(strip_HWC: NDArray[np.uint8], color: tuple[int, int, int]) -> bool:
    return bool((strip_HWC == color).all(axis=2).sum() > 50)


def test_the_legend_shows_the_classes_that_are_present_and_no_others() -> None:
    classes = [PaintedClass("sky", (200, 0, 0)), PaintedClass("sea", (0, 200, 0)), PaintedClass("boat", (0, 0, 200))]
    strip_HWC = legend(classes, np.array([[0, 2], [2, 2]], np.uint8).repeat(40, 0).repeat(60, 1))
    assert has_color(strip_HWC, (200, 0, 0))
    assert has_color(strip_HWC, (0, 0, 200))
    assert not has_color(strip_HWC, (0, 200, 0))


def test_the_largest_class_comes_first_in_the_legend() -> None:
    classes = [PaintedClass("sky", (200, 0, 0)), PaintedClass("boat", (0, 0, 200))]
    strip_HWC = legend(classes, np.array([[0, 1], [1, 1]], np.uint8).repeat(40, 0).repeat(20, 1))
    rows = {color: np.flatnonzero((strip_HWC == color).all(axis=2).any(axis=1)) for color in ((200, 0, 0), (0, 0, 200))}
    assert rows[0, 0, 200].max() < rows[200, 0, 0].min()


def test_a_legend_is_wide_enough_for_its_names_under_a_narrow_image() -> None:
    classes = [PaintedClass("a class with a name that is far wider than the image", (0, 0, 200))]
    strip_HWC = legend(classes, np.zeros((10, 10), np.uint8))
    assert strip_HWC.shape[1] > 200
    assert (strip_HWC[:, -4:] == PAPER).all()  # nothing is cut off


def test_a_legend_of_many_classes_fills_columns_and_stays_as_wide_as_the_image() -> None:
    classes = [PaintedClass(f"class {number}", (number, 0, 200)) for number in range(24)]
    strip_HWC = legend(classes, np.arange(24, dtype=np.uint8).reshape(4, 6).repeat(100, 0).repeat(100, 1))
    assert strip_HWC.shape[1] == 600
    assert strip_HWC.shape[0] < 24 * 12


def test_a_class_name_that_the_font_does_not_have_does_not_end_the_run(
    frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    manifest = write_bundle(tmp_path / "b", BASE, step_id="a" * 64)
    names = ("фон", "pommé", "[b]芝生")
    renamed = [msgspec.structs.replace(item, name=name) for item, name in zip(manifest.classes, names, strict=True)]
    write_manifest(tmp_path / "b", msgspec.structs.replace(manifest, classes=tuple(renamed), background="фон"))
    result = command(tmp_path / "b", save(tmp_path / "a.png", frames[0]), "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert all(f"│ {name}" in result.output for name in names)  # on the screen as they are, and no markup


@pytest.mark.parametrize(
    ("text", "drawn"), [("boat 1.0 %", "boat 1.0 %"), ("café", "cafe"), ("Žluťoučký", "Zlutoucky"), ("猫 A", "? A")]
)
def test_letters_that_the_font_lacks_lose_their_accent_or_become_question_marks(text: str, drawn: str) -> None:
    assert plain_text(text) == drawn


def test_a_text_is_cut_where_there_is_no_room_for_it() -> None:
    style = load_style(20)
    assert shorten("boat", style, text_width_px("boat", style)) == "boat"
    cut = shorten("a long name", style, text_width_px("a long name", style) - 1)
    assert cut.startswith("a long")
    assert cut.endswith("...")
    assert text_width_px(cut, style) < text_width_px("a long name", style)


def test_a_legend_is_drawn_where_pillow_was_built_without_freetype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFont, "core", DeferredError.new(ImportError("no FreeType")))
    strip_HWC = legend([PaintedClass("café 猫", (0, 0, 200))], np.zeros((40, 200), np.uint8))
    assert has_color(strip_HWC, (0, 0, 200))
    assert (strip_HWC == (34, 34, 34)).all(axis=2).any()  # something is written


@pytest.mark.parametrize(("share", "text"), [(1.0, "100.0 %"), (0.1234, "12.3 %"), (0.0004, "<0.1 %"), (0.0, "0.0 %")])
def test_a_class_that_is_present_never_reads_as_nothing(share: float, text: str) -> None:
    assert percent_text(share) == text


def test_without_overlays_masks_alone_are_written(bundle: Path, frames: NDArray[np.uint8], tmp_path: Path) -> None:
    result = command(bundle, save(tmp_path / "a.png", frames[0]), "--out", tmp_path / "out", "--no-overlay", "--json")
    assert result.exit_code == 0, result.output
    assert parse_predictions(result.stdout_bytes).images[0].overlay is None
    assert files_in(tmp_path / "out") == ["masks/a.png"]


# bad images


def test_a_bad_image_is_named_and_counted_and_the_others_are_written(
    bundle: Path, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    for number in range(4):
        save(photos / f"{number}.png", frames[number])
    whole = (photos / "1.png").read_bytes()
    (photos / "1.png").write_bytes(whole[: len(whole) // 2])
    (photos / "note.jpg").write_text("no image at all")
    result = command(bundle, photos, photos / "nowhere.png", "--out", tmp_path / "out", "--json")
    assert result.exit_code == 3
    found = parse_predictions(result.stdout_bytes)
    assert [Path(item.file).name for item in found.bad_images] == ["1.png", "note.jpg", "nowhere.png"]
    assert "is missing" in found.bad_images[2].reason
    assert [Path(item.file).name for item in found.images] == ["0.png", "2.png", "3.png"]
    for image in found.images:
        expected_HW = nearest_color(frames[int(Path(image.file).stem)], NAMES)
        np.testing.assert_array_equal(stored_mask(tmp_path / "out" / image.mask), expected_HW)


def test_the_screen_names_bad_images_and_counts_pixels_of_each_class(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "[red]bad.jpg").write_text("no image")
    black_HWC = np.zeros((HEIGHT_PX * 2, WIDTH_PX, 3), np.uint8)
    boat_HWC = np.full((HEIGHT_PX, WIDTH_PX, 3), COLORS["boat"], np.uint8)
    images = [save(tmp_path / "black.png", black_HWC), save(tmp_path / "boat.png", boat_HWC)]
    result = command(bundle, *images, tmp_path / "[red]bad.jpg", "--out", tmp_path / "out")
    assert result.exit_code == 3
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines() if "│" in line]
    assert rows == [
        ["background", "1", "66.7 %"],
        ["apple", "0", "0.0 %"],
        ["grass", "0", "0.0 %"],
        ["boat", "1", "33.3 %"],
    ]
    assert "[red]bad.jpg" in result.output  # no markup
    assert "2 of 3 images" in result.output


def test_a_run_of_bad_images_alone_is_reported_as_well(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_text("no image")
    result = command(bundle, tmp_path / "bad.jpg", "--out", tmp_path / "out")
    assert result.exit_code == 3
    assert "0 of 1 images" in result.output


# what is in the way


def test_results_that_are_there_end_the_run_before_anything_is_written(
    bundle: Path, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    for number in range(3):
        save(tmp_path / "photos" / f"{number}.png", frames[number])
    out = tmp_path / "out"
    (out / "overlays").mkdir(parents=True)
    (out / "overlays/2.png").write_text("mine")
    with pytest.raises(ConfigError, match="in the way") as raised:
        look(bundle, out, tmp_path / "photos")
    assert raised.value.found == "1 of 6 files are there already"
    assert files_in(out) == ["overlays/2.png"]
    assert look(bundle, out, tmp_path / "photos", alpha=None).exit_code == 0  # no overlay is written then
    assert len(look(bundle, out, tmp_path / "photos", replace=True).images) == 3
    assert read_image(out / "overlays/2.png").shape[1] >= WIDTH_PX


def test_a_second_run_into_the_folder_of_the_images_does_not_take_its_results_for_images(
    bundle: Path, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    save(tmp_path / "a.png", frames[0])
    first = look(bundle, tmp_path, tmp_path)
    second = look(bundle, tmp_path, tmp_path, replace=True)
    assert [item.file for item in second.images] == [item.file for item in first.images] == [str(tmp_path / "a.png")]
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), frames[0])


def test_an_image_where_the_results_go_is_never_written_over(
    bundle: Path, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    path = save(tmp_path / "work/masks/a.png", frames[0])
    (tmp_path / "link").symlink_to(tmp_path / "work")
    for argument in (path, tmp_path / "link/masks/a.png"):
        with pytest.raises(DataError, match="no image to look at"):
            look(bundle, tmp_path / "work", argument, replace=True)
    np.testing.assert_array_equal(read_image(path), frames[0])


def test_a_file_where_a_folder_is_needed_is_named(bundle: Path, frames: NDArray[np.uint8], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(EdgeIlsegError) as raised:
        look(bundle, tmp_path / "out", save(tmp_path / "a.png", frames[0]))
    assert str(tmp_path / "out") in str(raised.value)


def test_a_result_that_cannot_be_written_ends_the_run_and_leaves_nothing_half_written(
    bundle: Path, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    for number in range(4):
        save(tmp_path / "photos" / f"{number}.png", frames[number])
    (tmp_path / "out/masks/1.png").mkdir(parents=True)
    with pytest.raises(EdgeIlsegError, match="could not be read or written"):
        look(bundle, tmp_path / "out", tmp_path / "photos", replace=True)
    assert [name for name in files_in(tmp_path / "out") if name.endswith(".part")] == []


def test_a_damaged_bundle_is_refused_before_anything_is_looked_at(
    bundle: Path, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    shutil.copytree(bundle, tmp_path / "b")
    with (tmp_path / "b/fp32.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleError, match="a file of the bundle is damaged"):
        look(tmp_path / "b", tmp_path / "out", save(tmp_path / "a.png", frames[0]))
    assert not (tmp_path / "out").exists()


def test_a_channel_that_the_bundle_has_no_class_for_ends_the_run(frames: NDArray[np.uint8], tmp_path: Path) -> None:
    network = color_network(NAMES, add_to_mask=1)
    write_bundle(tmp_path / "b", GROWN, step_id="b" * 64, parent_id="a" * 64, network=network)
    paths = [save(tmp_path / f"{number}.gif", frames[0], save_all=True, append_images=map(Image.fromarray, frames[1:]))
             for number in range(2)]  # fmt: skip
    with pytest.raises(BundleError, match="a channel that the manifest does not have"):
        look(tmp_path / "b", tmp_path / "out", *paths)


@BOTH
def test_the_model_that_was_asked_for_is_run(
    runtime: Runtime, bundle: Path, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    image = save(tmp_path / "a.png", frames[0])
    result = command(bundle, image, "--out", tmp_path / "out", "--runtime", runtime, "--precision", "fp32", "--json")
    model = parse_predictions(result.stdout_bytes).model
    assert (model.runtime, model.precision, model.threads) == (runtime, "fp32", 1)
    with pytest.raises(BundleError, match="no such model"):
        look(bundle, tmp_path / "other", image, runtime=runtime, precision="fp16")


def test_a_weight_for_overlays_that_are_not_written_is_refused(bundle: Path, tmp_path: Path) -> None:
    result = command(bundle, tmp_path, "--out", tmp_path / "out", "--no-overlay", "--alpha", "0.2")
    assert isinstance(result.exception, ConfigError)  # exit code 3 behind `edge_ilseg.cli.run`
    assert "--no-overlay" in str(result.exception)


def test_command_and_library_paint_with_one_weight() -> None:
    assert DEFAULT_ALPHA == prediction.DEFAULT_ALPHA


def test_a_record_comes_back_as_it_was_and_one_of_another_version_is_refused(
    bundle: Path, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    (tmp_path / "bad.jpg").write_text("no image")
    found = look(bundle, tmp_path / "out", save(tmp_path / "a.png", frames[0]), tmp_path / "bad.jpg")
    assert parse_predictions(encode_predictions(found)) == found
    newer = encode_predictions(msgspec.structs.replace(found, format_version=2))
    with pytest.raises(ReportError, match="a format that this version does not read"):
        parse_predictions(newer)


def test_a_file_name_that_is_no_text_is_shown_with_question_marks(
    bundle: Path, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    save(path, frames[0])
    (tmp_path / os.fsdecode(b"b\xe9.jpg")).write_text("no image")
    found = look(bundle, tmp_path / "out", tmp_path)
    assert Path(found.images[0].file).name == "caf\ufffd.png"
    assert b"/b\xef\xbf\xbd.jpg" in encode_predictions(found)
    assert (tmp_path / "out/masks" / path.name).is_file()


@BOTH
def test_images_are_predicted_where_torch_and_onnx_are_not_installed(
    runtime: str, bundle: Path, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    other = {"onnxruntime": "openvino", "openvino": "onnxruntime"}[runtime]
    program = f"""
    import sys
    for name in ("torch", "onnx", "onnxscript", "safetensors", "lightning", {other!r}): sys.modules[name] = None
    from edge_ilseg.cli.predict import predict
    predict(sys.argv[1:])
    """
    arguments = [bundle, save(tmp_path / "a.png", frames[0]), "--out", tmp_path / "out", "--precision", "fp32"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(stored_mask(tmp_path / "out/masks/a.png"), nearest_color(frames[0], NAMES))


# which images, and what their results are called


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def names_of(*arguments: object, leave_out: tuple[Path, ...] = ()) -> list[str]:
    return [source.name for source in find_sources([str(item) for item in arguments], leave_out)]


def test_results_of_images_with_one_name_in_two_folders_keep_the_folders(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.jpg", "b/x.jpg")
    assert names_of(tmp_path / "a/x.jpg", tmp_path / "b/x.jpg") == ["a/x", "b/x"]
    assert names_of(tmp_path / "a", tmp_path / "b") == ["a/x", "b/x"]


def test_a_folder_gives_its_images_and_those_below_and_leaves_hidden_files_out(tmp_path: Path) -> None:
    touch(tmp_path, "2.JPG", "1.png", "sub/deep/3.gif", "note.txt", "._1.png", ".cache/4.png")
    assert names_of(tmp_path) == ["1", "2", "sub/deep/3"]


def test_a_pattern_in_quotes_gives_what_the_shell_would_give(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.jpg", "a/y.png", "b/x.jpg", "b/deep/z.jpg")
    expanded = sorted(tmp_path.glob("*/x.jpg"))
    assert names_of(tmp_path / "*/x.jpg") == names_of(*expanded) == ["a/x", "b/x"]
    assert names_of(tmp_path / "**/*.jpg") == ["a/x", "b/deep/z", "b/x"]
    assert names_of(tmp_path / "?") == names_of(tmp_path / "a", tmp_path / "b")


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    touch(tmp_path, "x[1].jpg", "x1.jpg")
    assert names_of(tmp_path / "x[1].jpg") == ["x[1]"]


def test_an_image_that_is_meant_twice_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "x.jpg", "y.jpg")
    monkeypatch.chdir(tmp_path)
    assert names_of("y.jpg", ".", tmp_path / "sub/../x.jpg") == ["y", "x"]


def test_where_two_results_would_have_one_name_every_name_keeps_its_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "x.jpg", "x.png", "y.jpg")
    assert names_of(tmp_path) == ["x.jpg", "x.png", "y.jpg"]


def test_a_result_never_stands_where_the_folder_of_another_has_to_be(tmp_path: Path) -> None:
    touch(tmp_path, "x.jpg", "x.png/y.jpg")
    assert names_of(tmp_path) == ["x.jpg", "x.png/y.jpg"]
    touch(tmp_path, "x.jpg.png/z.jpg")
    with pytest.raises(DataError, match="stand in each other's way"):
        names_of(tmp_path)


@pytest.mark.parametrize("argument", ["empty", "empty/*.jpg", "nothing-*"])
def test_an_argument_that_means_no_image_is_named(
    argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "x.jpg", "empty/note.txt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no image to look at") as raised:
        names_of("x.jpg", argument)
    assert raised.value.where == argument


# moving images

MOVING = {
    "gif": {},
    "png": {},
    "webp": {"lossless": True},
    "tif": {},
}


def save_moving(path: Path, frames_NHWC: NDArray[np.uint8], **options: object) -> Path:
    first, *others = [Image.fromarray(frame_HWC) for frame_HWC in frames_NHWC]
    first.save(path, save_all=True, append_images=others, **MOVING[path.suffix[1:]], **options)
    return path


@pytest.mark.parametrize("suffix", MOVING)
def test_a_moving_image_gives_a_mask_a_frame(
    suffix: str, bundle: Path, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    path = save_moving(tmp_path / f"clip.{suffix}", frames)
    found = look(bundle, tmp_path / "out", path)
    assert [(item.frame, item.mask) for item in found.images] == [
        (number, f"masks/clip/{number:04}.png") for number in range(4)
    ]
    for frame_HWC, image in zip(frames, found.images, strict=True):
        expected_HW = nearest_color(frame_HWC, NAMES)  # the few colours of a GIF are all near to the right class
        np.testing.assert_array_equal(stored_mask(tmp_path / "out" / image.mask), expected_HW)


@pytest.mark.parametrize("suffix", MOVING)
def test_a_still_image_of_such_a_format_is_one_image(suffix: str, frames: NDArray[np.uint8], tmp_path: Path) -> None:
    path = save(tmp_path / f"still.{suffix}", frames[0])
    assert find_sources([str(path)]) == (Source(path, None, "still"),)


def test_frames_that_are_asked_for_from_several_threads_are_the_right_ones(tmp_path: Path) -> None:
    many = color_images(24, NAMES, seed=5)
    sources = find_sources([str(save_moving(tmp_path / "clip.png", many))])
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


def test_a_moving_image_is_closed_after_its_last_frame(frames: NDArray[np.uint8], tmp_path: Path) -> None:
    """A folder may hold more of them than a process may have files."""
    paths = [str(save_moving(tmp_path / f"{number}.gif", frames[:2])) for number in range(3)]
    before = len(os.listdir("/proc/self/fd"))
    with SourceReader(sources := find_sources(paths)) as reader:
        for source in sources:
            reader.read(source)
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_reader_that_was_closed_opens_no_file_again(frames: NDArray[np.uint8], tmp_path: Path) -> None:
    """Threads that read ahead may ask once more when a run has ended early."""
    sources = find_sources([str(save_moving(tmp_path / "clip.gif", frames))])
    before = len(os.listdir("/proc/self/fd"))
    with SourceReader(sources) as reader:
        reader.read(sources[0])
    with pytest.raises(DataError, match="was closed"):
        reader.read(sources[1])
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_a_frame_is_read_as_an_image_of_its_kind_is(mode: str, orientation: int, tmp_path: Path) -> None:
    """Rule 5 of `devices/sources.py`."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    grey_HW = np.random.default_rng(1).integers(0, 256, (20, 30)).astype(np.uint8)
    deep = Image.fromarray((grey_HW.astype(np.uint16) << 8) + 77)
    picture = deep if mode == "I;16" else Image.fromarray(np.stack([grey_HW, grey_HW.T.reshape(20, 30), grey_HW], 2))
    picture = picture if mode == "I;16" else picture.convert(mode)
    picture.save(tmp_path / "still.tif", exif=exif)
    picture.save(tmp_path / "moving.tif", save_all=True, append_images=[picture], exif=exif)
    expected_HWC = read_image(tmp_path / "still.tif")
    sources = find_sources([str(tmp_path / "moving.tif")])
    with SourceReader(sources) as reader:
        for source in sources:
            np.testing.assert_array_equal(reader.read(source), expected_HWC)


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_frames_are_turned_upright(suffix: str, frames: NDArray[np.uint8], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    sources = find_sources([str(save_moving(tmp_path / f"clip.{suffix}", frames, exif=exif))])
    with SourceReader(sources) as reader:
        for frame_HWC, source in zip(frames, sources, strict=True):
            np.testing.assert_array_equal(reader.read(source), np.rot90(frame_HWC))


def test_frames_of_floating_point_are_bad_images(bundle: Path, tmp_path: Path) -> None:
    picture = Image.fromarray(np.zeros((20, 30), np.float32))
    picture.save(tmp_path / "clip.tif", save_all=True, append_images=[picture])
    found = look(bundle, tmp_path / "out", tmp_path / "clip.tif")
    assert [item.frame for item in found.bad_images] == [0, 1]
    assert "floating-point" in found.bad_images[0].reason


def test_the_frames_before_a_damaged_one_are_predicted_and_those_after_it_are_bad(
    bundle: Path, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    path = save_moving(tmp_path / "clip.png", frames)
    data = bytearray(path.read_bytes())
    marks = [at for at in range(len(data)) if data[at : at + 4] == b"fdAT"]
    length = struct.unpack(">I", data[marks[1] - 4 : marks[1]])[0]  # of the third frame's pixels
    data[marks[1] + 8 : marks[1] + 4 + length] = b"\xff" * (length - 4)
    path.write_bytes(data)
    found = look(bundle, tmp_path / "out", path)
    assert [item.frame for item in found.images] == [0, 1]
    assert [item.frame for item in found.bad_images] == [2, 3]
    assert f"{path}, frame 2" in found.bad_images[1].reason
    assert found.exit_code == 3


def test_a_page_of_a_tiff_that_is_damaged_spoils_no_other(
    bundle: Path, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    path = save_moving(tmp_path / "clip.tif", frames, compression="tiff_adobe_deflate")
    with Image.open(path) as image:
        image.seek(1)
        offset, size = image.tag_v2[273][0], image.tag_v2[279][0]
    data = bytearray(path.read_bytes())
    data[offset : offset + size] = b"\xff" * size
    path.write_bytes(data)
    found = look(bundle, tmp_path / "out", path)
    assert [item.frame for item in found.images] == [0, 2, 3]
    assert [item.frame for item in found.bad_images] == [1]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_tiff_whose_list_of_pages_breaks_off_has_a_bad_image_there(
    bundle: Path, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    """Pillow raises a `TypeError` for a page without its size."""
    path = save_moving(tmp_path / "clip.tif", frames)
    with Image.open(path) as image:
        places = []
        for number in range(4):
            image.seek(number)
            places.append(image._frame_pos[number])
    data = bytearray(path.read_bytes())
    data[places[2] : places[2] + 2] = b"\0\0"  # the directory of the third page has no entries
    path.write_bytes(data)
    found = look(bundle, tmp_path / "out", path)
    assert [item.frame for item in found.images] == [0, 1]
    assert [item.frame for item in found.bad_images] == [2]
    assert "Missing dimensions" in found.bad_images[0].reason
    path.write_bytes(data[: places[2] + 1])
    assert [item.frame for item in look(bundle, tmp_path / "more", path).bad_images] == [2]


def test_the_still_picture_of_an_apng_and_the_small_pages_of_a_tiff_are_no_frames(
    frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    still, *others = [Image.fromarray(frame_HWC) for frame_HWC in frames]
    still.save(tmp_path / "clip.png", save_all=True, append_images=others, default_image=True)
    assert frame_numbers(tmp_path / "clip.png") == (1, 2, 3)
    pages = [Image.fromarray(frame_HWC) for frame_HWC in frames[:2]]
    pages[1].encoderinfo = {"tiffinfo": {254: 1}}
    pages[0].save(tmp_path / "photo.tif", save_all=True, append_images=pages[1:])
    with Image.open(tmp_path / "photo.tif") as image:
        image.seek(1)
        assert image.tag_v2.get(254) == 1
    assert frame_numbers(tmp_path / "photo.tif") == ()


def test_frames_and_images_whose_results_would_meet_keep_their_suffix(
    frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    save_moving(tmp_path / "clip.gif", frames[:2])
    save(tmp_path / "clip/0001.png", frames[0])
    assert names_of(tmp_path) == ["clip/0001.png", "clip.gif/0000", "clip.gif/0001"]


def test_a_file_that_lost_frames_since_it_was_listed_has_bad_frames(frames: NDArray[np.uint8], tmp_path: Path) -> None:
    path = save_moving(tmp_path / "clip.gif", frames)
    sources = find_sources([str(path)])
    save_moving(path, frames[:2])
    with SourceReader(sources) as reader:
        assert reader.read(sources[1]).shape == (HEIGHT_PX, WIDTH_PX, 3)
        with pytest.raises(DataError, match="cannot be decoded"):
            reader.read(sources[2])


def test_the_bundle_that_was_used_is_named(bundle: Path, frames: NDArray[np.uint8], tmp_path: Path) -> None:
    found = look(bundle, tmp_path / "out", save(tmp_path / "a.png", frames[0]))
    assert found.bundle.bundle_id == read_manifest(bundle).bundle_id
    assert found.class_names == tuple(NAMES)
