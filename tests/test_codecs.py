"""Codecs: what goes in comes out, and whatever else comes in is refused without taking memory for it."""

from __future__ import annotations

import lzma
import random
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from backports import zstd
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_ilseg import codecs
from edge_ilseg.chunks import MAX_CHUNK_BYTES
from edge_ilseg.codecs import (
    CODEC_NAMES,
    LZMA,
    RAW,
    ZLIB,
    ZSTD,
    ZSTD_FROM_BASE,
    add,
    apply_difference,
    compress_smallest,
    decompress,
    difference_smallest,
    subtract,
)
from edge_ilseg.errors import UpdateError

ROOT = Path(__file__).parents[1]
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 18}]
PACK: dict[int, Callable[[bytes], bytes]] = {
    RAW: bytes,
    ZLIB: zlib.compress,
    LZMA: lambda data: lzma.compress(data, lzma.FORMAT_RAW, filters=FILTERS),
    ZSTD: zstd.compress,
}
"""Each codec by hand, as docs/pack-format.md describes it."""
PACKED = (ZLIB, LZMA, ZSTD)
SAMPLE = b"a sample of text, a sample of text, and another sample of text" * 20
BOMB_BYTES = 32 << 20
MOST_BYTES = 4 << 20


def from_base(new: bytes, base: bytes) -> bytes:
    return zstd.compress(new, zstd_dict=zstd.ZstdDict(base, is_raw=True).as_prefix)


