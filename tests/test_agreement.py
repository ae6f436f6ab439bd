"""A bundle beside its parent where nobody has drawn a label: every number against plain loops over pixels."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from bundles import BASE, COLORS, GROWN, color_images, color_network, nearest_color, write_bundle, write_family
from numpy.typing import NDArray
from PIL import Image

from edge_ilseg.bundle import Manifest, Precision, Runtime
from edge_ilseg.devices.agreement import (
    CONFIDENT,
    compare_unlabelled,
    confident_pixels,
    find_images,
    moved_share,
    unlabelled_classes,
)
from edge_ilseg.devices.limits import Limits
from edge_ilseg.devices.loaded_bundle import LoadedBundle
from edge_ilseg.devices.runtime import load_session
from edge_ilseg.devices.unlabelled import Unlabelled, UnlabelledClass
from edge_ilseg.devices.verdicts import MAX_MOVED_PCT, MIN_AGREEMENT_PCT, judge_unlabelled
from edge_ilseg.devices.verification import VerifyRequest, verify_bundle
from edge_ilseg.devices.verify_report import Check, VerifyReport, encode_report, parse_report
from edge_ilseg.errors import BundleError, ConfigError, DataError
from edge_ilseg.images import resize_image, resize_mask

OLD, ALL = tuple(BASE), tuple(GROWN)
GREEN_AND_BLUE = (0, 120, 130)
"""Grass to the parent, a boat to the bundle."""
LEVELS = (0, 100, 200)
"""Levels at which colours tie: a red of 100 is as far from black as from the red of apples."""


def open_bundle(
    folder: Path,
    steps: dict[str, int],
    *,
    logits: bool = False,
    size_px: tuple[int, int] = (48, 64),
    runtime: Runtime = "onnxruntime",
    **network: object,
) -> LoadedBundle:
    """A bundle of the nearest colour for inputs of any size, loaded; its golden arrays are of no use here."""
    outputs = ("mask", "logits") if logits else ("mask",)
    model = color_network(list(steps), outputs=outputs, height_px=size_px[0], width_px=size_px[1], **network)  # type: ignore[arg-type]
    models: list[tuple[Runtime, Precision]] = [(runtime, "fp32")]
    manifest: Manifest = write_bundle(
        folder, steps, step_id="x", network=model, outputs=outputs, models=models, input_px=size_px
    )
    session = load_session(folder, manifest.models[0], threads=1)
    nothing = np.zeros((0, *size_px), np.uint8)
    return LoadedBundle(folder, manifest, manifest.models[0], session, nothing, nothing)


def write_images(folder: Path, images: Sequence[NDArray[np.uint8]]) -> tuple[str, ...]:
    folder.mkdir()
    for number, image_HWC in enumerate(images):
        Image.fromarray(image_HWC).save(folder / f"{number:02d}.png")
    return find_images(folder)


def random_blocks(count: int, *, seed: int, levels: Sequence[int] | None = None) -> list[NDArray[np.uint8]]:
    """Patches of any colour, and of levels at which colours tie."""
    rng = np.random.default_rng(seed)
    shape = (count, 12, 16, 3)
    blocks = rng.integers(0, 256, shape) if levels is None else rng.choice(np.array(levels), shape)
    return list(blocks.repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8))


def loop_logits(pixel: Sequence[int], names: Sequence[str]) -> list[int]:
    return [sum(2 * c * int(x) - c * c for c, x in zip(COLORS[name], pixel, strict=True)) for name in names]


def loop_confident(logits: Sequence[float]) -> bool:
    highest = max(logits)
    return 1 / sum(math.exp(value - highest) for value in logits) >= CONFIDENT


class Tally:
    """What the loops below count: pixels by the parent's class and the bundle's."""

    def __init__(self) -> None:
        self.pairs = {(one, other): 0 for one in OLD for other in ALL}
        self.sure = dict(self.pairs)
        self.images, self.bundle_images = dict.fromkeys(OLD, 0), dict.fromkeys(OLD, 0)

    def agreement(self, name: str, pairs: dict[tuple[str, str], int]) -> float | None:
        both = pairs[name, name]
        either = sum(count for (one, other), count in pairs.items() if other in OLD and name in (one, other))
        return both / either if either else None

    def kept(self, name: str) -> float | None:
        """With what the bundle calls new in the union, but for the background."""
        own = sum(count for (one, _), count in self.pairs.items() if one == name)
        if name == "background":
            return self.agreement(name, self.pairs) or 0.0 if own else None
        either = sum(count for pair, count in self.pairs.items() if name in pair)
        return self.pairs[name, name] / either if own else None

    def moved(self, names: Sequence[str]) -> float | None:
        pixels = sum(count for (one, _), count in self.pairs.items() if one in names)
        moved = sum(count for (one, other), count in self.pairs.items() if one in names and other not in OLD)
        return moved / pixels if pixels else None


def tally(
    images: Sequence[NDArray[np.uint8]],
    *,
    forget: str | None = None,
    size_px: tuple[int, int] = (48, 64),
    parent_size_px: tuple[int, int] = (48, 64),
) -> Tally:
    kept = [name for name in ALL if name != forget]
    found = Tally()
    for image_HWC in images:
        parent_input_HWC = resize_image(image_HWC, *parent_size_px)
        before_HW = nearest_color(parent_input_HWC, OLD)
        after_HW = resize_mask(nearest_color(resize_image(image_HWC, *size_px), kept), *parent_size_px)
        for name in OLD:
            found.images[name] += sum(OLD[at] == name for at in before_HW.flat) >= before_HW.size / 1000
            found.bundle_images[name] += sum(kept[at] == name for at in after_HW.flat) >= before_HW.size / 1000
        for row in range(parent_size_px[0]):
            for column in range(parent_size_px[1]):
                pair = OLD[before_HW[row, column]], kept[after_HW[row, column]]
                found.pairs[pair] += 1
                found.sure[pair] += loop_confident(loop_logits(parent_input_HWC[row, column], OLD))
    return found


def check_against(found: Unlabelled, expected: Tally, *, has_logits: bool) -> None:
    assert [item.name for item in found.classes] == list(OLD)
    for item in found.classes:
        assert item.parent_pixels == sum(count for (one, _), count in expected.pairs.items() if one == item.name)
        assert (item.images, item.bundle_images) == (expected.images[item.name], expected.bundle_images[item.name])
        assert item.kept == pytest.approx(expected.kept(item.name))
        assert item.agreement == pytest.approx(expected.agreement(item.name, expected.pairs))
        sure = expected.agreement(item.name, expected.sure) if has_logits else None
        assert item.confident_agreement == (sure if sure is None else pytest.approx(sure))
        assert item.moved == pytest.approx(expected.moved([item.name]))
    known = [item.agreement for item in found.classes if item.agreement is not None]
    assert found.agreement == pytest.approx(sum(known) / len(known))
    assert found.moved == pytest.approx(expected.moved(["apple", "grass"]))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_agreement_and_moved_pixels_are_those_of_plain_loops(runtime: Runtime, tmp_path: Path) -> None:
    images = random_blocks(5, seed=1)
    names = write_images(tmp_path / "images", images)
    found = compare_unlabelled(
        open_bundle(tmp_path / "child", GROWN, runtime=runtime),
        open_bundle(tmp_path / "parent", BASE, runtime=runtime),
        tmp_path / "images",
        names,
    )
    check_against(found, tally(images), has_logits=False)
    assert found.moved is not None
    assert 0.05 < found.moved < 0.95
    assert (found.images_asked, found.images_counted, found.bad_images) == (5, 5, ())
    assert found.folder == str(tmp_path / "images")
    assert found.image_names_sha256 == hashlib.sha256(b"00.png\n01.png\n02.png\n03.png\n04.png").hexdigest()


def test_with_logits_agreement_is_told_again_where_the_parent_is_confident(tmp_path: Path) -> None:
    images = random_blocks(5, seed=2, levels=LEVELS)
    names = write_images(tmp_path / "images", images)
    child = open_bundle(tmp_path / "child", GROWN, forget="apple")
    found = compare_unlabelled(child, open_bundle(tmp_path / "parent", BASE, logits=True), tmp_path / "images", names)
    expected = tally(images, forget="apple")
    check_against(found, expected, has_logits=True)
    assert 0 < sum(expected.sure.values()) < sum(expected.pairs.values())
    background, apple, _ = found.classes
    assert background.confident_agreement != background.agreement
    assert (apple.agreement, apple.confident_agreement) == (0.0, 0.0)


def test_logits_of_the_bundle_alone_say_nothing_of_the_parents_confidence(tmp_path: Path) -> None:
    names = write_images(tmp_path / "images", random_blocks(1, seed=3))
    child = open_bundle(tmp_path / "child", GROWN, logits=True)
    found = compare_unlabelled(child, open_bundle(tmp_path / "parent", BASE), tmp_path / "images", names)
    assert {item.confident_agreement for item in found.classes} == {None}


@pytest.mark.parametrize("parent_size_px", [(24, 32), (96, 80)])
def test_masks_of_two_sizes_are_compared_at_the_parents(parent_size_px: tuple[int, int], tmp_path: Path) -> None:
    images = [image_HWC.repeat(2, axis=0)[:-7].repeat(3, axis=1) for image_HWC in random_blocks(2, seed=4)]
    names = write_images(tmp_path / "images", images)
    parent = open_bundle(tmp_path / "parent", BASE, size_px=parent_size_px, logits=True)
    found = compare_unlabelled(open_bundle(tmp_path / "child", GROWN), parent, tmp_path / "images", names)
    check_against(found, tally(images, parent_size_px=parent_size_px), has_logits=True)
    assert sum(item.parent_pixels for item in found.classes) == 2 * parent_size_px[0] * parent_size_px[1]


def test_confident_is_a_softmax_of_nine_tenths_or_more() -> None:
    rng = np.random.default_rng(5)
    logits_CHW = rng.normal(0, 3, (4, 30, 40)).astype(np.float32)
    logits_CHW[:, 0, 0] = (1e9, 0, -1e9, 5)  # nothing overflows
    logits_CHW[:, 0, 1] = (-1e9, -1e9, -1e9, -1e9)
    found_HW = confident_pixels(logits_CHW)
    for row in range(30):
        for column in range(40):
            assert found_HW[row, column] == loop_confident(logits_CHW[:, row, column].tolist())
    assert found_HW[0, 0]
    assert not found_HW[0, 1]
    assert 0.1 < found_HW.mean() < 0.9


def test_a_new_object_costs_no_agreement_and_its_place_was_background(tmp_path: Path) -> None:
    """Boats are background to the parent: the bundle may call them new, and nothing of an old object has moved."""
    names = write_images(tmp_path / "images", list(color_images(3, ALL, seed=6)))
    child, parent = open_bundle(tmp_path / "child", GROWN), open_bundle(tmp_path / "parent", BASE)
    found = compare_unlabelled(child, parent, tmp_path / "images", names)
    assert [item.agreement for item in found.classes] == [1.0, 1.0, 1.0]
    assert (found.agreement, found.moved) == (1.0, 0.0)
    moved = {item.name: item.moved for item in found.classes}
    assert moved["background"] == pytest.approx(tally(color_images(3, ALL, seed=6)).moved(["background"]))
    assert (moved["apple"], moved["grass"]) == (0.0, 0.0)


def test_an_old_object_that_is_called_new_costs_no_agreement_and_is_told_as_moved(tmp_path: Path) -> None:
    image_HWC = color_images(1, OLD, seed=7)[0]
    image_HWC[:24] = GREEN_AND_BLUE
    image_HWC[24:36] = COLORS["grass"]
    names = write_images(tmp_path / "images", [image_HWC])
    child, parent = open_bundle(tmp_path / "child", GROWN), open_bundle(tmp_path / "parent", BASE)
    found = compare_unlabelled(child, parent, tmp_path / "images", names)
    grass = found.classes[OLD.index("grass")]
    assert grass.agreement == 1.0
    assert grass.moved == pytest.approx(24 * 64 / grass.parent_pixels)
    assert found.moved == tally([image_HWC]).moved(["apple", "grass"])


def test_a_class_that_neither_shows_is_no_part_of_the_mean_and_one_that_only_the_bundle_shows_is() -> None:
    pairs = np.array([[60, 10, 0, 5], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    background, apple, grass = unlabelled_classes(ALL, pairs, None, np.array([[2, 0, 0], [2, 1, 0]]), "background")
    assert background == UnlabelledClass("background", 75, 2, 2, 60 / 70, None, 5 / 75, 60 / 70)
    assert apple == UnlabelledClass("apple", 0, 0, 1, 0.0, None, None, None)
    assert grass == UnlabelledClass("grass", 0, 0, 0, None, None, None, None)
    assert moved_share(pairs, ALL, 3, "background") is None
    assert moved_share(pairs, ALL, 3, None) == pytest.approx(5 / 75)


def test_a_bad_image_is_named_and_the_others_are_compared(tmp_path: Path) -> None:
    images = random_blocks(4, seed=8)
    names = write_images(tmp_path / "images", images)
    whole = (tmp_path / "images/01.png").read_bytes()
    (tmp_path / "images/01.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "images/03.png").unlink()
    told: list[tuple[str, float]] = []
    found = compare_unlabelled(
        open_bundle(tmp_path / "child", GROWN),
        open_bundle(tmp_path / "parent", BASE),
        tmp_path / "images",
        names,
        lambda text, share: told.append((text, share)),
    )
    assert [name for name, _ in found.bad_images] == ["01.png", "03.png"]
    assert "truncated" in found.bad_images[0][1]
    assert "missing" in found.bad_images[1][1]
    assert (found.images_asked, found.images_counted) == (4, 2)
    check_against(found, tally([images[0], images[2]]), has_logits=False)
    assert [share for _, share in told] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("which", ["bundle", "parent"])
def test_a_channel_that_the_manifest_does_not_have_ends_the_comparison(which: str, tmp_path: Path) -> None:
    names = write_images(tmp_path / "images", random_blocks(1, seed=9))
    child = open_bundle(tmp_path / "child", GROWN, add_to_mask=4 if which == "bundle" else 0)
    parent = open_bundle(tmp_path / "parent", BASE, add_to_mask=1 if which == "parent" else 0)
    with pytest.raises(BundleError, match="gives a channel that the manifest does not have"):
        compare_unlabelled(child, parent, tmp_path / "images", names)


def test_images_are_found_in_folders_below_and_other_files_are_none(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "below/deeper/c.webp", "notes.txt", "below/d.tiff", "archive.zip"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert find_images(tmp_path) == ("a.png", "b.JPG", "below/d.tiff", "below/deeper/c.webp")


@pytest.mark.parametrize("kind", ["missing", "empty", "of other files", "a file"])
def test_a_folder_without_an_image_is_refused(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    if kind == "a file":
        folder.write_bytes(b"")
    elif kind != "missing":
        folder.mkdir()
        if kind == "of other files":
            (folder / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"is missing|holds no image") as caught:
        find_images(folder)
    assert caught.value.where == folder
    with pytest.raises(DataError):
        verify_bundle(tmp_path / "no bundle", unlabelled=folder)


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    for name in ("a.jpg", "._a.jpg", ".thumbnails/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert find_images(tmp_path) == ("a.jpg",)


# The verdict

NO_LIMITS = Limits()


def report_on(
    child: Path,
    images: Path,
    *,
    against: Path | None,
    limits: Limits = NO_LIMITS,
    max_images: int | None = None,
) -> VerifyReport:
    """Of as few images as there are: how many are needed is a test of its own."""
    limits = msgspec.structs.replace(limits, min_images=1)
    request = VerifyRequest(latency_runs=1, threads=1, limits=limits, max_images=max_images)
    return verify_bundle(child, request, against=against, unlabelled=images)


@pytest.fixture
def family(tmp_path: Path) -> tuple[Path, Path]:
    return write_family(tmp_path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Old classes without doubt, but for an eighth of the last image: grass to the parent, a boat to the bundle."""
    pictures = color_images(4, OLD, seed=10)
    pictures[3, :6] = GREEN_AND_BLUE
    write_images(tmp_path / "images", list(pictures))
    return tmp_path / "images"


