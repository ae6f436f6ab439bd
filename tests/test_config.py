"""edge-ilseg.toml: strict, with "did you mean", and written so that it can be read again."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_ilseg.config import (
    ClassesConfig,
    Config,
    DataConfig,
    StepConfig,
    TrainConfig,
    override,
    parse_config,
    read_config,
    render_config,
)
from edge_ilseg.errors import ConfigError, EdgeIlsegError
from edge_ilseg.models.spec import ModelSpec

MINIMAL = '[data]\nkind = "shapes"\n[classes]\nbase = ["disk", "ring"]\n'


def test_defaults_fill_what_is_not_said() -> None:
    config = parse_config(MINIMAL)
    assert config.classes.base == ("disk", "ring")
    assert config.step.method == "freeze+kd-output"
    assert config.step.batch_norm == "eval"
    assert config.train.batch_norm == "train"


def test_a_rendered_configuration_reads_back_the_same() -> None:
    config = Config(
        data=DataConfig(
            "folder",
            '/data/a "quoted" name\\x',
            setup="disjoint",
            options={"seed": 3, "names": ["ü", 'a"b'], "on": True},
        ),
        classes=ClassesConfig(("a", "b c")),
        model=ModelSpec(backbone="tiny", output_stride=8),
        weights="none",
        step=StepConfig(losses={"kd_output": 2.5}, freeze="stages:1"),
    )
    assert parse_config(render_config(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "[step]\nlearning_rat = 1\n", "did you mean 'learning_rate'"),
        (MINIMAL + "[stepp]\n", "did you mean 'step'"),
        (MINIMAL.replace("kind", "knd"), "did you mean 'kind'"),
        (MINIMAL + "[step]\niterations = 0\n", r"step\.iterations"),
        (MINIMAL + '[train]\nlearning_rate = "fast"\n', r"train\.learning_rate"),
        (
            MINIMAL + '[model]\nbackbone = "vgg"\n',
            r"(?s)edge-ilseg\.toml \[model\] backbone.*'vgg'.*resnet18, resnet50",
        ),
        (MINIMAL + '[model]\nbackbone = "tine"\n', "did you mean 'tiny'"),
        (MINIMAL + "[model]\noutput_stride = 4\n", r"(?s)output_stride.*found: *4.*one of 8, 16"),
        (MINIMAL + "[train]\nbatch_norm = 1\n", r"(?s)batch_norm.*one of train, eval"),
        (MINIMAL.replace('"shapes"', '"shapes"\nsetup = "disjunct"'), "did you mean 'disjoint'"),
        (MINIMAL.replace('"shapes"', '"shapes"\npartition_seed = -1'), r"data\.partition_seed"),
        (MINIMAL + "[train]\nscale_min = 2.0\n", r"(?s)range of scales.*\[train\].*2\.0 to 1\.5"),
        (MINIMAL + "[step]\nscale_max = 100.0\n", r"(?s)range of scales.*\[step\]"),
        (MINIMAL + '[step]\nmethod = "kd-ouput"\n', r"(?s)\[step\].*'kd-ouput'.*did you mean 'kd-output'"),
        (MINIMAL + '[step]\nfreeze = "encodr"\n', r"(?s)\[step\] freeze.*did you mean 'encoder'"),
        (MINIMAL + "[step.losses]\nkd_out = 1\n", r"(?s)\[step\].*did you mean 'kd_output'"),
        (MINIMAL + '[step]\nmethod = "kd-feature"\nfreeze = "encoder"\n', "term beside a frozen layer"),
        ("format_version = 9\n" + MINIMAL, "version"),
        ("[data\n", "not valid TOML"),
        ('[data]\nkind = "shapes"\n', "classes"),
    ],
)
def test_a_mistake_is_named_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(text)


def test_a_folder_without_configuration_is_no_workspace(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="edge-ilseg init"):
        read_config(tmp_path / "edge-ilseg.toml")


def test_a_file_that_is_not_utf_8_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "edge-ilseg.toml").write_bytes(MINIMAL.replace("disk", "größe").encode("latin-1"))
    with pytest.raises(ConfigError, match=r"(?s)not UTF-8.*edge-ilseg\.toml"):
        read_config(tmp_path / "edge-ilseg.toml")


def test_a_file_that_the_disk_refuses_is_an_error_for_the_user(tmp_path: Path) -> None:
    (tmp_path / "edge-ilseg.toml").mkdir()
    with pytest.raises(EdgeIlsegError, match="could not be read"):
        read_config(tmp_path / "edge-ilseg.toml")


def test_a_relative_data_root_is_taken_from_the_folder_of_the_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    path = work / "edge-ilseg.toml"
    path.write_text(MINIMAL.replace('"shapes"', '"folder"\nroot = "../images"'))
    assert read_config(path).data.root == str(tmp_path / "images")
    monkeypatch.chdir(work)
    assert read_config(Path("edge-ilseg.toml")).data.root == str(tmp_path / "images")
    path.write_text(MINIMAL.replace('"shapes"', '"folder"\nroot = "/data/images"'))
    assert read_config(path).data.root == "/data/images"
    path.write_text(MINIMAL)
    assert read_config(path).data.root is None


def test_lists_are_options_of_a_data_set() -> None:
    text = MINIMAL.replace('"shapes"', '"msrc"\n[data.options]\nvoid_classes = ["horse", "boat"]')
    assert parse_config(text).data.options == {"void_classes": ["horse", "boat"]}


def test_an_override_keeps_what_is_not_given_and_checks_what_is() -> None:
    settings = override(StepConfig(), iterations=7, learning_rate=None)
    assert (settings.iterations, settings.learning_rate) == (7, StepConfig().learning_rate)
    with pytest.raises(ConfigError, match="iterations"):
        override(StepConfig(), iterations=0)
    with pytest.raises(ConfigError, match=r"(?s)backbone.*did you mean 'resnet18'"):
        override(ModelSpec(), backbone="resnet-18")
    with pytest.raises(ConfigError, match="did you mean 'finetune'"):
        override(StepConfig(), method="fintune")
    with pytest.raises(ConfigError, match="range of scales"):
        override(TrainConfig(), scale_min=1.6)
