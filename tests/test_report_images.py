"""Models looking at images: counts against an oracle, the choice of images, and small pictures under a size."""

from __future__ import annotations

import base64
import io
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from bundles import nearest_color
from numpy.typing import NDArray
from PIL import Image
from report_world import NEW, OLD, make_workspace

from edge_ilseg.checkpoint import ClassRecord
from edge_ilseg.data import open_data
from edge_ilseg.images import resize_mask
from edge_ilseg.metrics import confusion_matrix
from edge_ilseg.report import pictures
from edge_ilseg.report.gather import Gathered, gather
from edge_ilseg.report.pictures import GROUPS, Choice, Taken, choose_images, fit_strips, thickest_point
from edge_ilseg.report.scoring import ImageScore, Scoring, Share, load_eyes, score_images
from edge_ilseg.report.step_page import look_at_images
from edge_ilseg.workspace import Workspace

NAMES = (*OLD, NEW)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Gathered]:
    """Tests leave it as it is."""
    workspace = make_workspace(tmp_path_factory.mktemp("world"))
    return workspace, gather(workspace, None)


@pytest.fixture(scope="module")
def scoring(world: tuple[Workspace, Gathered]) -> Scoring:
    workspace, gathered = world
    eyes, sentences = load_eyes(workspace, gathered)
    assert not sentences
    return score_images(eyes, gathered, open_data(workspace.config.data), "test", 256)


def test_the_confusion_is_that_of_a_plain_loop(world: tuple[Workspace, Gathered], scoring: Scoring) -> None:
    data = open_data(world[0].config.data)
    expected = {role: np.zeros((4, 4), dtype=np.int64) for role in ("before", "after", "int8")}
    kept = [name for name in NAMES if name != "apple"]
    for image_id in data.ids("test"):
        image_HWC, labels_HW = data.read_image(image_id), data.read_labels(image_id)
        before_HW = nearest_color(image_HWC, OLD)
        after_HW = np.array([NAMES.index(name) for name in kept], np.uint8)[nearest_color(image_HWC, kept)]
        for role, mask_HW in (("before", before_HW), ("after", after_HW), ("int8", after_HW)):
            expected[role] += confusion_matrix(labels_HW, resize_mask(mask_HW, *labels_HW.shape), 4)
    assert scoring.labels == {"before": "onnxruntime fp32", "after": "onnxruntime fp32", "int8": "onnxruntime int8"}
    for role, counts in expected.items():
        np.testing.assert_array_equal(scoring.confusions[role], counts)


def test_the_scores_of_the_images_add_up_to_the_confusion(scoring: Scoring) -> None:
    after = scoring.confusions["after"]
    assert sum(item.all_pixels["after"].right for item in scoring.images) == np.trace(after)
    assert sum(item.old_pixels["after"].pixels for item in scoring.images) == after[:3].sum()
    assert sum(item.new_pixels["after"].right for item in scoring.images) == after[3, 3]


def test_a_bad_image_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path, images=3)
    (tmp_path / "data/images/001.png").write_bytes(b"nothing")
    gathered = gather(workspace, None)
    eyes, _ = load_eyes(workspace, gathered)
    found = score_images(eyes, gathered, open_data(workspace.config.data), "test", 256)
    assert [item.image_id for item in found.images] == ["000", "002"]
    assert [image_id for image_id, _ in found.bad_images] == ["001"]