def test_a_report_holds_the_comparison_and_survives_its_json(family: tuple[Path, Path], images: Path) -> None:
    child, parent = family
    report = report_on(child, images, against=parent, limits=Limits(min_agreement_pct=100.0, max_moved_pct=10.0))
    assert report.exit_code == 0
    assert report.unlabelled is not None
    pictures = [np.array(Image.open(images / f"{number:02d}.png")) for number in range(4)]
    check_against(report.unlabelled, tally(pictures), has_logits=False)
    agreement, moved = report.check("unlabelled agreement"), report.check("moved to new classes")
    assert (agreement.verdict, agreement.value, agreement.limit, agreement.unit) == ("passed", 100.0, 100.0, "%")
    assert agreement.detail.startswith("least: ")
    assert report.check("unlabelled images").detail == "4 of 4 images"
    assert (moved.verdict, moved.limit) == ("passed", 10.0)
    assert moved.value == pytest.approx(100 * (report.unlabelled.moved or 0.0))
    assert "most: grass" in moved.detail
    assert parse_report(encode_report(report)) == report
    assert not report.is_retention_checked  # it is no retention: nobody knows the truth


def test_a_class_that_is_no_longer_found_breaks_the_agreement_and_is_named(tmp_path: Path, images: Path) -> None:
    child, parent = write_family(tmp_path, forget="apple")
    report = report_on(child, images, against=parent, limits=Limits(min_agreement_pct=90.0))
    check = report.check("unlabelled agreement")
    assert (check.verdict, check.exit_code, report.exit_code) == ("failed", 1, 1)
    assert check.detail.endswith("least: apple 0.0 %")


