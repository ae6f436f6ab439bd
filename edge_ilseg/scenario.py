"""The plan of classes: which images a step may see, and what their labels say in it. Decides only; reads no file.

A *setup* is two functions, an image filter (`select_images`) and a label remap (`label_lookup`). With `new` the classes
of this step, `old` those of the steps before, `later` the rest of the data set's classes:

| setup         | images of the step                            | pixels of old classes | pixels of later classes |
|---------------|-----------------------------------------------|-----------------------|-------------------------|
| `sequential`  | show a new class and none that comes later    | keep their label      | do not occur            |
| `disjoint`    | the same images                               | hidden                | do not occur            |
| `overlapped`  | show a new class                              | hidden                | hidden                  |
| `partitioned` | as overlapped, but each image is in one step  | hidden                | hidden                  |

1. A *channel* is an index into the logits: old classes first, in their order, then new ones. Channels never move.
2. *Hidden* pixels become the background's channel; in a data set without background they become void.
3. Void (255) stays void. Label id and channel are different numbers, and the background may be any of either.
4. The background is learned at step 0 and always visible; it is never a reason to select an image.
5. Under `sequential`, `disjoint` and `partitioned` no image is in two steps of one plan. In the first two that follows
   from the order of the classes; in `partitioned` an image belongs to one of the classes it shows, drawn by
   sha256(seed, image id) over their sorted names, whatever the plan: so another plan moves no image between classes.
6. Whatever is drawn comes from SHA-256, never from a generator: the same plan on every machine and version.

Sources: Michieli & Zanuttigh, ICCVW 2019 (sequential); Cermelli et al., CVPR 2020 (disjoint, overlapped).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edge_ilseg.errors import ClassNameError, ConfigError, choice_hint
from edge_ilseg.metrics import VOID

Setup = Literal["sequential", "disjoint", "overlapped", "partitioned"]
ClassOrder = Literal["listed", "alphabetical", "frequency", "random"]
SETUPS: tuple[str, ...] = get_args(Setup)
CLASS_ORDERS: tuple[str, ...] = get_args(ClassOrder)
Presence = Mapping[str, frozenset[str]]
"""Image id -> names of the classes with at least one pixel in it, background left out."""


def select_images(
    setup: Setup,
    presence: Presence,
    *,
    new: Sequence[str],
    old: Sequence[str],
    later: Sequence[str],
    seed: int = 0,
) -> tuple[str, ...]:
    """The images of one step, in the order of `presence`.

    Args:
        presence: every image of the training split.
        new: the step's classes; step 0 has `old=()`. The background may be among them or among `old` (rule 4).
        later: the classes of the data set that are neither old nor new (see `later_classes`).
        seed: of `partitioned`; the other setups draw nothing.

    Raises:
        ConfigError: unknown setup.
        ClassNameError: a class is in two of `new`, `old` and `later`.
        ValueError: an image shows a class that is in none of them.
    """
    _check_known(setup, SETUPS, "setup")
    _check_disjoint(new=new, old=old, later=later)
    known = frozenset((*new, *old, *later))
    for image_id, shown in presence.items():
        if not shown <= known:
            raise ValueError(f"image {image_id!r} shows {sorted(shown - known)}, neither new nor old nor later")
    wanted, to_come = frozenset(new), frozenset(later)
    if setup == "partitioned":
        return tuple(image_id for image_id, shown in presence.items() if owning_class(image_id, shown, seed) in wanted)
    excluded = to_come if setup in ("sequential", "disjoint") else frozenset()
    return tuple(image_id for image_id, shown in presence.items() if shown & wanted and not shown & excluded)


def owning_class(image_id: str, shown: frozenset[str], seed: int) -> str | None:
    """The class that an image belongs to under `partitioned` (rule 5); None for an image that shows none.

    sha256 of `<seed>:<image id>`, as an integer, modulo the number of classes shown, counts along their sorted names.
    """
    if not shown:
        return None
    draw = int(hashlib.sha256(f"{seed}:{image_id}".encode()).hexdigest(), 16)
    return sorted(shown)[draw % len(shown)]


def label_lookup(
    setup: Setup, classes: Sequence[str], background: str | None, *, old: Sequence[str], new: Sequence[str]
) -> NDArray[np.uint8]:
    """Label id -> channel for the training labels of one step; `lookup[labels_HW]` applies it.

    Args:
        classes: the data set's classes; a label id is an index into them.
        background: name of the background class, or None.
        old: may name classes that the data set does not have, as when new images come with a list of their own: they
            keep their channels and no pixel has them.

    Returns:
        uint8 [256]. New classes and the background have their channel, old classes theirs under `sequential`; all
        other classes are hidden (rule 2). 255, and every value that is no label id, becomes void.

    Raises:
        ConfigError: unknown setup.
        ClassNameError: a new class is unknown to the data set, a class is twice in the plan, or the background is in
            neither `old` nor `new`.
    """
    _check_known(setup, SETUPS, "setup")
    for name in new:
        if name not in classes:
            raise ClassNameError(
                f"unknown class {name!r}", expected=f"one of {', '.join(classes)}", hint=choice_hint(name, classes)
            )
    known = (*old, *new)
    visible = frozenset(known if setup == "sequential" else new)
    return _lookup(classes, background, known, visible)


def evaluation_lookup(classes: Sequence[str], background: str | None, known: Sequence[str]) -> NDArray[np.uint8]:
    """Label id -> channel for evaluation of a model that knows `known`, in channel order, whatever the setup was.

    Returns:
        uint8 [256]. Classes that the model has not met are hidden (rule 2). `known` may name classes that the data
        set does not have: no pixel has them.

    Raises:
        ClassNameError: the data set has none of the classes but the background, a class is twice in `known`, or the
            background is not in it.
    """
    if not any(name in classes and name != background for name in known):
        raise ClassNameError(
            "the data set has none of the classes that the model knows",
            found=f"data set: {', '.join(classes)}",
            expected=f"one at least of {', '.join(name for name in known if name != background)}",
            hint="check that the data set is the right one, and that its classes have the model's names",
        )
    return _lookup(classes, background, known, frozenset(known))


def later_classes(classes: Sequence[str], *, old: Sequence[str], new: Sequence[str]) -> tuple[str, ...]:
    """The classes of the data set that are neither old nor new, in the data set's order."""
    return tuple(name for name in classes if name not in old and name not in new)


