"""Methods: named weights over the loss terms, switches, and what is frozen. A dictionary that one can read; no torch.

1. A method without a distillation term and without freezing is fine-tuning, the lower bound.
2. A term that is zero whatever the student does, because what it compares is frozen, is refused, not ignored.
3. What a method cannot be on the data at hand (a data set without background, labels that hide nothing) it is replaced
   for, by `fit_method`, which says so. A mask of distillation that was set by hand stays as it is, and a start of the
   head that needs a background is refused where there is none.
4. A head in closed form is fitted and not trained: whatever speaks of training beside it is refused, not ignored.
5. A switch that a user sets for one step and that changes nothing, because the method lacks what it is a switch of, can
   be refused (`check_switches_act`). In a file of settings it may stand for the methods that have it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edge_ilseg.errors import ConfigError, choice_hint

TERM_NAMES = (
    "kd_output",
    "kd_unbiased",
    "kd_feature",
    "kd_feature_plain",
    "kd_dilation",
    "kd_similarity",
    "local_pod",
)


CrossEntropy = Literal["plain", "unbiased"]
PseudoLabels = Literal["none", "entropy"]
Softmax = Literal["all", "old"]
Mask = Literal["old_pixels", "not_new", "all"]
OverClasses = Literal["sum", "mean"]
Factor = Annotated[float, Meta(gt=0)]
AdjustmentFactor = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(gt=0, le=1)]
ShareOrNone = Annotated[float, Meta(ge=0, le=1)]
SimilarityLayer = Literal["features", "branches", "logits"]
SimilarityPooling = Literal["none", "spatial", "branches"]
HeadInit = Literal["default", "background", "scaled"]
HeadFit = Literal["gradient", "closed-form"]


class Method(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one incremental step does beside cross-entropy. Defaults are the paper's values, where it has one."""

    name: str
    freeze: str
    losses: dict[str, float]
    source: str
    cross_entropy: CrossEntropy = "plain"
    """`unbiased`: a pixel labelled background may be any old class (MiB)."""
    logit_adjustment: AdjustmentFactor = 0.0
    """Factor of the classes' log frequencies in the step's labels, added to the logits in cross-entropy; 0: none."""
    smallest_frequency: Share = 0.01
    """With `logit_adjustment`: the frequency of a class that is rarer, or not in the labels at all."""
    new_share: Share = 1.0
    """Share of the trained weights in the result; the rest is the teacher's. Of new classes' weights always 1."""
    pseudo_labels: PseudoLabels = "none"
    """`entropy`: hidden pixels get the teacher's class where its entropy is below the class's median (PLOP)."""
    kd_softmax: Softmax = "all"
    kd_mask: Mask = "old_pixels"
    kd_classes: OverClasses = "sum"
    kd_temperature: Factor = 1.0
    """Of `kd_output`: T, in both softmaxes."""
    kd_alpha: Factor = 1.0
    """Of `kd_unbiased`: factor of the teacher's logits."""
    similarity_layer: SimilarityLayer = "branches"
    """What `kd_similarity` compares: the encoder's output, the ASPP branches side by side, or the logits."""
    similarity_pooling: SimilarityPooling = "none"
    """`spatial`: averaged over the positions first; `branches`: averaged over the branches first."""
    head_init: HeadInit = "default"
    head_fit: HeadFit = "gradient"
    """`closed-form`: the head is solved for, from sums over the images of all steps (`edge_ilseg.analytic`)."""
    ridge: Factor = 0.01
    """Of `closed-form`: the penalty on the weights, relative to each feature's variance."""
    balance: ShareOrNone = 0.4
    """Of `closed-form`: each pixel counts as its class's pixels to the power of minus this."""

    @property
    def is_closed_form(self) -> bool:
        """Whether nothing is trained by gradients (rule 4)."""
        return self.head_fit == "closed-form"