def test_without_limits_those_of_this_project_hold(family: tuple[Path, Path], tmp_path: Path, images: Path) -> None:
    child, parent = write_family(tmp_path / "other", forget="apple")
    report = report_on(child, images, against=parent)
    check = report.check("unlabelled agreement")
    assert (check.verdict, check.limit, report.exit_code) == ("failed", MIN_AGREEMENT_PCT, 1)
    assert report.limits.min_agreement_pct is None
    allowed = report_on(child, images, against=parent, limits=Limits(min_agreement_pct=0.0, max_moved_pct=100.0))
    assert allowed.exit_code == 0
    unchanged = report_on(family[0], images, against=family[1])
    assert unchanged.exit_code == 0
    limits = [unchanged.check(name).limit for name in ("unlabelled agreement", "moved to new classes")]
    assert limits == [MIN_AGREEMENT_PCT, MAX_MOVED_PCT]


@pytest.mark.parametrize(
    ("agreement", "moved", "kept"), [(0.54, 0.0, False), (0.9, 0.16, False), (0.55, 0.15, True), (1.0, 0.0, True)]
)
def test_the_limits_of_this_project_are_55_and_15_per_cent(agreement: float, moved: float, kept: bool) -> None:
    checks = judge_unlabelled(found_of(("a", agreement, moved), moved=moved), Limits())
    assert all(check.verdict == "passed" for check in checks if check.name != "class agreement") == kept