def peak_bytes(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(action: Callable[[], object]) -> UpdateError:
    with pytest.raises(UpdateError) as caught:
        action()
    return caught.value


@pytest.mark.parametrize("codec", PACK)
@given(data=st.binary(max_size=2000))
@example(data=b"")
@settings(max_examples=60, deadline=None)
def test_what_a_codec_has_packed_is_unpacked(codec: int, data: bytes) -> None:
    assert decompress(codec, PACK[codec](data), len(data)) == data


@given(data=st.one_of(st.binary(max_size=2000), st.text(max_size=2000).map(str.encode)))
@settings(max_examples=25, deadline=None)
def test_the_smallest_codec_is_chosen_and_understood(data: bytes) -> None:
    codec, packed = compress_smallest(data)
    assert decompress(codec, packed, len(data)) == data
    assert len(packed) <= min(len(data), len(zlib.compress(data, 9)), len(zstd.compress(data, 19)))


def test_each_codec_is_the_smallest_for_something() -> None:
    rng = np.random.default_rng(0)
    weights = np.clip(rng.normal(0, 18, 60_000), -127, 127).astype(np.int8).tobytes()
    lines = "".join(f"  <port id='{number}'/>\n" for number in range(40)).encode()
    chosen = {compress_smallest(data)[0] for data in (rng.bytes(100), weights, b"\0" * 200_000, lines, SAMPLE)}
    assert chosen == {RAW, ZLIB, LZMA, ZSTD}


def test_the_longest_chunk_fits_into_the_window_of_every_codec() -> None:
    half = np.random.default_rng(0).bytes(MAX_CHUNK_BYTES // 2)
    for codec in PACK:
        assert decompress(codec, PACK[codec](half + half), MAX_CHUNK_BYTES) == half + half
    codec, packed = compress_smallest(half + half)
    assert len(packed) < 0.6 * MAX_CHUNK_BYTES
    assert decompress(codec, packed, MAX_CHUNK_BYTES) == half + half


@pytest.mark.parametrize("codec", PACKED)
def test_a_bomb_takes_no_memory(codec: int) -> None:
    """Rule 1."""
    bomb = PACK[codec](b"\0" * BOMB_BYTES)
    assert peak_bytes(lambda: refused(lambda: decompress(codec, bomb, 1000))) < MOST_BYTES
    error = refused(lambda: decompress(codec, bomb, 1000))
    assert "more than 1000 bytes" in str(error) or "cannot be unpacked" in str(error)


def test_a_bomb_that_goes_on_from_a_base_takes_no_memory() -> None:
    base = np.random.default_rng(0).bytes(1000)
    bomb = from_base(base * 5000, base)
    assert len(bomb) < 10_000
    assert peak_bytes(lambda: refused(lambda: apply_difference(ZSTD_FROM_BASE, bomb, base, 1000))) < MOST_BYTES


@pytest.mark.parametrize("codec", PACKED)
def test_a_bomb_of_the_stated_length_is_only_that_long(codec: int) -> None:
    packed = PACK[codec](b"\0" * MAX_CHUNK_BYTES)
    assert peak_bytes(lambda: decompress(codec, packed, MAX_CHUNK_BYTES)) < MOST_BYTES


def test_a_frame_that_asks_for_a_great_window_is_refused() -> None:
    """Rule 1: zstd would take the window's memory before it gives a byte."""
    options = {
        zstd.CompressionParameter.window_log: 27,
        zstd.CompressionParameter.content_size_flag: 0,
    }
    compressor = zstd.ZstdCompressor(options=options)
    frame = compressor.compress(SAMPLE) + compressor.flush()
    assert zstd.decompress(frame) == SAMPLE
    assert "cannot be unpacked by zstd" in str(refused(lambda: decompress(ZSTD, frame, len(SAMPLE))))


@pytest.mark.parametrize("codec", PACKED)
def test_packed_bytes_that_end_anywhere_are_refused(codec: int) -> None:
    """Rule 2."""
    packed = PACK[codec](SAMPLE)
    for end in range(len(packed)):
        refused(lambda end=end: decompress(codec, packed[:end], len(SAMPLE)))


@pytest.mark.parametrize("codec", PACK)
@pytest.mark.parametrize("more", [b"\0", b"more", SAMPLE])
def test_bytes_behind_the_end_are_refused(codec: int, more: bytes) -> None:
    """Rule 2."""
    refused(lambda: decompress(codec, PACK[codec](SAMPLE) + more, len(SAMPLE)))


def test_a_second_frame_is_refused() -> None:
    """Rule 2: `zstd` itself would unpack both."""
    frames = zstd.compress(SAMPLE[:100]) + zstd.compress(SAMPLE[100:])
    assert zstd.decompress(frames) == SAMPLE
    refused(lambda: decompress(ZSTD, frames, len(SAMPLE)))


@pytest.mark.parametrize("codec", PACK)
@pytest.mark.parametrize("length", [0, 1, len(SAMPLE) - 1, len(SAMPLE) + 1, MAX_CHUNK_BYTES])
def test_another_length_is_refused(codec: int, length: int) -> None:
    """Rule 2."""
    error = refused(lambda: decompress(codec, PACK[codec](SAMPLE), length))
    assert (error.expected or "").startswith(f"{length} bytes")


@pytest.mark.parametrize("codec", [4, 5, 255, -1])
def test_an_unknown_codec_is_refused_with_those_that_are_known(codec: int) -> None:
    error = refused(lambda: decompress(codec, b"data", 4))
    assert all(name in str(error) for name in CODEC_NAMES)
    assert "update edge-ilseg" in str(error)


@pytest.mark.parametrize("codec", PACKED)
def test_flipped_bits_give_the_right_length_or_are_refused(codec: int) -> None:
    chance = random.Random(codec)
    packed = PACK[codec](SAMPLE)
    refusals = 0
    for _ in range(400):
        changed = bytearray(packed)
        for _ in range(chance.choice((1, 1, 2, 8))):
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        try:
            assert len(decompress(codec, bytes(changed), len(SAMPLE))) == len(SAMPLE)
        except UpdateError:
            refusals += 1
    assert refusals > 100


@given(data=st.binary(max_size=200), length=st.integers(0, 300))
@settings(max_examples=150, deadline=None)
def test_any_bytes_give_the_stated_length_or_are_refused(data: bytes, length: int) -> None:
    for codec in PACK:
        try:
            assert len(decompress(codec, data, length)) == length
        except UpdateError:
            continue


def test_a_device_without_zstd_is_told_what_to_install() -> None:
    program = f"""
import sys
sys.modules["backports"] = sys.modules["compression"] = None
from edge_ilseg.codecs import ZSTD, decompress
from edge_ilseg.errors import UpdateError
try:
    decompress(ZSTD, {PACK[ZSTD](SAMPLE)!r}, {len(SAMPLE)})
except UpdateError as error:
    print(error.hint)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert "edge-ilseg[update]" in done.stdout, done.stderr


@given(pair=st.integers(0, 300).flatmap(lambda size: st.tuples(*[st.binary(min_size=size, max_size=size)] * 2)))
@settings(max_examples=200, deadline=None)
def test_differences_are_those_of_numpy_modulo_256(pair: tuple[bytes, bytes]) -> None:
    new, base = (np.frombuffer(data, np.uint8) for data in pair)
    assert subtract(*pair) == (new - base).tobytes()
    assert add(*pair) == (new + base).tobytes()
    assert add(subtract(*pair), pair[1]) == pair[0]


def test_every_byte_is_subtracted_from_every_other() -> None:
    new, base = (array.astype(np.uint8) for array in np.divmod(np.arange(1 << 16), 256))
    assert subtract(new.tobytes(), base.tobytes()) == (new - base).tobytes()
    assert add(new.tobytes(), base.tobytes()) == (new + base).tobytes()


@pytest.mark.parametrize("operation", [add, subtract])
def test_bytes_of_different_lengths_have_no_difference(operation: Callable[[bytes, bytes], bytes]) -> None:
    refused(lambda: operation(b"abc", b"ab"))


@given(new=st.binary(max_size=400), base=st.binary(max_size=400), same=st.booleans())
@settings(max_examples=50, deadline=None)
def test_a_difference_and_its_base_give_the_chunk(new: bytes, base: bytes, same: bool) -> None:
    base = (base + b"\0" * len(new))[: len(new)] if same else base
    found = difference_smallest(new, base)
    if found is None:
        assert len(base) < codecs.MIN_PREFIX_BYTES
    else:
        assert apply_difference(*found, base, len(new)) == new


def test_weights_whose_scale_has_moved_are_a_small_difference_modulo_256() -> None:
    """Rule 4."""
    float_weights = np.random.default_rng(0).normal(0, 30, 60_000)
    base, new = (np.clip(np.round(float_weights * scale), -127, 127).astype(np.int8) for scale in (1.0, 1.02))
    assert (base != new).mean() > 0.3
    found = difference_smallest(new.tobytes(), base.tobytes())
    assert found is not None
    codec, packed = found
    assert codec != ZSTD_FROM_BASE
    assert len(packed) < 0.3 * len(compress_smallest(new.tobytes())[1])


def test_a_text_with_something_inserted_is_a_small_difference_from_another_length() -> None:
    """Rule 4."""
    base = b"".join(b"line %d of a text\n" % (number * 7919 % 1000) for number in range(500))
    new = base[:3000] + b"a line that is new\n" + base[3000:]
    found = difference_smallest(new, base)
    assert found is not None
    codec, packed = found
    assert (codec, len(packed) < 80) == (ZSTD_FROM_BASE, True)
    assert apply_difference(codec, packed, base, len(new)) == new


def test_a_wrong_base_gives_other_bytes_or_is_refused_and_never_the_right_ones() -> None:
    """Rule 5: why whoever calls this checks hashes."""
    base, new = SAMPLE, SAMPLE[:200] + b"inserted" + SAMPLE[200:]
    for codec, packed in ((ZSTD_FROM_BASE, from_base(new, base)), compress_smallest(subtract(new[: len(base)], base))):
        length = len(new) if codec == ZSTD_FROM_BASE else len(base)
        for wrong in (base[::-1], base[:-1], base[1:] + b"x", b"short", b""):
            try:
                assert apply_difference(codec, packed, wrong, length) != new[:length]
            except UpdateError:
                continue


@pytest.mark.parametrize("end", range(0, 40, 3))
def test_a_truncated_difference_is_refused(end: int) -> None:
    packed = from_base(SAMPLE + b"more, of which there is some here, and then some", SAMPLE)
    assert len(packed) > 40
    refused(lambda: apply_difference(ZSTD_FROM_BASE, packed[:end], SAMPLE, len(SAMPLE) + 48))
