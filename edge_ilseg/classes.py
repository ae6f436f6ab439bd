"""Class names as people type them.

1. A name finds a class by its exact spelling first; then without regard to case, blanks, hyphens and underscores;
   then by an alias. A class's own name always wins over an alias.
2. What comes back is always the data set's own spelling, in the order asked for.
3. Between data sets a class is the same when its name is the same, letter by letter. A name that differs in case or
   blanks alone is an error: as a second class it would be learned against the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edge_ilseg.errors import ClassNameError, did_you_mean


def resolve_classes(names: Sequence[str], classes: Sequence[str], aliases: Mapping[str, str]) -> tuple[str, ...]:
    """Find each of `names` among `classes`.

    Args:
        names: as typed, for example `["tv", "Potted plant"]`.
        classes: the data set's class names.
        aliases: other name -> class name; an alias of a class that `classes` does not hold is left aside.

    Returns:
        The class names, in the order of `names`.

    Raises:
        ClassNameError: a name is unknown or could be either of two classes, or one class is named twice.
    """
    found: dict[str, str] = {}
    for name in names:
        resolved = _resolve(name, classes, aliases)
        if resolved in found:
            raise ClassNameError(
                f"the class {resolved!r} is named twice",
                found=f"{found[resolved]!r} and {name!r}" if found[resolved] != name else repr(name),
                hint="name each class once",
            )
        found[resolved] = name
    return tuple(found)


def check_spelling(classes: Sequence[str], known: Sequence[str]) -> None:
    """Check that no class of a data set is a class that the model knows, in another spelling (rule 3).

    Args:
        classes: the data set's class names.
        known: the model's class names.

    Raises:
        ClassNameError: one differs from a known class in case, blanks, hyphens or underscores alone.
    """
    spelling = {_key(name): name for name in known}
    for name in classes:
        if name not in known and _key(name) in spelling:
            raise ClassNameError(
                f"the data set's class {name!r} is a class of the model in another spelling",
                found=repr(name),
                expected=repr(spelling[_key(name)]),
                hint=f"rename {name!r} to {spelling[_key(name)]!r} in the data set's list of classes",
            )


def _resolve(name: str, classes: Sequence[str], aliases: Mapping[str, str]) -> str:
    if name in classes:
        return name
    wanted = _key(name)
    matches = [item for item in classes if _key(item) == wanted]
    if len(matches) > 1:
        raise ClassNameError(
            f"{name!r} could be more than one class",
            found=", ".join(repr(item) for item in matches),
            hint="spell it exactly as in the list of classes",
        )
    matches += [item for alias, item in aliases.items() if _key(alias) == wanted and item in classes]
    if matches:
        return matches[0]
    usable = [alias for alias, item in aliases.items() if item in classes]
    raise ClassNameError(
        f"unknown class {name!r}",
        expected=f"one of {', '.join(classes)}",
        hint=did_you_mean(name, [*usable, *classes]) or "see the list with: edge-ilseg data inspect",
    )


def _key(name: str) -> str:
    return "".join(char for char in name.casefold() if char not in " -_/")
