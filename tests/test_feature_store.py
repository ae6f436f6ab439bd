"""What is kept of a view comes back with the stated error, belongs to its key, and is whole or not there."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_ilseg.config import FeatureDtype
from edge_ilseg.errors import EdgeIlsegError, TrainingError
from edge_ilseg.feature_store import FeatureStore, ViewShape, check_fits, file_store, memory_store, row_type

SHAPE = ViewShape(features_CHW=(5, 3, 4), labels_HW=(6, 8), teacher_KHW=(2, 3, 4))
COUNT = 6


def make_views(count: int) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    spread = np.array([1e-3, 1.0, 30.0, 1e3, 0.0], dtype=np.float32)[:, None, None]
    features_NCHW = (rng.standard_normal((count, *SHAPE.features_CHW)) * spread).astype(np.float32)
    features_NCHW[:, 4] = 7.25  # a channel that is the same everywhere
    logits_NKHW = rng.standard_normal((count, 2, 3, 4)).astype(np.float32)
    return features_NCHW, rng.integers(0, 256, (count, *SHAPE.labels_HW), dtype=np.uint8), logits_NKHW


def filled(store: FeatureStore) -> FeatureStore:
    store.write(range(COUNT), *make_views(COUNT))
    return store


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_features_come_back_with_the_stated_error(dtype: FeatureDtype) -> None:
    features_NCHW, labels_NHW, logits_NKHW = make_views(COUNT)
    numbers = np.array([4, 0, 4])
    found_NCHW, found_labels, found_logits = filled(memory_store(COUNT, row_type(SHAPE, dtype))).read(numbers)
    wanted_NCHW = features_NCHW[numbers]
    reach_NC11 = np.ptp(wanted_NCHW, axis=(2, 3), keepdims=True)
    bound = {"float32": 0.0, "float16": np.abs(wanted_NCHW) * 2**-11, "int8": reach_NC11 / 510}[dtype]
    slack = 1e-6 * np.abs(wanted_NCHW).max(axis=(2, 3), keepdims=True) if dtype == "int8" else 2**-25
    assert (np.abs(found_NCHW - wanted_NCHW) <= bound + (0 if dtype == "float32" else slack)).all()
    assert found_NCHW.dtype == np.float32
    assert np.array_equal(found_labels, labels_NHW[numbers])
    assert found_logits is not None
    assert np.allclose(found_logits, logits_NKHW[numbers], rtol=0 if dtype == "float32" else 2**-11, atol=1e-7)


def test_float16_cuts_off_what_it_cannot_hold() -> None:
    features_NCHW, labels_NHW, logits_NKHW = make_views(1)
    features_NCHW[0, 0, 0, :2] = (1e6, -1e6)
    store = memory_store(1, row_type(SHAPE, "float16"))
    store.write([0], features_NCHW, labels_NHW, logits_NKHW)
    assert store.read(np.array([0]))[0][0, 0, 0, :2].tolist() == [65504.0, -65504.0]


def test_what_is_read_can_be_changed_without_harm_to_the_store() -> None:
    store = filled(memory_store(COUNT, row_type(SHAPE, "float32")))
    first, labels, _ = store.read(np.array([1]))
    first.fill(0)
    labels.fill(0)
    again = store.read(np.array([1]))
    assert again[0].any()
    assert again[1].any()


def test_a_file_is_found_again_by_its_key_and_closes_without_a_trace(tmp_path: Path) -> None:
    row = row_type(SHAPE, "int8")
    store = filled(file_store(tmp_path / "features-0", "a" * 64, COUNT, row))
    wanted = store.read(np.arange(COUNT))[0]
    again = file_store(tmp_path / "features-0", "a" * 64, COUNT, row)
    assert again.is_kept.all()
    assert np.array_equal(again.read(np.arange(COUNT))[0], wanted)
    again.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="closed"):
        again.read(np.array([0]))


def test_a_file_of_another_key_or_size_is_not_read_and_goes(tmp_path: Path) -> None:
    row = row_type(SHAPE, "float16")
    filled(file_store(tmp_path / "features-0", "a" * 64, COUNT, row))
    other_process = file_store(tmp_path / "features-1", "b" * 64, COUNT, row)
    assert not file_store(tmp_path / "features-0", "b" * 64, COUNT, row).is_kept.any()
    assert not file_store(tmp_path / "features-0", "b" * 64, COUNT + 1, row).is_kept.any()
    assert other_process.path is not None
    assert other_process.path.exists()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_row_with_a_wrong_byte_is_as_if_never_written(tmp_path: Path, place: int) -> None:
    row = row_type(SHAPE, "float16")
    store = filled(file_store(tmp_path / "features-0", "a" * 64, COUNT, row))
    assert store.path is not None
    data = bytearray(store.path.read_bytes())
    data[3 * row.itemsize + place % row.itemsize] ^= 1
    store.path.write_bytes(data)
    again = file_store(tmp_path / "features-0", "a" * 64, COUNT, row)
    assert again.is_kept.tolist() == [True, True, True, False, True, True]


def test_a_disk_without_room_is_met_when_the_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(EdgeIlsegError, match="the disk is full"):
        file_store(tmp_path / "features-0", "a" * 64, COUNT, row_type(SHAPE, "float16"))
    assert list(tmp_path.iterdir()) == []


def test_a_really_full_disk_is_met_when_the_file_is_made(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small tmpfs cannot be mounted here (it takes root)")
    try:
        row = row_type(SHAPE, "float32")
        with pytest.raises(EdgeIlsegError, match="the disk is full"):
            file_store(tmp_path / "features-0", "a" * 64, (2 << 20) // row.itemsize, row)
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_cache_above_its_limit_is_refused_and_the_views_that_fit_are_named() -> None:
    row_bytes = 1 << 20
    check_fits(4, 100, row_bytes, 400)
    with pytest.raises(TrainingError) as caught:
        check_fits(4, 100, row_bytes, 399)
    assert "400 MiB for 4 views of 100 images" in str(caught.value)
    assert "set augment_views = 3, feature_cache_dtype = int8, or feature_cache_mib = 400" in str(caught.value)
    with pytest.raises(TrainingError, match="do:       set feature_cache_dtype = int8"):
        check_fits(4, 100, row_bytes, 99)
