"""What a device fetches to go from one int8 bundle to the next, against the least that could do, and against patches.

    python benchmarks/update_bytes.py BASE NEXT [BASE NEXT ...] --json update.json

All ways are measured in one run, on the same two folders, and each result is compared with NEXT, byte by byte:

    chunks        index of the pack, and the chunks that BASE lacks
    differences   the same pack with differences from BASE
    bsdiff4, zstd one patch for the pair, from all files of BASE in a row to all files of NEXT in a row

The ideal is each changed tensor, compressed by itself by the best of all codecs, and all else that has changed (lines
of texts, entries of graphs), file by file. A tensor that two files of the bundle share is counted for each; `once`
counts it once. A patch serves one pair; a pack serves every device, whatever it has.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bsdiff4

from edge_ilseg.chunks import ChunkSource
from edge_ilseg.codecs import compress_smallest
from edge_ilseg.fetch_plan import fetch_plan, rebuild_chunk
from edge_ilseg.pack import PackFacts, write_pack
from edge_ilseg.pack_index import PackIndex
from edge_ilseg.tensor_borders import ir_borders, ir_tensors, line_borders, onnx_borders, onnx_tensors

TEXTS = (".xml", ".json")
Row = dict[str, Any]


def read_files(folder: Path) -> dict[str, bytes]:
    """Every file of a bundle by its name, in order."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def pieces(name: str, files: dict[str, bytes]) -> Iterator[tuple[bytes, bool]]:
    """The smallest pieces of a file, and whether each is a tensor."""
    data, suffix = files[name], Path(name).suffix
    borders: tuple[int, ...] = ()
    tensors: tuple[tuple[int, int], ...] = ()
    if suffix == ".onnx":
        borders, tensors = onnx_borders(data), onnx_tensors(data)
    elif suffix == ".bin":
        xml = files[str(Path(name).with_suffix(".xml"))]
        borders, tensors = ir_borders(xml, len(data)), ir_tensors(xml, len(data))
    elif suffix in TEXTS:
        borders = line_borders(data)
    starts = {start for start, _ in tensors}
    for start, end in itertools.pairwise(sorted({0, len(data), *borders})):
        yield data[start:end], start in starts


def ideal_bytes(old: dict[str, bytes], new: dict[str, bytes]) -> tuple[int, int]:
    """The least, with tensors counted in each file, and once."""
    known_tensors = {piece for name in old for piece, is_tensor in pieces(name, old) if is_tensor}
    seen: set[bytes] = set()
    each = once = 0
    for name in new:
        known = {piece for piece, _ in pieces(name, old)} if name in old else set()
        rest = []
        for piece, is_tensor in pieces(name, new):
            if not is_tensor:
                rest += [piece] if piece not in known else []
            elif piece not in known_tensors:
                packed = len(compress_smallest(piece)[1])
                each += packed
                once += packed if piece not in seen else 0
                seen.add(piece)
        changed = len(compress_smallest(b"".join(rest))[1])
        each, once = each + changed, once + changed
    return each, once


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    """What `action` gives, and how long it took."""
    start = time.perf_counter()
    result = action()
    return result, time.perf_counter() - start


def rebuild(pack: Path, index: PackIndex, base: Path) -> dict[str, bytes]:
    """What a device on BASE makes of a pack."""
    source = ChunkSource([base])
    data = pack.read_bytes()
    fetched = {}
    for fetch in fetch_plan(index, source.__contains__).chunks:
        stored = data[fetch.offset : fetch.offset + fetch.stored_bytes]
        old = source.read(fetch.base_sha256, fetch.base_length) if fetch.base_sha256 else None
        fetched[fetch.chunk] = rebuild_chunk(index, fetch, stored, old)

    def chunk(number: int) -> bytes:
        entry = index.chunks[number]
        found = fetched.get(number) or source.read(entry.sha256, entry.length)
        assert found is not None
        return found

    return {file.path.removeprefix("bundle/"): b"".join(map(chunk, file.chunks)) for file in index.files}


