"""A pack, from the publisher to the device: the same files, whatever the device had; and 400 mutants of it refused."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from bundles import BASE, GROWN, color_network, export_grown, write_bundle

from edge_ilseg.bundle import check_files, read_manifest
from edge_ilseg.chunks import ChunkSource
from edge_ilseg.codecs import ZSTD_FROM_BASE
from edge_ilseg.errors import BundleError, EdgeIlsegError, UpdateError
from edge_ilseg.fetch_plan import fetch_plan, rebuild_chunk
from edge_ilseg.models.segmentation import SegmentationModel, build_model
from edge_ilseg.models.spec import ModelSpec
from edge_ilseg.models.weights import load_backbone_weights
from edge_ilseg.pack import WORTH_KEEPING, PackFacts, write_pack
from edge_ilseg.pack_index import PackIndex, parse_index

ROOT = Path(__file__).parents[1]
MUTANTS = 400
Read = Callable[[bytes, int], bytes | None]


def files_of(folder: Path, name: str) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {f"{name}/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in paths}


def install(pack: bytes, facts: PackFacts, has: Callable[[bytes], bool], read: Read) -> dict[str, bytes]:
    """What a device makes of the bytes of a pack whose index it knows by hash: nothing of it is trusted but that."""
    head = pack[: facts.index_bytes]
    if hashlib.sha256(head).hexdigest() != facts.content_id:
        raise UpdateError("the index is another one")
    index = parse_index(head, pack_bytes=facts.pack_bytes)
    fetched: dict[int, bytes] = {}
    for fetch in fetch_plan(index, has).chunks:
        stored = pack[fetch.offset : fetch.offset + fetch.stored_bytes]
        base = read(fetch.base_sha256, fetch.base_length) if fetch.base_sha256 else None
        fetched[fetch.chunk] = rebuild_chunk(index, fetch, stored, base)

    def chunk(number: int) -> bytes:
        entry = index.chunks[number]
        data = fetched.get(number) or read(entry.sha256, entry.length)
        if data is None:
            raise UpdateError("a chunk is gone")
        return data

    made = {file.path: b"".join(map(chunk, file.chunks)) for file in index.files}
    for file in index.files:
        assert (hashlib.sha256(made[file.path]).digest(), len(made[file.path])) == (file.sha256, file.bytes)
    return made


def has_nothing(_sha256: bytes) -> bool:
    return False


def read_nothing(_sha256: bytes, _length: int) -> bytes | None:
    return None


def fetched_bytes(index: PackIndex, *folders: Path) -> int:
    return fetch_plan(index, ChunkSource(folders).__contains__).bytes


def network(names: Iterable[str], *, step: int) -> onnx.ModelProto:
    """The nearest-colour network, with tensors beside it that a step leaves alone, moves by little, and learns anew."""
    model = color_network(list(names))
    frozen, moved = np.random.default_rng(0), np.random.default_rng(1)
    float_weights = moved.normal(0, 30, 9000)
    tensors = {f"frozen.{number}": frozen.integers(-60, 60, 3000 + number) for number in range(6)}
    tensors["moved"] = np.round(float_weights * (1 + 0.02 * step))
    tensors["fresh"] = np.random.default_rng(10 + step).integers(-90, 90, 2500)
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.clip(data, -127, 127).astype(np.int8), name) for name, data in tensors.items()
    )
    model.doc_string = "a text that is another one after every step: " + str(step) * step
    return model


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two small bundles, of a step and of the one after it."""
    root = tmp_path_factory.mktemp("bundles")
    write_bundle(root / "base", BASE, step_id="a" * 64, network=network(BASE, step=0))
    write_bundle(root / "next", GROWN, step_id="b" * 64, parent_id="a" * 64, network=network(GROWN, step=1))
    return root / "base", root / "next"


@pytest.fixture(scope="module")
def validation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validation")
    (folder / "images").mkdir()
    (folder / "images/größe 1.png").write_bytes(np.random.default_rng(0).bytes(3000))
    (folder / "images/copy.png").write_bytes(np.random.default_rng(0).bytes(3000))
    (folder / "images.csv").write_text("a name that stands before those in the folder\n")
    (folder / "empty").touch()
    return folder