def test_a_limit_that_too_few_images_keep_is_not_decided_and_one_that_they_break_is_broken(
    family: tuple[Path, Path], tmp_path: Path
) -> None:
    """Images of the background alone, or of a new class, say nothing of the old ones."""
    child, parent = family
    shown = color_images(3, OLD, seed=10)
    empty = color_images(2, ["background"], seed=1)
    write_images(tmp_path / "mixed", [*shown, *empty])

    def verify(**limits: float) -> VerifyReport:
        request = VerifyRequest(latency_runs=1, threads=1, limits=Limits(**limits))  # type: ignore[arg-type]
        return verify_bundle(child, request, against=parent, unlabelled=tmp_path / "mixed")

    report = verify()
    assert report.unlabelled is not None
    assert (report.unlabelled.images_counted, report.unlabelled.images_of_old) == (5, 3)
    for name in ("unlabelled agreement", "moved to new classes"):
        check = report.check(name)  # type: ignore[arg-type]
        assert (check.verdict, check.exit_code) == ("too few images", 4)
        assert check.detail.startswith("3 images show an old class, and 20 are needed; ")
    assert report.exit_code == 4
    assert verify(min_images=3).exit_code == 0
    assert verify(min_images=4).exit_code == 4
    broken = found_of(("a", 0.5, 0.2), moved=0.2)
    for images_of_old in (1, 20):
        found = msgspec.structs.replace(broken, images_of_old=images_of_old)
        verdicts = [check.verdict for check in judge_unlabelled(found, Limits(min_class_agreement_pct=60.0))[1:]]
        assert verdicts == ["failed", "failed", "failed"]


