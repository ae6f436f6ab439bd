"""What is published: built as a packager builds it, judged by twine, with every file that it needs and no other."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple

import pytest

from edge_ilseg import __version__

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(
    *(".git", ".venv", "build", "dist", "site", "*.egg-info", "__pycache__", ".*_cache", "demo-workspace"),
    *("docs", "benchmarks"),
)
DATA = {".toml", ".j2", ".css", ".service", ".timer", ".typed"}


class Built(NamedTuple):
    """Both files, and what the build has said."""

    wheel: Path
    sdist: Path
    said: str


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """An sdist, and the wheel that is made of it, with the setuptools of this environment."""
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=LEFT_OUT)  # a build writes into its source
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (wheel,) = (folder / "dist").glob("*.whl")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    return Built(wheel, sdist, done.stdout + done.stderr)


@pytest.mark.slow
def test_twine_has_nothing_against_it(built: Built) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", built.wheel, built.sdist]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package_and_nothing_else(built: Built) -> None:
    names = set(zipfile.ZipFile(built.wheel).namelist())
    inside = {name for name in names if not name.startswith(f"edge_ilseg-{__version__}.dist-info/")}
    package = {
        path.relative_to(ROOT).as_posix()
        for folder in (
            ROOT / "edge_ilseg",
            *(ROOT / "edge_ilseg" / name for name in ("export", "devices", "calibration")),
        )
        for path in folder.rglob("*")  # which follows no link by itself
        if path.is_file() and (path.suffix in DATA or path.suffix == ".py")
    }
    assert inside == package
    assert "edge_ilseg/py.typed" in inside
    for kind in (".toml", ".j2", ".css", ".service", ".timer"):
        assert any(name.endswith(kind) for name in inside), kind


@pytest.mark.slow
def test_the_sdist_has_the_documents_and_no_half_of_the_tests(built: Built) -> None:
    with tarfile.open(built.sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "pyproject.toml"} <= names
    assert not {name for name in names if name.startswith("tests")}
    assert not {name for name in names if "__pycache__" in name or name.endswith((".pyc", ".onnx", ".safetensors"))}


@pytest.mark.slow
def test_the_metadata_say_what_it_is(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as file:
        folder = f"edge_ilseg-{__version__}.dist-info"
        metadata = Parser().parsestr(file.read(f"{folder}/METADATA").decode())
        entries = file.read(f"{folder}/entry_points.txt").decode()
        assert f"{folder}/licenses/LICENSE" in file.namelist()
    assert (metadata["Name"], metadata["Version"]) == ("edge-ilseg", __version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert entries.strip() == "[console_scripts]\nedge-ilseg = edge_ilseg.cli:main"
    needed = [item for item in metadata.get_all("Requires-Dist", []) if "extra" not in item]
    assert {item.split(">")[0] for item in needed} == {"click", "msgspec", "numpy", "pillow", "rich"}


@pytest.mark.slow
def test_the_build_warns_of_nothing_that_will_stop_it_one_day(built: Built) -> None:
    for text in ("absent from the `packages` configuration", "Deprecat", "deprecat"):
        assert text not in built.said, built.said[built.said.find(text) - 500 :][:2000]
