"""Methods: named weights, replaced by hand, combinations that cannot work, and what the data has no place for."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_ilseg.config import StepConfig
from edge_ilseg.errors import ConfigError
from edge_ilseg.methods import (
    METHODS,
    SWITCHES,
    TERM_NAMES,
    check_switches_act,
    check_terms_can_move,
    fit_method,
    resolve_method,
)


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


def test_the_methods_of_the_papers_are_there_with_their_weights_and_switches() -> None:
    assert METHODS["kd-dilation"].losses == {"kd_dilation": 1.0}
    assert METHODS["kd-similarity-pooled"].similarity_pooling == "spatial"
    ilt = METHODS["ilt"]
    assert (ilt.losses, ilt.kd_softmax, ilt.kd_mask, ilt.kd_classes) == (
        {"kd_output": 100.0, "kd_feature_plain": 100.0}, "old", "all", "mean"
    )  # fmt: skip
    assert (METHODS["mib"].cross_entropy, METHODS["mib"].head_init) == ("unbiased", "background")
    assert (METHODS["plop"].pseudo_labels, METHODS["plop"].losses) == ("entropy", {"local_pod": 1.0})
    assert all(method.kd_temperature == method.kd_alpha == 1.0 for method in METHODS.values())


def test_every_switch_can_be_set_in_a_configuration_and_is_the_methods_own_where_it_is_not() -> None:
    assert set(SWITCHES) <= set(StepConfig.__struct_fields__)
    assert all(getattr(StepConfig(), name) is None for name in SWITCHES)
    assert resolve_method("ilt", kd_mask=None).kd_mask == "all"
    assert resolve_method("ilt", kd_mask="not_new").kd_mask == "not_new"


@pytest.mark.parametrize("switch", [{"kd_temperature": 0.0}, {"kd_mask": "none"}, {"no_such": 1}])
def test_a_switch_that_makes_no_sense_is_refused(switch: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="switch of the method"):
        resolve_method("kd-output", **switch)


@pytest.mark.parametrize(
    ("name", "switch", "lacking"),
    [
        ("finetune", {"kd_temperature": 2.0}, "kd_output"),
        ("freeze", {"kd_mask": "all"}, "kd_output"),
        ("kd-output", {"kd_alpha": 2.0}, "kd_unbiased"),
        ("mib", {"kd_classes": "sum"}, "kd_output"),
        ("kd-output", {"similarity_layer": "logits"}, "kd_similarity"),
        ("kd-similarity", {"similarity_layer": "features", "similarity_pooling": "branches"}, "similarity_layer"),
        ("finetune", {"smallest_frequency": 0.1}, "logit_adjustment"),
        ("kd-output", {"ridge": 0.1}, "closed form"),
    ],
)
def test_a_switch_that_changes_nothing_is_refused(name: str, switch: dict[str, object], lacking: str) -> None:
    method = resolve_method(name, **switch)
    with pytest.raises(ConfigError, match=rf"changes nothing here(.|\n)*without [^\n]*{lacking}"):
        check_switches_act(method, switch)


def test_a_switch_of_a_term_that_is_added_by_hand_acts() -> None:
    method = resolve_method("finetune", losses={"kd_output": 1.0}, kd_temperature=2.0)
    check_switches_act(method, ["kd_temperature"])
    check_switches_act(resolve_method("kd-similarity", similarity_pooling="branches"), ["similarity_pooling"])
    check_switches_act(resolve_method("finetune"), ["iterations"])


def test_a_start_of_the_head_that_needs_a_background_is_refused_without_one() -> None:
    method = resolve_method("kd-output", head_init="background")
    with pytest.raises(ConfigError, match="no background class"):
        fit_method(method, hides_old=False, background=None)
    assert fit_method(method, hides_old=False, background="void")[0] == method


def test_a_term_that_compares_frozen_branches_is_refused() -> None:
    for name in ("kd-dilation", "kd-similarity"):
        check_terms_can_move(METHODS[name], encoder_frozen=True)
        with pytest.raises(ConfigError, match=r"always zero: teacher and student have the same branches"):
            check_terms_can_move(METHODS[name], encoder_frozen=True, branches_frozen=True)
    logits = resolve_method("kd-similarity", similarity_layer="logits")
    check_terms_can_move(logits, encoder_frozen=True, branches_frozen=True)
    with pytest.raises(ConfigError, match="same features"):
        resolve_method("kd-similarity", similarity_layer="features", freeze="encoder")


def test_a_method_stays_as_it_is_where_the_data_has_a_background_and_hides_old_classes() -> None:
    for method in METHODS.values():
        assert fit_method(method, hides_old=True, background="background") == (method, ())


def test_pseudo_labels_have_nothing_to_complete_where_nothing_is_hidden() -> None:
    method, notes = fit_method(METHODS["plop"], hides_old=False, background="background")
    assert method.pseudo_labels == "none"
    assert notes == ("no pseudo-labels: this setup hides no label",)


def test_without_a_background_unbiased_terms_become_what_is_left_of_them() -> None:
    method, notes = fit_method(METHODS["mib"], hides_old=True, background=None)
    assert (method.cross_entropy, method.head_init) == ("plain", "default")
    assert method.losses == {"kd_output": 10.0}
    assert (method.kd_softmax, method.kd_mask, method.kd_classes) == ("old", "all", "mean")
    assert len(notes) == 3
    both = resolve_method("mib", losses={"kd_output": 1.0})
    with pytest.raises(ConfigError, match="needs a background class"):
        fit_method(both, hides_old=True, background=None)


def test_where_old_pixels_are_void_output_distillation_covers_them_unless_the_user_chose_the_pixels() -> None:
    method, notes = fit_method(METHODS["kd-output"], hides_old=True, background=None)
    assert (method.kd_mask, len(notes)) == ("not_new", 1)
    assert fit_method(METHODS["kd-output"], hides_old=False, background=None) == (METHODS["kd-output"], ())
    by_hand = resolve_method("kd-output", kd_mask="all")
    assert fit_method(by_hand, hides_old=True, background=None) == (by_hand, ())
    same = METHODS["kd-output"]
    assert fit_method(same, hides_old=True, background=None, given=("kd_mask",)) == (same, ())
    with pytest.raises(ConfigError, match="cannot start from the background's weights"):
        fit_method(METHODS["mib"], hides_old=True, background=None, given=("head_init",))


PRESETS: dict[str, tuple[str, dict[str, float], dict[str, object]]] = {
    "finetune": ("none", {}, {}),
    "kd-output": ("none", {"kd_output": 1.0}, {}),
    "freeze": ("encoder", {}, {}),
    "freeze+kd-output": ("encoder", {"kd_output": 1.0}, {}),
    "kd-feature": ("none", {"kd_feature": 1.0}, {}),
    "kd-feature-plain": ("none", {"kd_feature_plain": 50.0}, {}),
    "kd-output+kd-feature": ("none", {"kd_output": 1.0, "kd_feature": 1.0}, {}),
    "kd-dilation": ("none", {"kd_dilation": 1.0}, {}),
    "freeze+kd-dilation": ("encoder", {"kd_dilation": 1.0}, {}),
    "kd-output+kd-dilation": ("none", {"kd_output": 1.0, "kd_dilation": 1.0}, {}),
    "kd-similarity": ("none", {"kd_similarity": 1.0}, {}),
    "kd-similarity-pooled": ("none", {"kd_similarity": 1.0}, {"similarity_pooling": "spatial"}),
    "freeze+kd-similarity": ("encoder", {"kd_similarity": 1.0}, {}),
    "ilt": (
        "none",
        {"kd_output": 100.0, "kd_feature_plain": 100.0},
        {"kd_softmax": "old", "kd_mask": "all", "kd_classes": "mean"},
    ),
    "mib": ("none", {"kd_unbiased": 10.0}, {"cross_entropy": "unbiased", "head_init": "background"}),
    "plop": ("none", {"local_pod": 1.0}, {"pseudo_labels": "entropy", "head_init": "background"}),
    "balanced": ("none", {"kd_output": 1.0}, {"logit_adjustment": 0.5, "new_share": 0.7}),
    "freeze+balanced": ("encoder", {"kd_output": 1.0}, {"logit_adjustment": 0.5, "new_share": 0.7}),
    "analytic": ("all_but_head", {}, {"head_fit": "closed-form"}),
}
"""As docs/method.md has them: what is frozen, the weights, and the switches that are not the paper's."""


def test_the_presets_are_what_the_documentation_says_and_everything_else_is_the_papers_value() -> None:
    papers = {
        "cross_entropy": "plain",
        "logit_adjustment": 0.0,
        "smallest_frequency": 0.01,
        "new_share": 1.0,
        "pseudo_labels": "none",
        "kd_softmax": "all",
        "kd_mask": "old_pixels",
        "kd_classes": "sum",
        "kd_temperature": 1.0,
        "kd_alpha": 1.0,
        "similarity_layer": "branches",
        "similarity_pooling": "none",
        "head_init": "default",
        "head_fit": "gradient",
        "ridge": 0.01,
        "balance": 0.4,
    }
    assert set(papers) == set(SWITCHES)
    assert set(PRESETS) == set(METHODS)
    for name, (freeze, losses, switches) in PRESETS.items():
        method = METHODS[name]
        assert (method.freeze, method.losses) == (freeze, losses), name
        assert {switch: getattr(method, switch) for switch in SWITCHES} == papers | switches, name


def test_every_method_term_and_switch_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[1] / "docs" / "method.md").read_text()
    for name in (*METHODS, *TERM_NAMES, *SWITCHES):
        assert f"`{name}`" in text, name