def test_old_pixels_that_moved_break_their_limit_and_a_value_at_the_limit_passes(
    family: tuple[Path, Path], images: Path
) -> None:
    value = report_on(*family[:1], images, against=family[1]).check("moved to new classes").value
    assert value is not None
    assert value > 0
    for limit, verdict in ((value, "passed"), (value - 1e-6, "failed")):
        report = report_on(family[0], images, against=family[1], limits=Limits(max_moved_pct=limit))
        assert (report.check("moved to new classes").verdict, report.exit_code) == (verdict, int(verdict == "failed"))


def test_few_images_are_taken_from_the_whole_folder(family: tuple[Path, Path], images: Path) -> None:
    report = report_on(family[0], images, against=family[1], max_images=2)
    assert report.unlabelled is not None
    assert report.unlabelled.images_asked == 2
    assert report.unlabelled.image_names_sha256 == hashlib.sha256(b"00.png\n02.png").hexdigest()


def test_without_a_parent_nothing_is_compared_and_a_limit_is_refused(family: tuple[Path, Path], images: Path) -> None:
    report = report_on(family[0], images, against=None)
    assert (report.exit_code, report.unlabelled) == (0, None)
    for name in ("unlabelled images", "unlabelled agreement", "class agreement", "moved to new classes"):
        check = report.check(name)  # type: ignore[arg-type]
        assert (check.verdict, check.detail) == ("not checked", "no parent bundle to compare with")
    for limits in (Limits(min_agreement_pct=50.0), Limits(min_class_agreement_pct=5.0), Limits(max_moved_pct=50.0)):
        with pytest.raises(ConfigError, match="needs a folder of images and a parent"):
            report_on(family[0], images, against=None, limits=limits)
        with pytest.raises(ConfigError, match="needs a folder of images and a parent"):
            verify_bundle(family[0], VerifyRequest(limits=limits), against=family[1])