def measure_pack(base: Path, new: Path, files: dict[str, bytes], work: Path, *, bases: tuple[Path, ...]) -> Row:
    """Bytes that are fetched, requests, and seconds."""
    pack = work / "pack"
    facts, make_s = timed(lambda: write_pack(pack, new, bases=bases))
    assert isinstance(facts, PackFacts)
    made, apply_s = timed(lambda: rebuild(pack, facts.index, base))
    assert made == files
    has = ChunkSource([base])
    plan = fetch_plan(facts.index, has.__contains__)
    return {
        "bytes": facts.index_bytes + plan.bytes,
        "index_bytes": facts.index_bytes,
        "pack_bytes": facts.pack_bytes,
        "chunks": len(facts.index.chunks),
        "differences": len(facts.index.differences),
        "requests": 1 + len(plan.ranges),
        "make_s": make_s,
        "apply_s": apply_s,
    }


def measure_patch(make: Callable[[], bytes], apply: Callable[[bytes], bytes], new: bytes) -> Row:
    """Bytes of a patch, and seconds."""
    patch, make_s = timed(make)
    made, apply_s = timed(lambda: apply(patch))
    assert hashlib.sha256(made).digest() == hashlib.sha256(new).digest()
    return {"bytes": len(patch), "requests": 1, "make_s": make_s, "apply_s": apply_s}


def zstd_patch(old: bytes, new: bytes) -> Row:
    """As `zstd -19 --long --patch-from`."""
    from backports import zstd

    parameter = zstd.CompressionParameter
    window_log = max(len(old) + len(new), 1 << 10).bit_length()
    options = {
        parameter.compression_level: 19,
        parameter.window_log: window_log,
        parameter.enable_long_distance_matching: 1,
    }
    limits = {zstd.DecompressionParameter.window_log_max: window_log}
    prefix = zstd.ZstdDict(old, is_raw=True).as_prefix
    return measure_patch(
        lambda: zstd.compress(new, options=options, zstd_dict=prefix),
        lambda patch: zstd.decompress(patch, zstd_dict=prefix, options=limits),
        new,
    )


def measure_pair(base: Path, new: Path) -> Row:
    """One pair, every way."""
    old_files, new_files = read_files(base), read_files(new)
    old, data = b"".join(old_files.values()), b"".join(new_files.values())
    each, once = ideal_bytes(old_files, new_files)
    with tempfile.TemporaryDirectory() as work:
        ways = {
            "chunks": measure_pack(base, new, new_files, Path(work), bases=()),
            "differences": measure_pack(base, new, new_files, Path(work), bases=(base,)),
            "bsdiff4": measure_patch(lambda: bsdiff4.diff(old, data), lambda patch: bsdiff4.patch(old, patch), data),
            "zstd": zstd_patch(old, data),
        }
    return {
        "base": str(base),
        "next": str(new),
        "bundle_bytes": len(data),
        "ideal_bytes": each,
        "ideal_once_bytes": once,
        "ways": ways,
    }


def show(row: Row) -> None:
    """The table of one pair."""
    print(f"\n{row['base']} -> {row['next']}: {row['bundle_bytes']:,} bytes")
    for name, key in (("ideal", "ideal_bytes"), ("ideal, once", "ideal_once_bytes")):
        print(f"  {name:<12}{row[key]:>12,} bytes {100 * row[key] / row['bundle_bytes']:>7.2f} % of the bundle")
    print(
        f"  {'':<12}{'bytes':>12}{'% bundle':>10}{'/ ideal':>9}{'/ once':>9}{'requests':>10}{'make s':>9}{'apply s':>9}"
    )
    for name, way in row["ways"].items():
        ratios = [way["bytes"] / max(row[key], 1) for key in ("ideal_bytes", "ideal_once_bytes")]
        print(
            f"  {name:<12}{way['bytes']:>12,}{100 * way['bytes'] / row['bundle_bytes']:>10.2f}{ratios[0]:>9.2f}"
            f"{ratios[1]:>9.2f}{way['requests']:>10}{way['make_s']:>9.2f}{way['apply_s']:>9.2f}"
        )
    pack = row["ways"]["differences"]
    print(
        f"  pack: {pack['pack_bytes']:,} bytes, of which index {pack['index_bytes']:,}; {pack['chunks']} chunks, "
        f"{pack['differences']} differences; without differences {row['ways']['chunks']['pack_bytes']:,} bytes"
    )


def main() -> None:
    """Measure the pairs, and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BASE NEXT")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args()
    if len(options.bundles) % 2:
        parser.error("give pairs of bundles")
    rows = []
    for base, new in zip(options.bundles[::2], options.bundles[1::2], strict=True):
        rows.append(measure_pair(base, new))
        show(rows[-1])
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