SWITCHES = tuple(Method.__struct_fields__[4:])
"""Names of the fields that a configuration may set by hand, beside `freeze` and `losses`."""
SWITCHES_OF_TERMS = {
    "kd_softmax": "kd_output",
    "kd_mask": "kd_output",
    "kd_classes": "kd_output",
    "kd_temperature": "kd_output",
    "kd_alpha": "kd_unbiased",
    "similarity_layer": "kd_similarity",
    "similarity_pooling": "kd_similarity",
}
"""What changes nothing unless this term has a weight (rule 5)."""


_PAPER = "Michieli & Zanuttigh, arXiv 1907.13372 and 1911.03462"
_LATER = "Michieli & Zanuttigh, arXiv 1911.03462"
_ANALYTIC = (
    "this project: ridge regression on frozen features from sums kept from step to step, after Zhuang et al. (arXiv "
    "2205.14922) and McDonnell et al. (arXiv 2307.02251); docs/adr/0012"
)
_BALANCED = (
    "this project: L'_D, logits adjusted by class frequency (Menon et al., arXiv 2007.07314) and weights averaged with "
    "the teacher's (Wortsman et al., arXiv 2109.01903); docs/adr/0008"
)

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("finetune", "none", {}, f"{_PAPER}: fine-tuning (FT)"),
        Method("kd-output", "none", {"kd_output": 1.0}, f"{_PAPER}: L'_D"),
        Method("freeze", "encoder", {}, f"{_PAPER}: E_F"),
        Method("freeze+kd-output", "encoder", {"kd_output": 1.0}, f"{_PAPER}: E_F + L'_D"),
        Method("kd-feature", "none", {"kd_feature": 1.0}, f"{_PAPER}: L''_D, relative to the teacher's energy"),
        Method("kd-feature-plain", "none", {"kd_feature_plain": 50.0}, f"{_PAPER}: L''_D as published"),
        Method(
            "kd-output+kd-feature",
            "none",
            {"kd_output": 1.0, "kd_feature": 1.0},
            f"{_PAPER}: L'_D + L''_D, relative to the teacher's energy",
        ),
        Method("kd-dilation", "none", {"kd_dilation": 1.0}, f"{_LATER}: L'''_D"),
        Method("freeze+kd-dilation", "encoder", {"kd_dilation": 1.0}, f"{_LATER}: E_F + L'''_D"),
        Method("kd-output+kd-dilation", "none", {"kd_output": 1.0, "kd_dilation": 1.0}, f"{_LATER}: L'_D + L'''_D"),
        Method("kd-similarity", "none", {"kd_similarity": 1.0}, f"{_LATER}: L''''_D; Tung & Mori, arXiv 1907.09682"),
        Method(
            "kd-similarity-pooled",
            "none",
            {"kd_similarity": 1.0},
            f"{_LATER}: L''''_D of the spatial average; Tung & Mori, arXiv 1907.09682",
            similarity_pooling="spatial",
        ),
        Method("freeze+kd-similarity", "encoder", {"kd_similarity": 1.0}, f"{_LATER}: E_F + L''''_D"),
        Method(
            "ilt",
            "none",
            {"kd_output": 100.0, "kd_feature_plain": 100.0},
            f"{_PAPER}: L'_D + L''_D, as Cermelli et al., arXiv 2002.00718, and their successors compare with it",
            kd_softmax="old",
            kd_mask="all",
            kd_classes="mean",
        ),
        Method(
            "mib",
            "none",
            {"kd_unbiased": 10.0},
            "Cermelli et al., arXiv 2002.00718: unbiased cross-entropy and distillation",
            cross_entropy="unbiased",
            head_init="background",
        ),
        Method(
            "plop",
            "none",
            {"local_pod": 1.0},
            "Douillard et al., arXiv 2011.11390: local POD, pseudo-labels by median entropy",
            pseudo_labels="entropy",
            head_init="background",
        ),
        Method("balanced", "none", {"kd_output": 1.0}, _BALANCED, logit_adjustment=0.5, new_share=0.7),
        Method("freeze+balanced", "encoder", {"kd_output": 1.0}, _BALANCED, logit_adjustment=0.5, new_share=0.7),
        Method("analytic", "all_but_head", {}, _ANALYTIC, head_fit="closed-form"),
    )
}