def test_a_model_that_gives_an_unknown_channel_fails_the_comparison(tmp_path: Path, images: Path) -> None:
    write_bundle(tmp_path / "parent", BASE, step_id="a")
    network = color_network(list(GROWN), add_to_mask=4)
    write_bundle(tmp_path / "child", GROWN, step_id="b", parent_id="a", network=network)
    report = report_on(tmp_path / "child", images, against=tmp_path / "parent")
    check = report.check("unlabelled agreement")
    assert (check.verdict, check.exit_code, report.exit_code) == ("failed", 3, 3)
    assert report.check("moved to new classes").detail == "the images could not be compared"


def test_a_bad_image_is_in_the_report_and_has_a_limit(family: tuple[Path, Path], images: Path) -> None:
    (images / "01.png").write_bytes(b"no image")
    report = report_on(family[0], images, against=family[1])
    assert report.unlabelled is not None
    assert [name for name, _ in report.unlabelled.bad_images] == ["01.png"]
    check = report.check("unlabelled images")
    assert (check.verdict, check.value, check.limit, check.exit_code, report.exit_code) == ("failed", 1, 0, 3, 3)
    assert "3 of 4 images; bad: 01.png (" in check.detail
    assert report.check("unlabelled agreement").verdict == "passed"
    allowed = report_on(family[0], images, against=family[1], limits=Limits(max_bad_images=1))
    assert (allowed.check("unlabelled images").verdict, allowed.exit_code) == ("passed", 0)


def test_images_of_which_none_can_be_used_never_pass(family: tuple[Path, Path], images: Path) -> None:
    for path in images.iterdir():
        path.write_bytes(b"no image")
    report = report_on(family[0], images, against=family[1], limits=Limits(max_bad_images=100))
    assert report.exit_code == 3
    for name in ("unlabelled images", "unlabelled agreement", "moved to new classes"):
        assert report.check(name).verdict == "failed"  # type: ignore[arg-type]


def kept_of(agreement: float | None, moved: float | None) -> float | None:
    """Where the bundle gives the class to no pixel that the parent does not."""
    return None if moved is None else (agreement or 0.0) * (1 - moved)


def found_of(
    *classes: tuple[str, float | None, float | None], moved: float | None, images: Sequence[int] | None = None
) -> Unlabelled:
    """A comparison of classes: name, agreement, moved; and how many images show each, 20 if left out."""
    known = [agreement for _, agreement, _ in classes if agreement is not None]
    return Unlabelled(
        folder="",
        images_asked=2,
        images_counted=2,
        images_of_old=20,
        image_names_sha256="",
        bad_images=(),
        classes=tuple(
            UnlabelledClass(
                name, 0 if share is None else 100, shown, shown, agreement, None, share, kept_of(agreement, share)
            )
            for (name, agreement, share), shown in zip(classes, images or [20] * len(classes), strict=True)
        ),
        agreement=sum(known) / len(known) if known else None,
        moved=moved,
    )


def test_the_verdict_is_on_the_mean_and_names_the_worst_class() -> None:
    found = found_of(("a", 0.9, 0.2), ("b", 0.5, 0.3), ("c", None, None), moved=0.25)
    for limit, verdict in ((70.0, "passed"), (70.1, "failed")):
        _, agreement, _, moved = judge_unlabelled(found, Limits(min_agreement_pct=limit, max_moved_pct=95 - limit))
        assert (agreement.verdict, moved.verdict) == (verdict, verdict)
        assert agreement.value == pytest.approx(70.0)
        assert agreement.detail == "least: b 50.0 %"
        assert moved.detail == "most: b 30.0 % of its pixels"


SIXTEEN = tuple((f"class {number}", 0.95, 0.0) for number in range(15))


def judge_classes(found: Unlabelled, limit: float | None = 30.0, **limits: int) -> Check:
    return judge_unlabelled(found, Limits(min_class_agreement_pct=limit, **limits))[2]  # type: ignore[arg-type]


