"""Every command of the documentation does what its page says: each page is followed to the letter, in its own world.

What stands for a page's names, and what cannot be run at all, is in docs_tables.py; what a reader has when he begins,
is in docs_world.py. The start and the tutorial are followed in a fresh clone of this repository, by the program in it.
With MSRC_ROOT set, the tutorial reads the real photographs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from docs_follow import follow, is_left_out
from docs_tables import BEFORE, NOT_RUN, REPLACED
from docs_world import GIVEN, PASSPHRASE, Reader, write_programs
from documents import ROOT, name_of, page_statements, pages, strays
from nginx import free_port

STATEMENTS = {name_of(page): page_statements(page) for page in pages()}
IN_A_CLONE = ("docs/start.md", "docs/tutorial/new-class.md")
FOLLOWED = [name for name, found in STATEMENTS.items() if found and name not in IN_A_CLONE]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """Somebody in an empty folder, with the program on the path."""
    folder, programs = tmp_path / "here", tmp_path / "bin"
    folder.mkdir()
    write_programs(programs)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv(PASSPHRASE, raising=False)
    with ExitStack() as running:
        yield Reader(folder, programs, {"free_port": str(free_port())}, monkeypatch, running)


def check_followed(name: str, reader: Reader, root: Path = ROOT) -> None:
    """Follow a page; every command of it was run, or is known to be none for here."""
    for give in GIVEN[name]:
        give(reader)
    done = follow(root / name, reader, root)
    left_out = [said for said in page_statements(root / name) if said not in done]
    assert all(is_left_out(said) for said in left_out), left_out


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLLOWED)
def test_a_page_can_be_followed_to_the_letter(name: str, reader: Reader) -> None:
    check_followed(name, reader)
    if name == "docs/how-to/raspberry-pi.md":
        assert list((reader.folder / "seen/overlays").iterdir())


@pytest.fixture
def in_a_clone(reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """Somebody who has cloned the repository and installed what `make demo` installs, and has nothing else.

    The environment of the clone borrows the packages of this one and has the program of the clone, as an editable
    installation has it.
    """
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip(f"{ROOT} is no checkout of git: the start and the tutorial are followed in a clone of one")
    clone = reader.folder / "edge-ilseg"
    (tmp_path / "gitconfig").write_text("[safe]\n\tdirectory = *\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, clone], check=True)
    venv.create(clone / ".venv", symlinks=True)
    (packages,) = (clone / ".venv/lib").glob("python*/site-packages")
    borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "clone.pth").write_text("\n".join([str(clone), *borrowed, ""]))
    program = clone / ".venv/bin/edge-ilseg"
    program.write_text(f"#!{clone}/.venv/bin/python\nfrom edge_ilseg.cli import main\n\nmain()\n")
    program.chmod(0o755)
    elsewhere = [path for path in os.environ["PATH"].split(":") if not (Path(path) / "edge-ilseg").exists()]
    monkeypatch.setenv("PATH", ":".join(elsewhere))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(clone)
    reader.folder, reader.is_loaded = clone, False
    return reader


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_A_CLONE)
def test_a_page_can_be_followed_to_the_letter_in_a_fresh_clone(name: str, in_a_clone: Reader) -> None:
    check_followed(name, in_a_clone, in_a_clone.folder)
    asked = "import edge_ilseg, edge_ilseg.devices as d; print(edge_ilseg.__file__, d.__file__)"
    told = subprocess.run([".venv/bin/python", "-c", asked], capture_output=True, text=True, check=True)
    for path in told.stdout.split():
        assert Path(path).is_relative_to(in_a_clone.folder)


def test_every_page_with_a_command_is_followed() -> None:
    assert {*FOLLOWED, *IN_A_CLONE} == set(GIVEN)
    assert sum(len(found) for found in STATEMENTS.values()) > 120


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_no_command_stands_in_a_block_that_nobody_runs(page: Path) -> None:
    assert not list(strays(page)), "mark the block as bash: it is run then"


def test_every_exception_is_needed() -> None:
    def say(name: str, pattern: str) -> bool:
        texts = (text for page, found in STATEMENTS.items() if name in (page, "*") for text in found)
        return any(re.search(pattern, text) for text in texts)

    for name, pattern, _ in (*REPLACED, *BEFORE):
        assert say(name, pattern), f"{name} does not say {pattern!r} any more"
    for pattern, _ in NOT_RUN:
        assert say("*", f"^{pattern}"), f"no page says {pattern!r} any more"