def test_a_bundles_models_look_at_as_many_images_at_once_as_there_are_cores(
    world: tuple[Workspace, Gathered], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look waits for two others."""
    monkeypatch.setattr("edge_ilseg.devices.runtime.usable_cores", lambda: 3)
    workspace, gathered = world
    eyes, _ = load_eyes(workspace, gathered)
    assert [eye.concurrent_runs for eye in eyes] == [3, 3, 3]
    three = threading.Barrier(3, timeout=60)

    def mask(image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        three.wait()
        return np.zeros(image_HWC.shape[:2], np.uint8)

    found = score_images([eyes[0]._replace(mask=mask)], gathered, open_data(workspace.config.data), "test", 6)
    assert len(found.images) == 6


def test_what_cannot_be_run_is_a_sentence(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path, images=3)
    data = open_data(workspace.config.data)
    shutil.rmtree(workspace.bundle_folder("00-base"))
    seen = look_at_images(workspace, gather(workspace, None), data, "test")
    assert seen.scoring is not None
    assert set(seen.scoring.labels) == {"after", "int8"}
    assert "Step 00-base could not be run" in seen.sentences[0]
    shutil.rmtree(workspace.bundle_folder("01-step"))
    seen = look_at_images(workspace, gather(workspace, None), data, "test")
    assert seen.scoring is None
    assert len(seen.sentences) == 2
    assert look_at_images(workspace, gather(workspace, None), None, "test").sentences == (
        "There are no labelled images to look at: the workspace has no evaluation split.",
    )


def test_a_split_that_is_not_there_is_a_sentence(world: tuple[Workspace, Gathered]) -> None:
    workspace, gathered = world
    seen = look_at_images(workspace, gathered, open_data(workspace.config.data), "nowhere")
    assert seen.scoring is None
    assert "nowhere" in seen.sentences[0]


# Which images


def score(image_id: str, before: int | None, after: int, new: tuple[int, int] = (0, 0)) -> ImageScore:
    """Old classes have 100 pixels; so many of them are right."""
    old = {"after": Share(after, 100)} | ({"before": Share(before, 100)} if before is not None else {})
    all_ = {role: Share(share.right + new[0], 100 + new[1]) for role, share in old.items()}
    return ImageScore(image_id, all_, old, {"after": Share(*new)})  # type: ignore[arg-type]


SCORES = [
    score("a", 90, 20),
    score("b", 90, 80, (0, 30)),
    score("c", 90, 88, (29, 30)),
    score("d", 90, 70),
    score("e", 90, 91, (10, 30)),
]


def test_the_groups_hold_the_worst_the_missed_and_the_typical() -> None:
    chosen = choose_images(SCORES, 3)
    assert [(item.group, item.image_id) for item in chosen] == [(GROUPS[0], "a"), (GROUPS[1], "b"), (GROUPS[2], "d")]
    assert chosen[0].reason == "old classes: 90 % before, 20 % after of the pixels right"


def test_no_image_is_shown_twice_and_no_more_than_asked() -> None:
    for most in range(8):
        chosen = choose_images(SCORES, most)
        ids = [item.image_id for item in chosen]
        assert len(ids) == len(set(ids)) == min(most, len(SCORES))


def test_without_a_parent_the_worst_are_those_with_most_wrong_pixels() -> None:
    chosen = choose_images([score("a", None, 50), score("b", None, 10), score("c", None, 60)], 2)
    assert [(item.group, item.image_id) for item in chosen] == [(GROUPS[0], "b"), (GROUPS[2], "a")]


def test_no_image_no_choice() -> None:
    assert choose_images([], 12) == ()


# Small pictures


@pytest.fixture(scope="module")
def taken() -> tuple[Taken, ...]:
    image_HWC = np.random.default_rng(0).integers(0, 255, (200, 280, 3), dtype=np.uint8)
    found = []
    for number in range(6):
        masks = {title: np.full((200, 280), 1, np.uint8) for title in ("truth", "before", "after", "int8")}
        masks["truth"][:100] = 255
        found.append(Taken(Choice(GROUPS[number % 3], f"<b>{number}", "why"), image_HWC, masks))
    return tuple(found)


def classes(workspace: Workspace):  # type: ignore[no-untyped-def]
    return workspace.read_step("01-step").classes


def test_pictures_shrink_until_they_fit_and_it_is_said(
    world: tuple[Workspace, Gathered], taken: tuple[Taken, ...]
) -> None:
    kinds = classes(world[0])
    everything, note = fit_strips(taken, kinds, "background", 1 << 30)
    assert (len(everything), note) == (6, "")
    whole = sum(len(shot.uri) for _, strip in everything for shot in strip.shots)
    for room in (whole // 2, whole // 12):
        fewer, note = fit_strips(taken, kinds, "background", room)
        assert sum(len(shot.uri) for _, strip in fewer for shot in strip.shots) <= room
        assert note.startswith("To keep the page small")
    assert "images are left out" in note
    nothing, note = fit_strips(taken, kinds, "background", 100)
    assert nothing == ()
    assert "6 images are left out" in note


def test_every_picture_can_be_decoded_and_has_a_text(
    world: tuple[Workspace, Gathered], taken: tuple[Taken, ...]
) -> None:
    strips, _ = fit_strips(taken[:1], classes(world[0]), "background", 1 << 30)
    shots = strips[0][1].shots
    assert [shot.title for shot in shots] == ["image", "truth", "before", "after", "int8"]
    for shot in shots:
        head, _, data = shot.uri.partition(",")
        assert head in ("data:image/webp;base64", "data:image/jpeg;base64")
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (shot.width_px, shot.height_px) == (280, 200)
        assert "<b>0" in shot.alt
    assert shots[1].alt == "truth of <b>0: apple 100.0 %"
    assert [entry.text for entry in strips[0][1].legend] == ["1 apple"]


def test_background_and_void_are_left_as_they_are() -> None:
    image = Image.fromarray(np.full((40, 40, 3), 90, np.uint8))
    mask_HW = np.zeros((40, 40), np.uint8)
    mask_HW[:10], mask_HW[30:] = 255, 2
    painted = np.asarray(pictures.paint(image, mask_HW, {2: (0, 158, 115)}, {}))
    assert (painted[:30] == 90).all()
    assert (painted[30:] != 90).any(axis=2).all()


def test_a_large_region_bears_its_number_and_a_small_one_does_not() -> None:
    image = Image.fromarray(np.full((80, 80, 3), 90, np.uint8))
    for side, has_number in ((60, True), (6, False)):
        mask_HW = np.zeros((80, 80), np.uint8)
        mask_HW[:side, :side] = 1
        plain, numbered = (
            np.asarray(pictures.paint(image, mask_HW, {1: (0, 158, 115)}, numbers)) for numbers in ({}, {1: 1})
        )
        assert (plain != numbered).any() == has_number


def test_the_thickest_point_is_farthest_from_the_edge() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        region_HW = rng.random((14, 17)) < 0.85
        inside = np.argwhere(region_HW)
        outside = np.argwhere(~np.pad(region_HW, 1)) - 1
        depth = {tuple(p): np.abs(outside - p).sum(axis=1).min() for p in inside}
        row, column, radius_px = thickest_point(region_HW)
        assert radius_px == max(depth.values()) == depth[row, column]
    assert thickest_point(np.zeros((3, 3), bool)) == (0, 0, 0)


def test_colours_of_twenty_one_classes_are_all_different() -> None:
    many = [ClassRecord(f"c{number}", number // 20, (0, 0, 0)) for number in range(22)]
    colors = pictures.colors_of(many, "c0")
    assert sorted(colors) == list(range(1, 22))
    assert len(set(colors.values())) == 21
    assert colors[20] == pictures.HUES[0]