def test_one_lost_class_of_sixteen_is_lost_in_the_mean_and_has_a_limit_of_its_own() -> None:
    found = found_of(*SIXTEEN, ("boat", 0.04, 0.0), moved=0.02)
    _, mean, single, moved = judge_unlabelled(found, Limits())
    assert (mean.verdict, moved.verdict) == ("passed", "passed")
    assert (single.verdict, single.value, single.exit_code) == ("not checked", pytest.approx(4.0), 0)
    single = judge_classes(found)
    assert (single.verdict, single.limit, single.unit, single.exit_code) == ("failed", 30.0, "%", 1)
    assert single.detail == "least: boat, in 20 images"
    assert judge_classes(found, limit=4.0).verdict == "passed"  # a value that equals its limit passes
    assert judge_classes(found, limit=4.1).verdict == "failed"


@pytest.mark.parametrize(
    ("agreement", "moved", "kept_pct"), [(None, 1.0, 0.0), (1.0, 0.99, 1.0), (1.0, 0.5, 50.0), (0.4, 0.5, 20.0)]
)
def test_of_a_class_that_became_new_in_part_the_rest_is_what_was_kept(
    agreement: float | None, moved: float, kept_pct: float
) -> None:
    """Where the bundle says new nothing is left to agree on; what it took from the class counts all the same."""
    found = found_of(*SIXTEEN, ("boat", agreement, moved), moved=0.02)
    assert judge_unlabelled(found, Limits())[3].verdict == "passed"  # of all old pixels few have moved
    single = judge_classes(found, limit=kept_pct + 0.1)
    assert (single.verdict, single.value) == ("failed", pytest.approx(kept_pct))
    assert single.detail == f"least: boat, in 20 images; {100 * moved:.1f} % of its pixels are new now"
    assert judge_classes(found, limit=kept_pct - 1e-9).verdict == "passed"


def test_a_background_that_new_objects_were_taken_for_is_held_by_its_agreement() -> None:
    """Rows are the parent's: half of its background and 9 of 10 pixels of its boats are new now."""
    names, pairs = ("background", "boat", "new"), np.array([[50, 0, 50], [0, 10, 90], [0, 0, 0]])
    background, boat = unlabelled_classes(names, pairs, None, np.array([[9, 9], [9, 9]]), "background")
    assert (background.agreement, background.moved, background.kept) == (1.0, 0.5, 1.0)
    assert (boat.agreement, boat.moved, boat.kept) == (1.0, 0.9, pytest.approx(0.1))
    gone = unlabelled_classes(
        names, np.array([[0, 0, 9], [0, 0, 9], [0, 0, 0]]), None, np.ones((2, 2), int), "background"
    )
    assert [(item.agreement, item.kept) for item in gone] == [(None, 0.0), (None, 0.0)]
    spread = unlabelled_classes(names, np.array([[0, 0, 0], [25, 25, 50], [0, 0, 0]]), None, np.ones((2, 2), int), None)
    assert (spread[1].agreement, spread[1].kept) == (0.5, 0.25)
    without = unlabelled_classes(names, pairs, None, np.array([[9, 9], [9, 9]]), None)[0]
    assert without.kept == 0.5  # the first class is a class like the others


def test_a_class_in_few_images_breaks_no_limit_and_keeps_none() -> None:
    """Five images are needed, or `min_images` where that is less."""
    low, none = (("boat", 0.04, 0.0), ("boat", None, None))
    for boat, shown in ((low, 4), (low, 0), (none, 0)):
        found = found_of(*SIXTEEN, boat, moved=0.02, images=[20] * 15 + [shown])
        single = judge_classes(found)
        assert (single.verdict, single.exit_code, single.value) == ("too few images", 4, pytest.approx(95.0))
        assert single.detail == "too few images show boat; least: class 0, in 20 images"
        assert judge_classes(found, limit=None).verdict == "not checked"
    few = found_of(*SIXTEEN, low, moved=0.02, images=[20] * 15 + [4])
    assert judge_classes(few, min_images=4).verdict == "failed"
    broken = found_of(*SIXTEEN, low, low, moved=0.02, images=[20] * 15 + [4, 5])
    assert judge_classes(broken).verdict == "failed"  # whatever the other is
    scarce = found_of(*SIXTEEN, moved=0.02, images=[1] * 15)
    nothing = msgspec.structs.replace(scarce, images_counted=0)
    for found, verdict in ((scarce, ("too few images", 4)), (nothing, ("failed", 3))):
        assert (judge_classes(found).verdict, judge_classes(found).exit_code) == verdict
        assert judge_classes(found).value is None
        assert judge_classes(found, limit=None).verdict == "not checked"


