"""Versioned JSON: one way to turn the bytes of any of this project's records into a value.

1. Whatever the bytes are, the result is a value of the asked type or the caller's error; no other exception.
2. Format and version are looked at before anything else: a record of another version is named as one, not as damaged.
3. Unknown and missing fields are refused and named.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from edge_ilseg.errors import EdgeIlsegError

T = TypeVar("T", bound=msgspec.Struct)
V = TypeVar("V")


def parse_versioned(
    data: bytes,
    struct: type[T],
    *,
    format: str,
    version: int,
    error: type[EdgeIlsegError],
    what: str,
    where: object,
    hint: str,
) -> T:
    """Turn JSON with the fields `format` and `format_version` into a `struct` (rules 1 to 3).

    Args:
        data: the file's bytes.
        struct: forbids unknown fields.
        format: what the record calls itself.
        version: the one version that is read.
        error: raised for anything that is wrong.
        what: what the error calls the record, as "the manifest".
        where: its file, if there is one.
        hint: what to do about it.

    Raises:
        EdgeIlsegError: as `error`: not a JSON object, another format or version, a missing, unknown or wrong field.
    """
    head = _decode(data, dict[str, object], error, f"{what} is not JSON", where, hint)
    found = (head.get("format"), head.get("format_version"))
    if found != (format, version):
        raise error(
            f"{what} has a format that this version does not read",
            where=where,
            found=f"{found[0]!r} version {found[1]!r}",
            expected=f"{format!r} version {version}",
            hint=hint,
        )
    return _decode(data, struct, error, f"{what} is damaged", where, hint)


def _decode(data: bytes, kind: type[V], error: type[EdgeIlsegError], what: str, where: object, hint: str) -> V:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as cause:
        raise error(what, where=where, found=str(cause), hint=hint) from cause