def resolve_method(
    name: str, *, freeze: str | None = None, losses: Mapping[str, float] | None = None, **switches: object
) -> Method:
    """A named method, with its cut point, single weights or `SWITCHES` replaced by hand; None keeps the preset's.

    Raises:
        ConfigError: the method, a term or a switch is unknown, a weight or a value is out of range, or the
            combination cannot work (rule 2).
    """
    if name not in METHODS:
        raise ConfigError(
            "there is no such method", found=repr(name), expected=", ".join(METHODS), hint=choice_hint(name, METHODS)
        )
    preset = METHODS[name]
    weights = {**preset.losses, **(losses or {})}
    for term, weight in weights.items():
        if term not in TERM_NAMES:
            raise ConfigError(
                "there is no such loss term",
                found=repr(term),
                expected=", ".join(TERM_NAMES),
                hint=choice_hint(term, TERM_NAMES),
            )
        if not 0 <= weight < float("inf"):
            raise ConfigError(
                "a loss weight is out of range",
                where=term,
                found=weight,
                expected="0 or more",
                hint=f"give it a weight in this range: --loss {term}=1",
            )
    given = {key: value for key, value in switches.items() if value is not None}
    try:
        method = msgspec.convert(
            {
                **msgspec.to_builtins(preset),
                "freeze": preset.freeze if freeze is None else freeze,
                "losses": weights,
                **given,
            },
            Method,
        )
    except msgspec.ValidationError as error:
        raise ConfigError(
            "a switch of the method has a value that cannot be used",
            found=str(error),
            hint="give the switch a value of this type",
        ) from error
    check_terms_can_move(method, encoder_frozen=method.freeze in ("encoder", "all_but_head"))
    _check_nothing_is_trained(method)
    return method


def check_switches_act(method: Method, given: Collection[str]) -> None:
    """Refuse what was set by hand and changes nothing (rule 5).

    Args:
        method: with these switches.
        given: names of those that were set.

    Raises:
        ConfigError: names the first of them.
    """
    of_terms = {name: term for name, term in SWITCHES_OF_TERMS.items() if name in given}
    lacking = {name: f"the term {term}" for name, term in of_terms.items() if not method.losses.get(term)}
    if "smallest_frequency" in given and not method.logit_adjustment:
        lacking["smallest_frequency"] = "logit_adjustment"
    for name in {"ridge", "balance"} & set(given):
        if not method.is_closed_form:
            lacking[name] = "a head in closed form"
    if "similarity_pooling" in given and method.similarity_pooling == "branches" != method.similarity_layer:
        lacking["similarity_pooling"] = "similarity_layer = branches, whose branches it averages"
    if lacking:
        name = min(lacking)
        raise ConfigError(
            "a switch of the method changes nothing here",
            where=f"method {method.name!r}",
            found=f"{name} = {getattr(method, name)!r} without {lacking[name]}",
            hint=f"leave {name} out, or give it what it is a switch of",
        )


def _check_nothing_is_trained(method: Method) -> None:
    """Refuse what a head in closed form has no place for (rule 4)."""
    if not method.is_closed_form:
        return
    if method.freeze != "all_but_head":
        raise ConfigError(
            "a head in closed form is fitted to features that no longer move",
            where="freeze",
            found=repr(method.freeze),
            expected="'all_but_head'",
            hint="leave --freeze out, or take a method with gradients",
        )
    plain = METHODS["analytic"]
    fitted = ("name", "source", "losses", "head_fit", "ridge", "balance")
    idle = [name for name in Method.__struct_fields__ if name not in fitted]
    beside = [name for name in idle if getattr(method, name) != getattr(plain, name)]
    beside += [term for term, weight in method.losses.items() if weight]
    if beside:
        raise ConfigError(
            "a head in closed form has no training that this could change",
            found=", ".join(beside),
            hint="leave it out, or take a method with gradients",
        )


