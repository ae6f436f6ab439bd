"""What the comparison of two architectures compares: the masks as they were written, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from benchmark_scripts import load_benchmark
from bundles import GROWN, color_images, nearest_color, write_bundle
from PIL import Image

from edge_ilseg.devices.prediction import predict_images

arm64_verify = load_benchmark("arm64_verify")


def test_the_masks_are_read_by_the_names_of_their_images_and_overlays_are_not(tmp_path: Path) -> None:
    names = list(GROWN)
    images = color_images(2, names, seed=1)
    for folder, image_HWC in zip(("a", "b"), images, strict=True):  # one name in two folders
        (tmp_path / "photos" / folder).mkdir(parents=True)
        Image.fromarray(image_HWC).save(tmp_path / "photos" / folder / "x.png")
    write_bundle(tmp_path / "boat", GROWN, step_id="b" * 64, parent_id="a" * 64)
    predict_images(tmp_path / "boat", [str(tmp_path / "photos")], tmp_path / "out", threads=1)
    assert (tmp_path / "out/overlays/a/x.png").is_file()
    found = arm64_verify.read_masks(tmp_path / "out")
    assert list(found) == ["a/x.png", "b/x.png"]
    for mask_HW, image_HWC in zip(found.values(), images, strict=True):
        np.testing.assert_array_equal(mask_HW, nearest_color(image_HWC, names))


def test_masks_agree_by_pixel_and_by_class() -> None:
    here = {"a": np.array([[0, 0, 1, 1]]), "b": np.array([[1, 1, 1, 1], [0, 0, 0, 0]])}
    there = {"a": np.array([[0, 1, 1, 1]]), "b": np.array([[1, 1, 1, 1], [0, 0, 0, 0]])}
    found = arm64_verify.compare_masks(here, there, ("sky", "sea", "boat"))
    assert (found.images, found.equal, found.worst) == (2, 11 / 12, 3 / 4)
    assert found.classes == {"sky": 5 / 6, "sea": 6 / 7, "boat": None}
    assert arm64_verify.compare_masks(here, here, ("sky", "sea", "boat")).equal == 1.0


@pytest.mark.parametrize("there", [{}, {"b": np.zeros((1, 4))}, {"a": np.zeros((2, 4))}])
def test_masks_of_other_images_or_sizes_are_not_compared(there: dict[str, np.ndarray]) -> None:
    for sides in ((({"a": np.zeros((1, 4))}), there), ({}, {})):
        with pytest.raises(ValueError, match="same masks"):
            arm64_verify.compare_masks(*sides, ("sky",))


def test_a_relative_data_set_is_found_from_the_folder_of_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert arm64_verify.resolved_data("msrc:data/msrc") == f"msrc:{tmp_path}/data/msrc"
    assert arm64_verify.resolved_data("shapes:") == "shapes:"


def test_the_emulated_python_is_the_one_of_its_root(tmp_path: Path) -> None:
    (tmp_path / "usr/bin").mkdir(parents=True)
    os.symlink("python3.13", tmp_path / "usr/bin/python3")
    assert arm64_verify.python_of(tmp_path) == tmp_path / "usr/bin/python3.13"