def test_a_limit_of_a_class_that_too_few_images_keep_is_not_decided() -> None:
    found = msgspec.structs.replace(found_of(*SIXTEEN, moved=0.02), images_of_old=19)
    assert judge_classes(found).verdict == "too few images"
    assert judge_classes(msgspec.structs.replace(found, images_of_old=20)).verdict == "passed"


def test_an_image_shows_a_class_to_a_model_that_gives_it_a_thousandth_of_it(tmp_path: Path) -> None:
    """3072 pixels: three of grass are stray, four are not, and a boat is grass to the parent alone."""
    plain = color_images(1, ["background"], seed=1)[0]
    pictures = [plain.copy() for _ in range(4)]
    pictures[1][0, :3] = COLORS["grass"]
    pictures[2][0, :4] = COLORS["grass"]
    pictures[3][:12] = GREEN_AND_BLUE
    names = write_images(tmp_path / "images", pictures)
    child, parent = open_bundle(tmp_path / "child", GROWN), open_bundle(tmp_path / "parent", BASE)
    found = compare_unlabelled(child, parent, tmp_path / "images", names)
    assert {item.name: item.images for item in found.classes} == {"background": 4, "apple": 0, "grass": 2}
    assert {item.name: item.bundle_images for item in found.classes} == {"background": 4, "apple": 0, "grass": 1}
    assert found.images_of_old == 3
    blind = open_bundle(tmp_path / "blind", BASE, forget="grass")
    seen = compare_unlabelled(child, blind, tmp_path / "images", names).classes[OLD.index("grass")]
    assert (seen.images, seen.bundle_images, seen.agreement, seen.kept) == (0, 1, 0.0, None)


def test_a_bundle_that_calls_every_old_pixel_new_is_refused(tmp_path: Path) -> None:
    """The worst that can happen: every old class is gone. No pixel is left to agree on."""
    only_boat = {**BASE, "boat": 1}
    network = color_network(list(only_boat))
    bias = next(item for item in network.graph.initializer if item.name == "bias")
    bias.raw_data = np.array([0, 0, 0, 1e9], np.float32).tobytes()
    write_bundle(tmp_path / "parent", BASE, step_id="a")
    write_bundle(tmp_path / "child", only_boat, step_id="b", parent_id="a", network=network)
    write_images(tmp_path / "images", list(color_images(3, OLD, seed=11)))
    limits = Limits(min_agreement_pct=1.0, max_moved_pct=50.0, min_golden_agreement=0.0)
    report = report_on(tmp_path / "child", tmp_path / "images", against=tmp_path / "parent", limits=limits)
    assert report.check("golden outputs").verdict == "passed"
    moved = report.check("moved to new classes")
    assert (moved.verdict, moved.value, moved.limit) == ("failed", 100.0, 50.0)
    assert report.check("unlabelled agreement").verdict == "failed"
    assert report.exit_code != 0


def test_a_limit_is_not_kept_where_every_image_is_bad(family: tuple[Path, Path], images: Path) -> None:
    for path in images.iterdir():
        path.write_bytes(b"no image")
    report = report_on(family[0], images, against=family[1], limits=Limits(min_agreement_pct=90.0, max_moved_pct=5.0))
    assert report.check("unlabelled agreement").verdict == "failed"
    assert report.check("moved to new classes").verdict == "failed"
    assert report.exit_code != 0


def test_a_limit_on_moved_pixels_is_not_kept_where_only_background_is_shown() -> None:
    *_, moved = judge_unlabelled(
        found_of(("background", 1.0, 0.0), ("a", None, None), moved=None), Limits(max_moved_pct=5)
    )
    assert moved.verdict != "passed"


def test_a_class_that_moved_whole_is_named() -> None:
    found = found_of(("background", 1.0, 0.0), ("a", 0.9, 0.1), ("b", None, 1.0), moved=0.5)
    *_, moved = judge_unlabelled(found, Limits(max_moved_pct=5.0))
    assert moved.verdict == "failed"
    assert "most: b 100.0 %" in moved.detail


@pytest.mark.parametrize("is_bad", [False, True])
def test_a_name_that_is_no_utf_8_is_no_defect_of_the_program(
    is_bad: bool, family: tuple[Path, Path], images: Path
) -> None:
    os.rename(images / "02.png", os.fsencode(images) + b"/\xff.png")
    if is_bad:
        Path(os.fsdecode(os.fsencode(images) + b"/\xff.png")).write_bytes(b"no image")
    report = report_on(family[0], images, against=family[1], limits=Limits(max_bad_images=1))
    assert report.exit_code == 0
    assert msgspec.json.decode(encode_report(report))["unlabelled"]["images_counted"] == 4 - is_bad
