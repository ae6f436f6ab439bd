"""Chunks: they make up the file, what has not changed is the same chunk, and what a device reads of them is checked."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import BASE, GROWN, write_bundle
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_ilseg.chunks import (
    ALONE_BYTES,
    MAX_CHUNK_BYTES,
    MIN_CHUNK_BYTES,
    Chunk,
    ChunkSource,
    FileBytes,
    cut,
    cut_file,
)
from edge_ilseg.tensor_borders import line_borders

ROOT = Path(__file__).parents[1]


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count)


def text(lines: int, seed: int = 0) -> bytes:
    numbers = np.random.default_rng(seed).integers(0, 1 << 30, lines)
    return b"".join(b'  <layer id="%d" type="Const" version="opset1">\n' % number for number in numbers)


def joined(data: bytes, chunks: tuple[Chunk, ...]) -> bytes:
    return b"".join(data[chunk.start : chunk.start + chunk.length] for chunk in chunks)


def hashes(chunks: tuple[Chunk, ...]) -> list[bytes]:
    return [chunk.sha256 for chunk in chunks]


def write_onnx(path: Path, tensors: dict[str, bytes], *, doc: str = "") -> Path:
    initializers = [onnx.numpy_helper.from_array(np.frombuffer(data, np.int8), name) for name, data in tensors.items()]
    graph = onnx.helper.make_graph([], "graph", [], [], initializers)
    onnx.save(onnx.helper.make_model(graph, doc_string=doc), path)
    return path


@given(
    size=st.integers(1, 5000),
    borders=st.lists(st.integers(-10, 6000), max_size=60),
    minimum=st.integers(1, 300),
    more=st.integers(0, 700),
)
@settings(max_examples=150, deadline=None)
def test_chunks_lie_end_to_end_and_none_is_longer_than_allowed(
    size: int, borders: list[int], minimum: int, more: int
) -> None:
    """Rule 1."""
    data = noise(size)
    chunks = cut(data, borders, minimum, minimum + more)
    assert joined(data, chunks) == data
    assert [chunk.start for chunk in chunks] == [0, *itertools.accumulate(chunk.length for chunk in chunks[:-1])]
    assert all(0 < chunk.length <= minimum + more for chunk in chunks)
    assert all(
        chunk.sha256 == hashlib.sha256(data[chunk.start : chunk.start + chunk.length]).digest() for chunk in chunks
    )
    assert chunks == cut(data, reversed(borders), minimum, minimum + more)


def test_bytes_without_borders_are_split_at_the_greatest_length_and_leave_no_crumb() -> None:
    data = noise(2 * MAX_CHUNK_BYTES + 100)
    lengths = [chunk.length for chunk in cut(data, ())]
    assert lengths == [MAX_CHUNK_BYTES, MAX_CHUNK_BYTES + 100 - MIN_CHUNK_BYTES, MIN_CHUNK_BYTES]


def test_no_bytes_are_no_chunks(tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").touch()
    assert cut_file(tmp_path / "empty.onnx") == ()
    assert cut(b"", ()) == ()


def test_a_tensor_stands_alone_and_its_small_neighbours_do_not_belong_to_it() -> None:
    """Rule 2."""
    data = noise(50_000)
    assert [(chunk.start, chunk.length) for chunk in cut(data, (100, 100 + ALONE_BYTES, 40_000, 40_010))] == [
        (0, 100),
        (100, ALONE_BYTES),
        (100 + ALONE_BYTES, 39_900 - ALONE_BYTES),
        (40_000, 10),
        (40_010, 9_990),
    ]


def test_a_tensor_is_the_same_chunk_under_other_names_and_in_another_place(tmp_path: Path) -> None:
    """Rule 2."""
    weights = noise(300_000, seed=3)
    one = write_onnx(tmp_path / "one.onnx", {"first": noise(3000), "weights": weights})
    other = write_onnx(tmp_path / "other.onnx", {"renamed": weights, "z": noise(20)}, doc="another time " * 20)
    own = set(hashes(cut(weights, ())))
    assert len(own) == 2
    assert own <= set(hashes(cut_file(one))) & set(hashes(cut_file(other)))


def test_the_two_forms_of_a_model_share_their_tensors(tmp_path: Path) -> None:
    """Rule 2, for an ONNX and the .bin of an IR."""
    weights, bias = noise(40_000), noise(400, seed=1)
    write_onnx(tmp_path / "model.onnx", {"weights": weights, "bias": bias})
    (tmp_path / "model.bin").write_bytes(b"\0" * 36 + bias + weights)
    (tmp_path / "model.xml").write_text(
        '<net><data offset="0" size="36"/><data offset="36" size="400"/><data offset="436" size="40000"/></net>'
    )
    shared = set(hashes(cut_file(tmp_path / "model.onnx"))) & set(hashes(cut_file(tmp_path / "model.bin")))
    assert shared == {hashlib.sha256(weights).digest()}


def test_small_neighbours_are_merged(tmp_path: Path) -> None:
    """Rule 3."""
    path = tmp_path / "model.xml"
    path.write_bytes(text(3000))
    lengths = [chunk.length for chunk in cut_file(path)]
    assert len(lengths) > 5
    assert min(lengths[:-1]) >= MIN_CHUNK_BYTES
    assert np.mean(lengths[:-1]) < 2 * MIN_CHUNK_BYTES


def test_every_chunk_of_a_text_begins_with_a_line(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    path.write_bytes(text(3000))
    assert {chunk.start for chunk in cut_file(path)} <= set(line_borders(path.read_bytes()))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_an_inserted_line_moves_few_of_the_chunks_behind_it(share: float) -> None:
    """Rule 3: cutting every so many bytes would change all of them."""
    data = text(10_000)
    borders = line_borders(data)
    place = borders[int(share * (len(borders) - 1))]
    changed = data[:place] + b"    a line that was not there before\n" + data[place:]
    old, new = hashes(cut(data, borders)), hashes(cut(changed, line_borders(changed)))
    assert len(old) > 30
    assert len(set(new) - set(old)) <= 4


def test_what_a_step_adds_to_a_model_leaves_the_other_tensors_as_they_are(tmp_path: Path) -> None:
    tensors = {f"layer.{number}": noise(3000 + number, seed=number) for number in range(40)}
    old = write_onnx(tmp_path / "old.onnx", {**tensors, "head": noise(900, seed=99)})
    new = write_onnx(tmp_path / "new.onnx", {"more": noise(100), **tensors, "head": noise(1000, seed=99)})
    shared = set(hashes(cut_file(old))) & set(hashes(cut_file(new)))
    assert {hashlib.sha256(data).digest() for data in tensors.values()} <= shared


@pytest.mark.parametrize("name", ["mask.npy", "model.bin", "photo.jpg"])
def test_a_file_of_another_kind_is_split_plainly(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(text(8000))
    assert cut_file(path) == cut(path.read_bytes(), ())


def test_a_link_beside_a_bin_is_not_read_for_its_borders(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.xml").write_text('<data offset="0" size="5000"/>')
    (tmp_path / "model.bin").write_bytes(noise(20_000))
    (tmp_path / "model.xml").symlink_to(tmp_path / "elsewhere.xml")
    assert len(cut_file(tmp_path / "model.bin")) == 1


@given(size=st.integers(0, 300_000), spans=st.lists(st.tuples(st.integers(0, 300_000), st.integers(0, 70_000))))
@settings(max_examples=60, deadline=None)
def test_a_file_is_sliced_like_its_bytes(
    size: int, spans: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = noise(size)
    path = tmp_path_factory.mktemp("slices") / "file"
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        file = FileBytes(descriptor)
        assert len(file) == size
        for start, length in spans:
            assert file[start : start + length] == data[start : start + length]
    finally:
        os.close(descriptor)


def test_links_folders_and_pipes_are_not_cut(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"data")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "folder", "pipe", "missing"):
        with pytest.raises(OSError):
            cut_file(tmp_path / name)


@pytest.fixture
def slots(tmp_path: Path) -> tuple[Path, Path]:
    write_bundle(tmp_path / "a", BASE, step_id="a" * 64)
    write_bundle(tmp_path / "b", GROWN, step_id="b" * 64, parent_id="a" * 64)
    return tmp_path / "a", tmp_path / "b"


def test_a_source_gives_every_chunk_of_every_file_of_its_folders(slots: tuple[Path, Path]) -> None:
    source = ChunkSource(slots)
    found = 0
    for path in (path for slot in slots for path in slot.rglob("*") if path.is_file()):
        for chunk in cut_file(path):
            assert chunk.sha256 in source
            expected = path.read_bytes()[chunk.start : chunk.start + chunk.length]
            assert source.read(chunk.sha256, chunk.length) == expected
            found += 1
    assert found == len(source) == 8


def test_a_chunk_of_another_length_or_an_unknown_one_is_not_there(slots: tuple[Path, Path]) -> None:
    source = ChunkSource(slots)
    (chunk, *_) = cut_file(slots[0] / "golden/images.npy")
    assert source.read(chunk.sha256, chunk.length - 1) is None
    assert source.read(b"\0" * 32, chunk.length) is None


def test_bit_rot_after_the_start_is_a_chunk_that_is_not_there(slots: tuple[Path, Path]) -> None:
    """Rule 5."""
    source = ChunkSource(slots[:1])
    path = slots[0] / "golden/images.npy"
    (chunk, *_) = cut_file(path)
    assert source.read(chunk.sha256, chunk.length) is not None
    data = bytearray(path.read_bytes())
    data[chunk.length // 2] ^= 1
    path.write_bytes(data)
    assert source.read(chunk.sha256, chunk.length) is None
    assert chunk.sha256 not in ChunkSource(slots[:1])


@pytest.mark.parametrize("spoil", ["remove", "truncate", "pipe", "link"])
def test_a_file_that_goes_away_is_a_chunk_that_is_not_there(slots: tuple[Path, Path], spoil: str) -> None:
    path = slots[0] / "golden/images.npy"
    (chunk, *_) = cut_file(path)
    source = ChunkSource(slots[:1])
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    if spoil == "truncate":
        os.truncate(path, chunk.length - 1)
    else:
        path.unlink()
    if spoil == "pipe":
        os.mkfifo(path)
    if spoil == "link":
        path.symlink_to(copy)
    assert source.read(chunk.sha256, chunk.length) is None


def test_links_and_pipes_in_a_slot_are_passed_over(slots: tuple[Path, Path], tmp_path: Path) -> None:
    count = len(ChunkSource(slots[:1]))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_bytes(noise(50))
    os.mkfifo(slots[0] / "pipe")
    (slots[0] / "link").symlink_to(tmp_path / "outside/secret")
    (slots[0] / "folder").symlink_to(tmp_path / "outside")
    assert len(ChunkSource(slots[:1])) == count


def test_folders_that_are_not_there_have_no_chunks(tmp_path: Path) -> None:
    assert len(ChunkSource([tmp_path / "none", tmp_path / "neither"])) == 0


def test_the_parts_that_a_device_needs_load_neither_numpy_nor_zstd_nor_onnx() -> None:
    """A poll stays small, and a device without the extra can say so."""
    modules = ("tensor_borders", "chunks", "codecs", "pack_index", "fetch_plan")
    program = "import sys\nfor name in ('numpy', 'onnx', 'torch', 'backports', 'tuf'): sys.modules[name] = None\n"
    program += "".join(f"import edge_ilseg.{name}\n" for name in modules)
    program += "assert edge_ilseg.codecs.decompress(1, __import__('zlib').compress(b'abc'), 3) == b'abc'"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
