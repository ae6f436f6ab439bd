"""edge-ilseg.toml: strict, with "did you mean", and written so that it can be read again."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_ilseg.config import (
    ClassesConfig,
    Config,
    DataConfig,
    StepConfig,
    override,
    parse_config,
    read_config,
    render_config,
)
from edge_ilseg.errors import ConfigError
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
        data=DataConfig("folder", '/data/a "quoted" name\\x', setup="disjoint", options={"seed": 3, "name": "ü"}),
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
        (MINIMAL + '[model]\nbackbone = "vgg"\n', r"model\.backbone"),
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


def test_an_override_keeps_what_is_not_given_and_checks_what_is() -> None:
    settings = override(StepConfig(), iterations=7, learning_rate=None)
    assert (settings.iterations, settings.learning_rate) == (7, StepConfig().learning_rate)
    with pytest.raises(ConfigError, match="iterations"):
        override(StepConfig(), iterations=0)
