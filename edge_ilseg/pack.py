"""Writing a pack: one static file from which a device takes the chunks that it lacks.

1. The index stands first; then the chunks, each packed by itself, in the order of their first use; then differences.
2. The same bundle, validation data and bases give the same bytes, with the same versions of the codecs.
3. A difference is kept only if it is smaller than `WORTH_KEEPING` of the stored chunk. Its base is the chunk at the
   same place in the same file of an earlier bundle, counted from the nearest chunk, before or behind, that both have.
4. The pack is there whole or not at all. A few chunks are in memory at a time.

Page: docs/pack-format.md.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import msgspec

from edge_ilseg.chunks import Chunk, cut_file
from edge_ilseg.codecs import compress_smallest, difference_smallest
from edge_ilseg.errors import UpdateError
from edge_ilseg.files import CHUNK_BYTES, disk_error, sha256_bytes, sha256_file, sync_file, sync_folder
from edge_ilseg.pack_index import (
    PackChunk,
    PackDifference,
    PackFile,
    PackIndex,
    check_name,
    encode_index,
    parse_index,
)

WORTH_KEEPING = 0.9


class PackFacts(msgspec.Struct, frozen=True):
    """What was written."""

    content_id: str
    """SHA-256 of the index."""
    pack_bytes: int
    index_bytes: int
    index: PackIndex


class _Place(msgspec.Struct, frozen=True):
    """Where a chunk is read."""

    path: Path
    chunk: Chunk


def write_pack(out: Path, bundle: Path, *, validation: Path | None = None, bases: Sequence[Path] = ()) -> PackFacts:
    """Write the pack of a bundle to the file `out`, in the place of one that is there.

    Args:
        out: its folder exists.
        bundle: folder that `edge-ilseg export` has written; every file is checked first.
        validation: data set that is shipped beside it for the gate.
        bases: folders of earlier bundles: what has changed by little against one of them is kept as a difference, too.

    Raises:
        BundleError: `bundle` or a base is damaged.
        UpdateError: there is a link in a folder, a name that not every file system can hold, or a file that changes
            while it is read.
        EdgeIlsegError: a file cannot be read, or the disk is full.
    """
    from edge_ilseg.bundle import check_files, read_manifest  # loads numpy, which nothing else here needs

    for folder in (bundle, *bases):
        check_files(folder, read_manifest(folder))
    part: Path | None = None
    try:
        with tempfile.TemporaryFile(dir=out.parent) as stored:
            index = _store(stored, _plain_files(bundle, "bundle") | _plain_files(validation, "validation"), bases)
            head = encode_index(index)
            pack_bytes = len(head) + stored.tell()
            facts = PackFacts(sha256_bytes(head), pack_bytes, len(head), parse_index(head, pack_bytes=pack_bytes))
            stored.seek(0)
            with tempfile.NamedTemporaryFile(dir=out.parent, prefix=f".{out.name}.", delete=False) as file:
                part = Path(file.name)
                file.write(head)
                while piece := stored.read(CHUNK_BYTES):
                    file.write(piece)
        part.chmod(0o644)
        sync_file(part)
        part.replace(out)
        sync_folder(out.parent)
    except OSError as error:
        raise disk_error(error, out) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
    return facts


def _plain_files(folder: Path | None, name: str) -> dict[str, Path]:
    """Files by their name in the pack."""
    found: dict[str, Path] = {}
    if folder is None:
        return found
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise UpdateError(
                "a pack holds plain files, and this is a link or a device",
                where=path,
                hint="put the file itself in its place, and publish again",
            )
        if path.is_file():
            found[check_name(f"{name}/{path.relative_to(folder).as_posix()}".encode(errors="surrogateescape"))] = path
    return found


class _Chunks:
    """Chunks in the order in which they are stored: entries in the index, numbers, and where to read them."""

    def __init__(self) -> None:
        self.entries: list[PackChunk] = []
        self.numbers: dict[bytes, int] = {}
        self.places: list[_Place] = []

    def store(self, file: IO[bytes], place: _Place) -> int:
        """Number of the chunk, which is written to `file` unless it was before."""
        sha256 = place.chunk.sha256
        if sha256 not in self.numbers:
            self.numbers[sha256] = len(self.entries)
            codec, packed = compress_smallest(_read(place))
            file.write(packed)
            self.entries.append(PackChunk(sha256, place.chunk.length, 0, len(packed), codec))
            self.places.append(place)
        return self.numbers[sha256]


def _store(file: IO[bytes], files: dict[str, Path], bases: Sequence[Path]) -> PackIndex:
    """Write chunks, then differences; the offsets in the index are for its reader to fill in."""
    chunks = _Chunks()
    cuts = {name: cut_file(files[name]) for name in sorted(files, key=str.encode)}
    entries = []
    for name, cut in cuts.items():
        numbers = tuple(chunks.store(file, _Place(files[name], chunk)) for chunk in cut)
        sha256 = bytes.fromhex(sha256_file(files[name]))
        entries.append(PackFile(name, sum(chunk.length for chunk in cut), sha256, numbers))
    found: dict[int, list[list[_Place]]] = {}
    for folder in bases:
        for sha256, candidates in _counterparts(cuts, folder):
            found.setdefault(chunks.numbers[sha256], []).append(candidates)
    differences = [item for number in sorted(found) for item in _differences(file, chunks, number, found[number])]
    return PackIndex(tuple(entries), tuple(chunks.entries), tuple(differences))


def _counterparts(cuts: dict[str, tuple[Chunk, ...]], folder: Path) -> Iterator[tuple[bytes, list[_Place]]]:
    """Each chunk that an earlier bundle lacks, once, and the chunks of it that stand in its place (rule 3)."""
    files = _plain_files(folder, "bundle")
    base_cuts = {name: cut_file(path) for name, path in files.items()}
    done = {chunk.sha256 for cut in base_cuts.values() for chunk in cut}
    for name, cut in cuts.items():
        for chunk, candidates in _in_its_place(cut, base_cuts.get(name, ())):
            if chunk.sha256 not in done:
                done.add(chunk.sha256)
                yield chunk.sha256, [_Place(files[name], base) for base in candidates]


def _in_its_place(new: Sequence[Chunk], old: Sequence[Chunk]) -> Iterator[tuple[Chunk, list[Chunk]]]:
    """Each chunk of `new` that `old` lacks, with none, one or two of `old` (rule 3)."""
    places = {chunk.sha256: place for place, chunk in reversed([*enumerate(old)])}
    before, behind = -1, len(old)
    found: list[list[int]] = [[] for _ in new]
    for number, chunk in enumerate(new):
        before = places.get(chunk.sha256, before + 1)
        found[number].append(before)
    for number, chunk in reversed([*enumerate(new)]):
        behind = places.get(chunk.sha256, behind - 1)
        found[number].append(behind)
    for chunk, numbers in zip(new, found, strict=True):
        if chunk.sha256 not in places:
            yield chunk, [old[number] for number in sorted(set(numbers)) if 0 <= number < len(old)]


def _differences(
    file: IO[bytes], chunks: _Chunks, number: int, bundles: Sequence[Sequence[_Place]]
) -> Iterator[PackDifference]:
    """Write what is worth keeping of a chunk against each of several bundles, in the order of the index."""
    data = _read(chunks.places[number])
    limit_bytes = WORTH_KEEPING * chunks.entries[number].stored_bytes
    kept: dict[bytes, tuple[int, int, bytes]] = {}
    for candidates in bundles:
        found = [(place.chunk, difference_smallest(data, _read(place))) for place in candidates]
        packed = [(len(item[1]), base, item) for base, item in found if item is not None]
        if not packed:
            continue
        stored_bytes, base, (codec, difference) = min(packed, key=lambda item: item[0])
        if stored_bytes < limit_bytes:
            kept[base.sha256] = (base.length, codec, difference)
    for base_sha256, (base_length, codec, difference) in sorted(kept.items()):
        file.write(difference)
        yield PackDifference(number, base_sha256, base_length, 0, len(difference), codec)


def _read(place: _Place) -> bytes:
    with place.path.open("rb") as file:
        file.seek(place.chunk.start)
        data = file.read(place.chunk.length)
    if hashlib.sha256(data).digest() != place.chunk.sha256:
        raise UpdateError("a file has changed while it was read", where=place.path, hint="publish it again")
    return data