def check_every_class_has_an_image(
    setup: Setup,
    presence: Presence,
    selected: Sequence[str],
    *,
    new: Sequence[str],
    later: Sequence[str],
    background: str | None,
) -> None:
    """Check that each of `new` is shown by one of the `selected` images at least; the background need not be.

    Raises:
        ClassNameError: names every class that is not, what became of its images, and what to do.
    """
    shown_somewhere = frozenset[str]().union(*(presence[image_id] for image_id in selected))
    missing = [name for name in new if name not in shown_somewhere and name != background]
    if not missing:
        return
    several = len(missing) > 1
    raise ClassNameError(
        f"{len(missing)} {'classes' if several else 'class'} would be learned without a single image: "
        f"{', '.join(missing)}",
        where=f"setup {setup!r}: {len(selected)} of {len(presence)} images, for {', '.join(new)}",
        found="; ".join(_whereabouts(name, presence, later) for name in missing),
        expected="at least one selected image for every class of the step",
        hint=_advice(setup, missing, presence),
    )


def order_classes(
    order: ClassOrder, pixels: Mapping[str, int], classes: Sequence[str], background: str | None, seed: int = 0
) -> tuple[str, ...]:
    """All classes in the order in which a plan takes them; the background is always first.

    Args:
        order: `listed` (the data set's), `alphabetical`, `frequency` (labelled training pixels, most first; equal
            ones as listed), or `random` (by sha256 of `<seed>:<name>`).
        pixels: labelled pixels of each class in the training split; read by `frequency` only.

    Raises:
        ConfigError: unknown order.
    """
    _check_known(order, CLASS_ORDERS, "class order")
    foreground = [name for name in classes if name != background]
    if order == "alphabetical":
        foreground.sort(key=lambda name: (name.casefold(), name))
    elif order == "frequency":
        foreground.sort(key=lambda name: -pixels.get(name, 0))
    elif order == "random":
        foreground.sort(key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    return (*(name for name in classes if name == background), *foreground)


def parse_scenario(text: str, classes: Sequence[str], background: str | None) -> tuple[tuple[str, ...], ...]:
    """Turn `16+5`, `15+1x5` (15, then five steps of one) or `10+5+5` into the classes of each step.

    The background is not counted and belongs to step 0: on VOC `19+1` is background and 19, then one.

    Args:
        classes: in the order in which the plan takes them (see `order_classes`).

    Returns:
        One tuple of class names a step.

    Raises:
        ConfigError: the text cannot be read, or its sum is not the number of classes without the background.
    """
    sizes: list[int] = []
    for part in text.replace(" ", "").split("+"):
        match = re.fullmatch(r"([1-9][0-9]{0,2})(?:x([1-9][0-9]{0,2}))?", part)
        if match is None:
            raise ConfigError(
                f"the scenario {text!r} cannot be read",
                found=repr(part),
                expected="sizes of steps such as '16+5', '10+5+5', or '15+1x5' for five steps of one class",
                hint="write the sizes of the steps with + between them",
            )
        sizes += [int(match[1])] * int(match[2] or 1)
    foreground = [name for name in classes if name != background]
    if sum(sizes) != len(foreground):
        raise ConfigError(
            f"the scenario {text!r} does not fit the data set",
            found=f"{' + '.join(map(str, sizes))} = {sum(sizes)} classes",
            expected=f"{len(foreground)} classes" + (f", not counting {background!r}" if background else ""),
            hint="make the sizes of the steps add up to the number of classes",
        )
    remaining = iter(foreground)
    first, *rest = [tuple(islice(remaining, size)) for size in sizes]
    return ((*(name for name in classes if name == background), *first), *rest)


def _lookup(
    classes: Sequence[str], background: str | None, known: Sequence[str], visible: frozenset[str]
) -> NDArray[np.uint8]:
    _check_disjoint(known=known)
    if background is not None and background not in known:
        raise ClassNameError(
            f"the background class {background!r} is in no step",
            found=", ".join(known),
            hint="put it into step 0, where it is learned with the first classes",
        )
    channel_of = {name: channel for channel, name in enumerate(known)}
    hidden = VOID if background is None else channel_of[background]
    lookup = np.full(256, VOID, dtype=np.uint8)
    for label, name in enumerate(classes):
        lookup[label] = channel_of[name] if name in visible else hidden
    return lookup


def _whereabouts(name: str, presence: Presence, later: Sequence[str]) -> str:
    """What became of the images of a class that has none in its step."""
    holders = [shown for shown in presence.values() if name in shown]
    if not holders:
        return f"{name}: in no image of the split"
    companions = {other: sum(other in shown for shown in holders) for other in later}
    frequent = sorted((item for item in companions.items() if item[1]), key=lambda item: -item[1])
    text = f"{name}: in {len(holders)} {'image' if len(holders) == 1 else 'images'} of the split"
    shared = ", ".join(f"{other} in {count}" for other, count in frequent[:4])
    return f"{text}, together with classes of later steps ({shared})" if shared else text


def _advice(setup: Setup, missing: Sequence[str], presence: Presence) -> str:
    if not any(name in shown for shown in presence.values() for name in missing):
        return "add labelled images of these classes to the split, or leave the classes out of the plan"
    if setup == "partitioned":
        return (
            "take another partition_seed, or the setup 'overlapped': each image belongs to one of the classes it shows"
        )
    return (
        "learn them in a later step, or the classes they appear with in an earlier one (the order 'frequency' often "
        "does), or take the setup 'overlapped', which keeps images that show classes of later steps"
    )


def _check_known(value: str, known: Sequence[str], what: str) -> None:
    if value not in known:
        raise ConfigError(
            f"unknown {what} {value!r}", expected=f"one of {', '.join(known)}", hint=choice_hint(value, known)
        )


def _check_disjoint(**groups: Sequence[str]) -> None:
    owner: dict[str, str] = {}
    for group, names in groups.items():
        for name in names:
            if name in owner:
                raise ClassNameError(
                    f"the class {name!r} is in the plan twice",
                    found=f"{owner[name]} and {group}" if owner[name] != group else f"twice in {group}",
                    hint="a class is learned in one step",
                )
            owner[name] = group
