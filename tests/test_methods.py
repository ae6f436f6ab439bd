"""Methods: named weights, replaced by hand, and combinations that cannot work."""

from __future__ import annotations

import pytest

from edge_ilseg.errors import ConfigError
from edge_ilseg.methods import METHODS, resolve_method


def test_fine_tuning_freezes_nothing_and_distils_nothing() -> None:
    method = resolve_method("finetune")
    assert (method.freeze, method.losses) == ("none", {})


def test_every_method_of_the_first_paper_is_there() -> None:
    expected = {"finetune", "kd-output", "freeze", "freeze+kd-output", "kd-feature", "kd-output+kd-feature"}
    assert expected <= set(METHODS)
    assert all(METHODS[name].source for name in expected)


def test_a_weight_and_the_cut_point_can_be_set_by_hand() -> None:
    method = resolve_method("freeze+kd-output", freeze="stages:2", losses={"kd_output": 3.0})
    assert (method.freeze, method.losses) == ("stages:2", {"kd_output": 3.0})
    assert METHODS["freeze+kd-output"].losses == {"kd_output": 1.0}


@pytest.mark.parametrize("freeze", ["encoder", "all_but_head"])
@pytest.mark.parametrize("term", ["kd_feature", "kd_feature_plain"])
def test_a_feature_term_beside_a_frozen_encoder_is_refused(freeze: str, term: str) -> None:
    with pytest.raises(ConfigError, match="same features"):
        resolve_method("finetune", freeze=freeze, losses={term: 1.0})


def test_a_misspelt_method_or_term_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'kd-output'"):
        resolve_method("kd-ouput")
    with pytest.raises(ConfigError, match="did you mean 'kd_output'"):
        resolve_method("finetune", losses={"kd_outptu": 1.0})


@pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan")])
def test_a_weight_that_makes_no_sense_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        resolve_method("kd-output", losses={"kd_output": weight})
