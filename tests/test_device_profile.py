"""Device profiles: those that come with the package, one's own, and what is wrong with the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_ilseg.devices.device_profile import DOT_PRODUCT_FLAGS, DeviceProfile, profile_names, read_profile
from edge_ilseg.devices.facts import INT8_FLAGS
from edge_ilseg.errors import ConfigError

EIGHT_BITS = {
    "generic-arm64": False,
    "intel-n100": True,
    "jetson-orin-nano": True,
    "raspberry-pi-4": False,
    "raspberry-pi-5": True,
    "x86-avx2": False,
    "x86-vnni": True,
}
OWN = 'description = "my board"\nmachine = "aarch64"\nint8_flags = ["asimd", "asimddp"]\n'


def write_own(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def test_these_profiles_come_with_the_package() -> None:
    assert profile_names() == tuple(EIGHT_BITS)


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_that_comes_with_the_package_can_be_read_and_allows_8_bits_where_dot_products_are(name: str) -> None:
    profile = read_profile(name)
    assert profile.allows_8_bit_weights is EIGHT_BITS[name]
    assert profile.machine in {"x86_64", "aarch64"}
    assert profile.description
    assert len(set(profile.int8_flags)) == len(profile.int8_flags) > 0
    assert set(profile.int8_flags) <= set(INT8_FLAGS)
    arm = INT8_FLAGS[INT8_FLAGS.index("neon") :]
    assert all((flag in arm) == (profile.machine == "aarch64") for flag in profile.int8_flags)


@pytest.mark.parametrize("flag", INT8_FLAGS)
def test_8_bit_weights_need_one_flag_of_integer_dot_products(flag: str) -> None:
    needed = {"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"}
    profile = DeviceProfile(description="", machine="", int8_flags=("avx2", flag))
    assert profile.allows_8_bit_weights is (flag in needed)


def test_every_flag_of_dot_products_is_one_that_devices_are_asked_for() -> None:
    assert set(INT8_FLAGS) >= DOT_PRODUCT_FLAGS


def test_without_flags_weights_get_7_bits() -> None:
    assert not DeviceProfile(description="", machine="riscv64", int8_flags=()).allows_8_bit_weights


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    profile = read_profile(write_own(tmp_path, OWN))
    assert profile == DeviceProfile(description="my board", machine="aarch64", int8_flags=("asimd", "asimddp"))


def test_a_profile_that_is_not_there_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        ConfigError, match=r"'raspberry-pi5'\n.*raspberry-pi-4, raspberry-pi-5(.|\n)*mean 'raspberry-pi"
    ):
        read_profile("raspberry-pi5")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.toml", tmp_path):
        with pytest.raises(ConfigError, match="no such device profile"):
            read_profile(str(path))


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("asimddp", "asim_ddp", r"'asim_ddp'(.|\n)*asimddp(.|\n)*did you mean 'asimddp'"),
        ("machine", "cores = 4\nmachine", r"`cores`"),
        ("machine", "machines", r"`machines?`"),
        ('description = "my board"\n', "", r"`description`"),
        ('"my board"', "7", r"\$\.description"),
        ('["asimd", "asimddp"]', '"asimddp"', r"\$\.int8_flags"),
        ('"asimd", ', "1, ", r"\$\.int8_flags\[0\]"),
        ("machine = ", "machine ", r"line 2"),
    ],
)
def test_what_is_wrong_with_a_profile_is_said_with_the_file(tmp_path: Path, old: str, new: str, named: str) -> None:
    assert old in OWN
    path = write_own(tmp_path, OWN.replace(old, new, 1))
    with pytest.raises(ConfigError, match=named) as caught:
        read_profile(path)
    assert str(caught.value.where) == path


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(OWN.encode().replace(b"board", b"b\xf6rd"))
    with pytest.raises(ConfigError, match=r"mine\.toml"):
        read_profile(str(path))


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_a_limit_that_everything_or_nothing_keeps_to_is_refused(value: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'description = "mine"\nmachine = "x86_64"\nint8_flags = []\n[limits]\nmax_rss_mib = {value}\n')
    with pytest.raises(
        ConfigError, match=r"(max_rss_mib is not a finite number|>= 0\.0 - at `\$\.limits\.max_rss_mib`)"
    ) as caught:
        read_profile(str(path))
    assert caught.value.where == path


def test_a_profile_says_how_many_images_it_takes(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    text = 'description = "mine"\nmachine = "x86_64"\nint8_flags = []\n[limits]\nmin_images = {}\n'
    path.write_text(text.format(50))
    assert read_profile(str(path)).limits.min_images == 50
    path.write_text(text.format(0))
    with pytest.raises(ConfigError, match="cannot be used"):
        read_profile(str(path))