def check_terms_can_move(method: Method, *, encoder_frozen: bool, branches_frozen: bool = False) -> None:
    """Refuse a term that compares what is frozen with itself (rule 2).

    Args:
        method: its terms.
        encoder_frozen: nothing of the encoder is trained.
        branches_frozen: nothing of the ASPP branches is trained either.

    Raises:
        ConfigError: names the terms.
    """
    compared = {
        "kd_feature": encoder_frozen,
        "kd_feature_plain": encoder_frozen,
        "kd_dilation": branches_frozen,
        "kd_similarity": {"features": encoder_frozen, "branches": branches_frozen, "logits": False}[
            method.similarity_layer
        ],
    }
    idle = [term for term, is_frozen in compared.items() if is_frozen and method.losses.get(term)]
    if idle:
        only_branches = all(term in ("kd_dilation", "kd_similarity") for term in idle)
        what = "branches" if only_branches and method.similarity_layer == "branches" else "features"
        raise ConfigError(
            f"a term beside a frozen layer that it compares is always zero: teacher and student have the same {what}",
            found=f"freeze {method.freeze!r} with {', '.join(idle)}",
            hint="drop the term, or freeze less (freeze = none, stem, stages:<n>)",
        )


def fit_method(
    method: Method, *, hides_old: bool, background: str | None, given: Collection[str] = ()
) -> tuple[Method, tuple[str, ...]]:
    """The method as it can be run on the data at hand (rule 3), and what was replaced, one sentence each.

    Args:
        method: as resolved.
        hides_old: the setup hides the old classes in the new images.
        background: name of the background class, or None.
        given: names of the switches that were set by hand.

    Raises:
        ConfigError: the method needs a background, and has `kd_output` beside `kd_unbiased`, or a `head_init` that was
            set by hand.
    """
    preset, notes = METHODS[method.name], []
    if method.pseudo_labels != "none" and not hides_old:
        method = msgspec.structs.replace(method, pseudo_labels="none")
        notes.append("no pseudo-labels: this setup hides no label")
    if background is None:
        has_preset_mask = method.kd_mask == preset.kd_mask == "old_pixels" and "kd_mask" not in given
        if method.losses.get("kd_output") and hides_old and has_preset_mask:
            method = msgspec.structs.replace(method, kd_mask="not_new")
            notes.append("distillation on every pixel that is not new: pixels of old classes are void")
        if method.cross_entropy == "unbiased":
            method = msgspec.structs.replace(method, cross_entropy="plain")
            notes.append("plain cross-entropy: there is no background for old classes to hide in")
        if method.losses.get("kd_unbiased"):
            idle = "" if method.kd_alpha == 1 else ", and kd_alpha has nothing to sharpen"
            method = _without_background(method)
            notes.append(
                f"distillation over the old channels in place of the unbiased one{idle}: there is no background"
            )
        if method.head_init == preset.head_init == "background" and "head_init" not in given:
            method = msgspec.structs.replace(method, head_init="default")
            notes.append("new classes start from random weights: there is no background")
        elif method.head_init == "background":
            raise ConfigError(
                "new classes cannot start from the background's weights: the data set has no background class",
                where=f"method {method.name!r}",
                found="head_init = 'background'",
                expected="'default' or 'scaled'",
                hint="leave head_init out",
            )
    return method, tuple(notes)


def _without_background(method: Method) -> Method:
    """What is left of unbiased distillation where no channel can stand for the new classes: the old ones alone."""
    if method.losses.get("kd_output"):
        raise ConfigError(
            "unbiased distillation needs a background class, and without one it would be output distillation, which "
            "the method has already",
            found=f"method {method.name!r} with kd_unbiased and kd_output",
            hint="set the weight of one of the two to 0",
        )
    weights = {("kd_output" if term == "kd_unbiased" else term): w for term, w in method.losses.items() if w}
    return msgspec.structs.replace(method, losses=weights, kd_softmax="old", kd_mask="all", kd_classes="mean")