def test_a_device_with_nothing_gets_every_file_to_the_byte(
    bundles: tuple[Path, Path], validation: Path, tmp_path: Path
) -> None:
    facts = write_pack(tmp_path / "pack", bundles[1], validation=validation, bases=bundles[:1])
    data = (tmp_path / "pack").read_bytes()
    made = install(data, facts, has_nothing, read_nothing)
    assert made == files_of(bundles[1], "bundle") | files_of(validation, "validation")
    assert "validation/images/größe 1.png" in made


def test_a_device_with_the_base_fetches_less_and_gets_the_same(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    base, new = bundles
    plain = write_pack(tmp_path / "plain", new)
    facts = write_pack(tmp_path / "pack", new, bases=[base])
    assert facts.index.differences
    source = ChunkSource([base])
    assert install((tmp_path / "pack").read_bytes(), facts, source.__contains__, source.read) == files_of(new, "bundle")
    assert fetched_bytes(facts.index, base) < fetched_bytes(plain.index, base) < fetched_bytes(plain.index)


def test_a_device_that_has_the_bundle_fetches_the_index_alone(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    facts = write_pack(tmp_path / "pack", bundles[1], bases=bundles[:1])
    assert fetched_bytes(facts.index, bundles[1]) == 0


def test_the_facts_are_those_of_the_file(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    facts = write_pack(tmp_path / "pack", bundles[1], bases=bundles[:1])
    data = (tmp_path / "pack").read_bytes()
    assert facts.pack_bytes == len(data)
    assert facts.content_id == hashlib.sha256(data[: facts.index_bytes]).hexdigest()
    assert parse_index(data[: facts.index_bytes], pack_bytes=len(data)) == facts.index


def test_the_same_bundle_gives_the_same_bytes_wherever_it_lies(
    bundles: tuple[Path, Path], validation: Path, tmp_path: Path
) -> None:
    """Rule 2."""
    for name in ("one", "other"):
        shutil.copytree(bundles[1], tmp_path / name / "bundle")
        shutil.copytree(bundles[0], tmp_path / name / "base")
        write_pack(
            tmp_path / f"{name}.pack",
            tmp_path / name / "bundle",
            validation=validation,
            bases=[tmp_path / name / "base"],
        )
    assert (tmp_path / "one.pack").read_bytes() == (tmp_path / "other.pack").read_bytes()


def test_equal_files_are_stored_once(bundles: tuple[Path, Path], validation: Path, tmp_path: Path) -> None:
    facts = write_pack(tmp_path / "pack", bundles[1], validation=validation)
    chunks = {file.path: file.chunks for file in facts.index.files}
    assert chunks["validation/images/copy.png"] == chunks["validation/images/größe 1.png"] != ()
    assert chunks["validation/empty"] == ()


def test_a_difference_is_kept_only_where_it_is_worth_it(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    """Rule 3."""
    index = write_pack(tmp_path / "pack", bundles[1], bases=[bundles[0], bundles[1]]).index
    base_hashes = {item.base_sha256 for item in index.differences}
    assert index.differences
    assert all(sha256 in ChunkSource(bundles) for sha256 in base_hashes)
    for item in index.differences:
        assert item.stored_bytes < WORTH_KEEPING * index.chunks[item.chunk].stored_bytes


def test_devices_on_different_bases_fetch_different_differences(tmp_path: Path) -> None:
    """Rule 3, and the order of differences in the index."""
    folders = [tmp_path / str(step) for step in range(4)]
    for step, folder in enumerate(folders):
        write_bundle(folder, GROWN, step_id="b" * 64, network=network(GROWN, step=step))
    *bases, new = folders
    facts = write_pack(tmp_path / "pack", new, bases=bases)
    data = (tmp_path / "pack").read_bytes()
    used = []
    for base in bases:
        source = ChunkSource([base])
        assert install(data, facts, source.__contains__, source.read) == files_of(new, "bundle")
        chosen = [item.base_sha256 for item in fetch_plan(facts.index, source.__contains__).chunks]
        used.append({sha256 for sha256 in chosen if sha256 is not None})
    assert all(used)
    assert not used[0] & used[1] & used[2]


@pytest.mark.parametrize("place", [2, 1], ids=["behind", "before"])
def test_the_base_is_found_where_something_was_inserted_beside_it(tmp_path: Path, place: int) -> None:
    """Rule 3: counted from the front alone, or from the back alone, it would be another tensor."""
    rng = np.random.default_rng(0)
    moved = rng.integers(-100, 100, 4000).astype(np.int8)
    tensors = [rng.integers(-100, 100, 4000).astype(np.int8), moved, rng.integers(-100, 100, 4000).astype(np.int8)]
    for name in ("base", "next"):
        model = color_network(list(GROWN))
        items = [onnx.numpy_helper.from_array(data, f"t{number}") for number, data in enumerate(tensors)]
        model.graph.initializer.extend(items)
        write_bundle(tmp_path / name, GROWN, step_id="b" * 64, network=model)
        tensors[1] = moved + 1
        tensors.insert(place, rng.integers(-100, 100, 5000).astype(np.int8))
    index = write_pack(tmp_path / "pack", tmp_path / "next", bases=[tmp_path / "base"]).index
    pairs = {(index.chunks[item.chunk].sha256, item.base_sha256) for item in index.differences}
    old, new = (hashlib.sha256(data.tobytes()).digest() for data in (moved, moved + 1))
    assert (new, old) in pairs


def test_a_base_of_another_kind_adds_nothing_and_harms_nothing(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    """Rule 3: noise has no smaller difference."""
    rng = np.random.default_rng(0)
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / f"{name}.npy", rng.integers(0, 256, (60, 60), np.uint8))
    validation = tmp_path / "new"
    shutil.copy(tmp_path / "new.npy", validation / "noise.npy")
    index = write_pack(tmp_path / "pack", bundles[1], validation=validation, bases=[bundles[0]]).index
    (noise,) = (file for file in index.files if file.path == "validation/noise.npy")
    assert not [item for item in index.differences if item.chunk in noise.chunks]


def test_a_pack_replaces_one_that_is_there(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "pack").write_text("an older one")
    facts = write_pack(tmp_path / "pack", bundles[0])
    assert (tmp_path / "pack").stat().st_size == facts.pack_bytes
    assert os.listdir(tmp_path) == ["pack"]


@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_bundle_or_base_is_not_packed(bundles: tuple[Path, Path], tmp_path: Path, which: int) -> None:
    """Rule 4."""
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in bundles]
    golden = folders[which] / "golden/images.npy"
    golden.write_bytes(golden.read_bytes()[:-1] + b"\0\0")
    (tmp_path / "out").mkdir()
    with pytest.raises(BundleError):
        write_pack(tmp_path / "out/pack", folders[1], bases=folders[:1])
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("kind", ["link", "pipe", "colon", "no text", "decomposed"])
def test_validation_data_that_no_device_could_hold_is_not_packed(
    bundles: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    folder, out = tmp_path / "validation", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    (folder / "good.png").write_bytes(b"good")
    if kind == "link":
        (folder / "link.png").symlink_to(folder / "good.png")
    elif kind == "pipe":
        os.mkfifo(folder / "pipe.png")
    else:
        name = {"colon": b"12:00.png", "no text": b"\xff.png", "decomposed": "e\u0301.png".encode()}[kind]
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(b"data")
    with pytest.raises(UpdateError):
        write_pack(out / "pack", bundles[0], validation=folder)
    assert os.listdir(out) == []


@pytest.mark.parametrize("when", ["at once", "at the last byte"])
def test_a_pack_that_the_disk_does_not_take_leaves_nothing(
    bundles: tuple[Path, Path], tmp_path: Path, when: str
) -> None:
    """Rule 4, with a limit on the size of files in the place of a full disk."""
    limit_bytes = 1000 if when == "at once" else write_pack(tmp_path / "pack", bundles[1]).pack_bytes - 1
    (tmp_path / "pack").write_text("an older one")
    program = f"""
import resource, signal
from pathlib import Path
from edge_ilseg.errors import EdgeIlsegError
from edge_ilseg.pack import write_pack
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes}, {limit_bytes}))
try:
    write_pack(Path({str(tmp_path / "pack")!r}), Path({str(bundles[1])!r}))
except EdgeIlsegError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert "could not be read or written" in done.stdout, done.stderr
    assert os.listdir(tmp_path) == ["pack"]
    assert (tmp_path / "pack").read_text() == "an older one"


def flip(data: bytearray, _facts: PackFacts, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 1, 3))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def truncate(data: bytearray, _facts: PackFacts, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def swap(data: bytearray, facts: PackFacts, chance: random.Random) -> None:
    """The stored bytes of two chunks, or of a chunk and a difference."""
    one, other = chance.sample([*facts.index.chunks, *facts.index.differences], 2)
    first, second = (bytes(data[item.offset : item.offset + item.stored_bytes]) for item in (one, other))
    for item, stored in ((one, second), (other, first)):
        size = min(len(stored), item.stored_bytes)
        data[item.offset : item.offset + size] = stored[:size]


def blank(data: bytearray, _facts: PackFacts, chance: random.Random) -> None:
    """A sector of zeros."""
    start = chance.randrange(len(data))
    end = min(start + 512, len(data))
    data[start:end] = bytes(end - start)


def shift(data: bytearray, _facts: PackFacts, chance: random.Random) -> None:
    """A byte more, or one less: everything behind it stands elsewhere."""
    place = chance.randrange(len(data))
    if chance.random() < 0.5:
        del data[place]
    else:
        data.insert(place, chance.randrange(256))


CHANGES = (flip, truncate, swap, blank, shift)


def mutants() -> Iterator[tuple[int, Callable[[bytearray, PackFacts, random.Random], None] | None]]:
    """Four fifths change the pack; one leaves it, and gives other bytes for a base."""
    for seed in range(MUTANTS):
        yield seed, CHANGES[seed // 2 % len(CHANGES)] if seed % 5 else None


def wrong_base(read: Read, facts: PackFacts, chance: random.Random) -> Read:
    """A device whose bases are other bytes than their hashes say."""
    bases = {item.base_sha256 for item in facts.index.differences}
    lengths = [(item.base_sha256, item.base_length) for item in facts.index.differences]

    def misread(sha256: bytes, length: int) -> bytes | None:
        if sha256 not in bases:
            return read(sha256, length)
        data = bytearray(read(*chance.choice(lengths)) or b"")
        if chance.random() < 0.5:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        return bytes(data) if chance.random() < 0.9 else None

    return misread


def test_four_hundred_mutants_give_the_right_bytes_or_are_refused(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    base, new = bundles
    facts = write_pack(tmp_path / "pack", new, bases=[base])
    original, expected, source = (tmp_path / "pack").read_bytes(), files_of(new, "bundle"), ChunkSource([base])
    codecs = {item.codec for item in facts.index.differences}
    assert len(codecs) > 1
    assert ZSTD_FROM_BASE in codecs
    outcomes = {"right": 0, "refused": 0}
    for seed, change in mutants():
        chance = random.Random(seed)
        data = bytearray(original)
        read = source.read
        if change is None:
            read = wrong_base(source.read, facts, chance)
        else:
            change(data, facts, chance)
        has = source.__contains__ if change is None or seed % 2 else has_nothing
        try:
            made = install(bytes(data), facts, has, read)
        except UpdateError:
            outcomes["refused"] += 1
        else:
            assert made == expected, (seed, change)
            outcomes["right"] += 1
    assert sum(outcomes.values()) == MUTANTS
    assert outcomes["refused"] > 250
    assert outcomes["right"] > 10, "those that hit nothing that was fetched"


def test_an_index_that_was_exchanged_is_refused_before_it_is_read(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    facts = [write_pack(tmp_path / folder.name, folder) for folder in bundles]
    with pytest.raises(UpdateError, match="another one"):
        install((tmp_path / "next").read_bytes(), facts[0], has_nothing, read_nothing)


@pytest.mark.slow
def test_a_step_with_a_frozen_encoder_is_fetched_in_a_few_bytes(tmp_path: Path) -> None:
    """Both forms of an int8 model that learned classes behind a frozen encoder, and of the one before it."""
    base, new = tmp_path / "base", tmp_path / "next"
    both = ("onnx", "openvino")
    export_grown(base, targets=both)
    export_grown(new, 2, parent=base, targets=both)
    plain = write_pack(tmp_path / "plain", new)
    facts = write_pack(tmp_path / "pack", new, bases=[base])
    source = ChunkSource([base])
    made = install((tmp_path / "pack").read_bytes(), facts, source.__contains__, source.read)
    assert made == files_of(new, "bundle")
    bundle_bytes = sum(map(len, made.values()))
    assert facts.index_bytes + fetched_bytes(facts.index, base) < 0.05 * bundle_bytes
    assert fetched_bytes(plain.index, base) < 0.5 * plain.pack_bytes
    stored = {item.sha256: item.stored_bytes for item in plain.index.chunks}
    (ir,) = (file for file in plain.index.files if file.path.endswith(".bin"))
    (graph,) = (file for file in plain.index.files if file.path.endswith(".onnx"))
    own = [plain.index.chunks[number].sha256 for number in set(ir.chunks) - set(graph.chunks)]
    assert sum(stored[sha256] for sha256 in own) < 0.3 * ir.bytes, "an IR shares its tensors with the ONNX"
    for name, data in made.items():
        path = tmp_path / "device" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    check_files(tmp_path / "device/bundle", read_manifest(tmp_path / "device/bundle"))


LITE = ModelSpec(backbone="efficientnet_lite0", input_height_px=112, input_width_px=160)


def learn(model: SegmentationModel, parts: tuple[str, ...]) -> SegmentationModel:
    """A class more, and every weight of some parts another, as a step leaves them."""
    model.grow(1, "scaled")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(parts):
                parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def lite_base(tmp_path_factory: pytest.TempPathFactory) -> tuple[SegmentationModel, Path]:
    torch.manual_seed(0)
    model = build_model(LITE, (7,))
    load_backbone_weights(model, "imagenet")
    folder = tmp_path_factory.mktemp("lite") / "base"
    export_grown(folder, model=model.eval(), targets=("onnx", "openvino"))
    return model, folder


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("parts", "most_pct", "most_of_ideal"),
    [(("decoder.",), 25, 1.05), (("decoder.classifiers",), 1, None)],
    ids=["encoder frozen", "all but the head frozen"],
)
def test_a_step_of_the_default_network_is_fetched_within_the_limits(
    lite_base: tuple[SegmentationModel, Path],
    tmp_path: Path,
    parts: tuple[str, ...],
    most_pct: float,
    most_of_ideal: float | None,
) -> None:
    """Index and manifest included; the ideal is that of benchmarks/update_bytes.py, equal tensors counted once."""
    model, base = lite_base
    torch.manual_seed(1)
    export_grown(tmp_path / "next", model=learn(copy.deepcopy(model), parts), parent=base, targets=("onnx", "openvino"))
    command = [sys.executable, "benchmarks/update_bytes.py", base, tmp_path / "next", "--json", tmp_path / "figures"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, cwd=ROOT)
    (row,) = json.loads((tmp_path / "figures").read_text())
    fetched = row["ways"]["differences"]["bytes"]
    assert 100 * fetched / row["bundle_bytes"] < most_pct
    assert most_of_ideal is None or fetched < most_of_ideal * row["ideal_once_bytes"]
    assert 100 * row["ways"]["chunks"]["bytes"] / row["bundle_bytes"] < most_pct


@pytest.mark.slow
def test_the_benchmark_measures_a_pair(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, "benchmarks/update_bytes.py", *map(str, bundles), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())
    assert row["ways"]["differences"]["bytes"] < row["ways"]["chunks"]["bytes"] < row["bundle_bytes"]
    assert row["ideal_once_bytes"] <= row["ideal_bytes"]


def test_a_folder_that_is_no_bundle_is_not_packed(tmp_path: Path) -> None:
    with pytest.raises(EdgeIlsegError, match=r"no manifest\.json"):
        write_pack(tmp_path / "pack", tmp_path)
