"""Methods: named weights over the loss terms, and what is frozen. A dictionary that one can read; no torch here.

1. A method without a distillation term and without freezing is fine-tuning, the lower bound.
2. A frozen encoder has the teacher's features, so a feature term beside it is zero: the pair is refused, not ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from edge_ilseg.errors import ConfigError, did_you_mean

TERM_NAMES = ("kd_output", "kd_feature", "kd_feature_plain")


class Method(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one incremental step does beside cross-entropy."""

    name: str
    freeze: str
    losses: dict[str, float]
    source: str
    kd_softmax: Literal["all", "old"] = "all"
    kd_mask: Literal["old_pixels", "all"] = "old_pixels"
    head_init: Literal["default", "background", "scaled"] = "default"


_PAPER = "Michieli & Zanuttigh, arXiv 1907.13372 and 1911.03462"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("finetune", "none", {}, f"{_PAPER}: fine-tuning (FT)"),
        Method("kd-output", "none", {"kd_output": 1.0}, f"{_PAPER}: L'_D"),
        Method("freeze", "encoder", {}, f"{_PAPER}: E_F"),
        Method("freeze+kd-output", "encoder", {"kd_output": 1.0}, f"{_PAPER}: E_F + L'_D"),
        Method("kd-feature", "none", {"kd_feature": 1.0}, f"{_PAPER}: L''_D, relative to the teacher's energy"),
        Method(
            "kd-output+kd-feature",
            "none",
            {"kd_output": 1.0, "kd_feature": 1.0},
            f"{_PAPER}: L'_D + L''_D, relative to the teacher's energy",
        ),
    )
}


def resolve_method(
    name: str,
    *,
    freeze: str | None = None,
    losses: Mapping[str, float] | None = None,
    kd_softmax: Literal["all", "old"] = "all",
    kd_mask: Literal["old_pixels", "all"] = "old_pixels",
    head_init: Literal["default", "background", "scaled"] = "default",
) -> Method:
    """A named method, with its cut point, single weights or switches replaced by hand.

    Raises:
        ConfigError: the method or a term is unknown, a weight is negative, or the combination cannot work (rule 2).
    """
    if name not in METHODS:
        raise ConfigError(
            "there is no such method", found=repr(name), expected=", ".join(METHODS), hint=did_you_mean(name, METHODS)
        )
    preset = METHODS[name]
    weights = {**preset.losses, **(losses or {})}
    for term, weight in weights.items():
        if term not in TERM_NAMES:
            raise ConfigError(
                "there is no such loss term",
                found=repr(term),
                expected=", ".join(TERM_NAMES),
                hint=did_you_mean(term, TERM_NAMES),
            )
        if not 0 <= weight < float("inf"):
            raise ConfigError("a loss weight is out of range", where=term, found=weight, expected="0 or more")
    method = Method(name, freeze or preset.freeze, weights, preset.source, kd_softmax, kd_mask, head_init)
    if method.freeze in ("encoder", "all_but_head"):
        check_no_feature_term(method)
    return method


def check_no_feature_term(method: Method) -> None:
    """Refuse a method with a feature term, because its encoder is frozen (rule 2).

    Raises:
        ConfigError: it has one.
    """
    feature_terms = [term for term in ("kd_feature", "kd_feature_plain") if method.losses.get(term)]
    if feature_terms:
        raise ConfigError(
            "a feature term beside a frozen encoder is always zero: teacher and student have the same features",
            found=f"freeze {method.freeze!r} with {', '.join(feature_terms)}",
            hint="drop the feature term, or freeze less (freeze = none, stem, stages:<n>)",
        )
