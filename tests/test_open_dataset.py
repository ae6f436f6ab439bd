"""Opening a data set by its kind, with options from a configuration file."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_ilseg.config import DataConfig
from edge_ilseg.data import DATASETS, open_data, open_dataset, parse_option
from edge_ilseg.data.shapes import Shapes
from edge_ilseg.errors import ConfigError, DataError


def test_options_reach_the_data_set() -> None:
    dataset = open_dataset("shapes", None, {"seed": 3, "train": 4, "width_px": 64})
    assert dataset.ids("train") == Shapes(train=4).ids("train")
    assert (
        dataset.read_image("train-00000").tobytes() == Shapes(seed=3, width_px=64).read_image("train-00000").tobytes()
    )


def test_a_list_from_a_configuration_file_is_taken_for_a_sequence(tmp_path: Path) -> None:
    (tmp_path / "Images").mkdir()
    (tmp_path / "GroundTruth").mkdir()
    assert len(open_dataset("msrc", tmp_path, {"void_classes": ["horse"]}).info.classes) == 22


def test_an_unknown_kind_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"(?s)'shape'.*folder, voc, msrc, shapes.*did you mean 'shapes'"):
        open_dataset("shape", None)


def test_an_unknown_option_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"(?s)no option 'sead'.*did you mean 'seed'"):
        open_dataset("shapes", None, {"sead": 3})


def test_an_option_for_a_data_set_without_options_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no option at all"):
        open_dataset("folder", tmp_path, {"seed": 3})


@pytest.mark.parametrize("value", ["3", 1.5, True, None])
def test_an_option_of_the_wrong_type_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="'seed' of the data set 'shapes' has a value that cannot be used"):
        open_dataset("shapes", None, {"seed": value})


@pytest.mark.parametrize("kind", [kind for kind in DATASETS if kind != "shapes"])
def test_a_data_set_on_disk_needs_a_root_that_is_there(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a folder"):
        open_dataset(kind, None)
    with pytest.raises(DataError, match=r"(?s)does not exist.*nowhere"):
        open_dataset(kind, tmp_path / "nowhere")


def test_a_generated_data_set_refuses_a_root(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reads no folder"):
        open_dataset("shapes", tmp_path)


def test_a_configuration_opens_its_data_set() -> None:
    dataset = open_data(DataConfig("shapes", options={"train": 4, "val": 0, "test": 0}))
    assert dataset.info.splits == ("train",)
    with pytest.raises(ConfigError, match="needs a folder"):
        open_data(DataConfig("voc"))


@pytest.mark.parametrize(
    ("kind", "name", "text", "value"),
    [
        ("shapes", "seed", "-3", -3),
        ("voc", "augmented", "false", False),
        ("voc", "augmented", "true", True),
        ("msrc", "void_classes", "horse, mountain", ["horse", "mountain"]),
        ("msrc", "void_classes", "boat", ["boat"]),
        ("msrc", "void_classes", "", []),
    ],
)
def test_the_text_of_an_option_becomes_a_value_of_its_type(kind: str, name: str, text: str, value: object) -> None:
    parsed = parse_option(kind, name, text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("kind", "name", "text", "message"),
    [
        ("shapes", "seed", "three", r"(?s)'seed' of the data set 'shapes'.*'three'"),
        ("voc", "augmented", "maybe", "'augmented' of the data set 'voc'"),
        ("voc", "augmentd", "true", "did you mean 'augmented'"),
        ("vok", "augmented", "true", "did you mean 'voc'"),
    ],
)
def test_the_text_of_an_option_that_cannot_be_read_is_refused(kind: str, name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_option(kind, name, text)
