"""Every command in the documentation is one that the program has; tutorials and how-tos are followed to the letter.

What a page needs beside this program is made for it, and what cannot be had here is replaced: all of that is in the
tables `SMALL`, `REPLACED` and `GIVEN`, and nowhere else. With MSRC_ROOT set, the tutorial reads the real photographs.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import pytest
from bundles import write_color_folder, write_family
from documents import (
    DOCS,
    FOLLOWED,
    PROGRAM,
    ROOT,
    Command,
    blocks,
    commands,
    mentions,
    pages,
    statements,
    words_of,
)
from PIL import Image
from sshd import Sshd, running_sshd

from edge_ilseg.cli import group, run
from edge_ilseg.cli.options import parse_data_text, parse_settings
from edge_ilseg.config import StepConfig, TrainConfig
from edge_ilseg.data import check_kind
from edge_ilseg.data.msrc import COLORS, Msrc
from edge_ilseg.data.shapes import Shapes
from edge_ilseg.devices.device_profile import read_profile
from edge_ilseg.methods import METHODS, resolve_method
from edge_ilseg.models.freezing import parse_freeze

NAMES = {path.relative_to(ROOT).as_posix(): path for path in pages()}


# Every command is one that the program has.


def parse(words: tuple[str, ...]) -> click.Context:
    """Let the real command line parse a call: commands, options, types and choices, and run nothing."""
    context: click.Context | None = None
    command: click.Command = group
    name, rest = "edge-ilseg", list(words)
    while isinstance(command, click.Group):
        context = command.make_context(name, rest, parent=context)
        found, resolved, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert resolved is not None
        assert found is not None
        name, command = found, resolved
    return command.make_context(name, rest, parent=context)


def check_values(params: Mapping[str, Any]) -> None:
    """What click takes for text, and only the command itself would refuse."""
    methods = params.get("method_names") or params.get("method") or ""
    for method in methods.split(","):
        assert method in ("", "all", *METHODS) or method.isupper(), method  # METHOD stands for any of them
    if params.get("kind"):
        check_kind(params["kind"])
    for name in ("data_text", "eval_data_text"):
        if params.get(name):
            parse_data_text(params[name])
    for item in params.get("setting_items") or ():
        parse_settings(StepConfig() if "freeze" in params else TrainConfig(), [item])
    for item in params.get("losses") or ():
        resolve_method("finetune", losses={item.partition("=")[0]: 1.0})
    if params.get("freeze"):
        parse_freeze(params["freeze"])
    for name in ("profile", "profile_name"):
        if params.get(name) and not params[name].endswith(".toml"):
            read_profile(params[name])


@pytest.mark.parametrize("name", NAMES)
def test_every_command_of_a_page_is_understood(name: str) -> None:
    for command in commands(NAMES[name]):
        try:
            check_values(parse(command.words).params)
        except click.exceptions.Exit:  # --help and --version
            pass
        except Exception as error:
            raise AssertionError(f"{command.place}: edge-ilseg {shlex.join(command.words)}: {error}") from error


@pytest.mark.parametrize("name", NAMES)
def test_every_command_that_is_named_in_a_sentence_has_these_options(name: str) -> None:
    for mention in mentions(NAMES[name]):
        check_mention(mention)


def check_mention(mention: Command) -> None:
    """A sentence may leave out arguments and values; the commands and options that it names are there."""
    command: click.Command = group
    options = set()
    for word in mention.words:
        if word.startswith("-"):
            options.add(word)
        elif isinstance(command, click.Group) and word.islower():
            found = command.get_command(click.Context(command), word)
            assert found is not None, f"{mention.place}: there is no command {word!r}"
            command = found
    known = {text for item in command.params for text in (*item.opts, *item.secondary_opts)} | {"--help"}
    assert options <= known, f"{mention.place}: {command.name} has no option {', '.join(sorted(options - known))}"


def test_the_documentation_has_commands_in_all_kinds_of_pages() -> None:
    found = {name: len(list(commands(path))) for name, path in NAMES.items()}
    for name in ("README.md", "docs/int8.md", "docs/remote.md", "docs/tutorial/new-class.md", "docs/how-to/keys.md"):
        assert found[name] >= 3, name
    assert sum(found.values()) > 100


# The pages are followed.

SMALL: dict[str, str] = {
    # command: options that make it small enough for a test; an option that is given twice counts as the last one
    "init": "--backbone tiny --size 64x48",
    "train": "--iterations 3 --batch-size 4 --accelerator cpu --workers 0",
    "step": "--iterations 2 --batch-size 2 --accelerator cpu",
    "export": "--target onnx --calibration-images 4",
    "verify": "--limit 20",
    "report": "--images 8 --pictures 2",
    "bench": "--rounds 1 --runs 2",
}
VERDICTS: dict[str, set[int]] = {"verify": {0, 1, 4}, "device run": {0, 1}}
"""Of networks that were trained for a second nobody can say what they have forgotten: on pages that train, any verdict
is one. Elsewhere, and for any other command, the exit code is 0."""
NOT_RUN = (
    # what another test runs, or what would change the machine
    (r"\. \.venv/bin/activate", "this Python's program is used"),
    (r"make demo", "test_demo.py runs the demo, for minutes; what it leaves is made small by given_demo"),
    (r"python3 -m pip wheel ", "test_clean_install.py builds and installs the package"),
    (r"scp wheels/", "no wheel was built"),
    (r"ssh pi@camera-1 '(python3 -m venv|venv/bin/pip install)", "the device is this machine, and has it installed"),
)
REPLACED = (
    # page, what it says, what is meant here
    ("raspberry-pi.md", r"ssh://pi@camera-1", "{address}"),
    ("raspberry-pi.md", r"--remote-python '~/venv/bin/python'", "--remote-python {python} {ssh_options}"),
    ("raspberry-pi.md", r"--profile raspberry-pi-5", "--profile this-machine.toml"),
    ("raspberry-pi.md", r"--precision int8", "--precision fp32"),  # all that the bundles here have
    ("raspberry-pi.md", r"^ssh pi@camera-1 venv/bin/edge-ilseg", "ssh -F ssh_config camera-1 'cd {there};' {program}"),
    ("raspberry-pi.md", r"^scp ", "scp -O -F ssh_config "),
    ("raspberry-pi.md", r"pi@camera-1:", "camera-1:{there}/"),
    ("air-gapped.md", r"/media/usb", "usb"),
    ("keys.md", r"/media/root-keys", "root-keys"),
    ("several-gpus.md", r"(?<=--add-classes boat --accelerator cuda) --devices 2", ""),  # once is enough
    ("several-gpus.md", r"--accelerator cuda", "--accelerator cpu"),
)


class Place(NamedTuple):
    """Where a page is followed, and by what its machines are known here."""

    folder: Path
    values: dict[str, str]


def write_folder(root: Path, names: tuple[str, ...], *, count: int, cvat: bool = False) -> None:
    """Generated scenes as a folder of images and masks: their kinds of object go by the names that a page has."""
    image_folder, mask_folder = ("JPEGImages", "SegmentationClass") if cvat else ("images", "masks")
    for part in (image_folder, mask_folder):
        (root / part).mkdir(parents=True)
    scenes = Shapes(train=count, height_px=48, width_px=64)
    for image_id in scenes.ids("train"):
        labels_HW = scenes.read_labels(image_id)
        labels_HW = np.where(labels_HW == 0, 0, (labels_HW - 1) % (len(names) - 1) + 1).astype(np.uint8)
        Image.fromarray(scenes.read_image(image_id)).save(root / image_folder / f"{image_id}.jpg")
        mask = np.array([(number * 60, 0, 0) for number in range(len(names))], dtype=np.uint8)[labels_HW]
        Image.fromarray(mask if cvat else labels_HW).save(root / mask_folder / f"{image_id}.png")
    if cvat:
        lines = [f"{name}:{number * 60},0,0::\n" for number, name in enumerate(names)]
        (root / "labelmap.txt").write_text("# label:color_rgb:parts:actions\n" + "".join(lines))
        (root / "ImageSets/Segmentation").mkdir(parents=True)
        ids = "".join(f"{image_id}\n" for image_id in scenes.ids("train"))
        (root / "ImageSets/Segmentation/default.txt").write_text(ids)
    else:
        (root / "classes.txt").write_text("".join(f"{name}\n" for name in names))


def given_msrc(place: Place) -> None:
    """The photographs, where they are; else coloured noise in their layout: neighbours in a list of classes, in which
    those that the page leaves for later stand together, so that every class has an image of its step."""
    target = place.folder / "MSRC"
    if root := os.environ.get("MSRC_ROOT"):
        target.symlink_to(Path(root).resolve())
        return
    for part in ("Images", "GroundTruth"):
        (target / part).mkdir(parents=True)
    (target / "train.txt").touch()
    later = ("face", "dog", "aeroplane", "bird", "boat")
    classes = [name for name in Msrc(target).info.classes if name not in later] + list(later)
    rng = np.random.default_rng(0)
    for split, count in (("train", 63), ("val", 21), ("test", 21)):
        ids = [f"{split}_{number}_s" for number in range(count)]
        (target / f"{split}.txt").write_text("".join(f"{image_id}\n" for image_id in ids))
        for number, image_id in enumerate(ids):
            colors = [COLORS[classes[(number + shift) % len(classes)]] for shift in (0, 1)]
            truth = np.repeat(np.array([colors], dtype=np.uint8), 48, axis=0).repeat(32, axis=1)
            noise = rng.integers(-20, 20, truth.shape)
            Image.fromarray((truth + noise).clip(0, 255).astype(np.uint8)).save(target / f"Images/{image_id}.jpg")
            Image.fromarray(truth).save(target / f"GroundTruth/{image_id}_GT.png")


def given_clone(place: Place) -> None:
    """What a reader who has a copy of the repository finds in it."""
    (place.folder / "docs").symlink_to(DOCS)


def given_demo(place: Place) -> None:
    """A workspace with the steps and bundles of a demo, which has learned next to nothing."""
    work = f"{place.folder}/demo-workspace"
    export = f"export {work} --target onnx --precision fp32 --step"
    for command in (
        f"init {work} --dataset shapes --later-classes star --option train=40 --option val=8 --option test=8 "
        "--backbone tiny --size 32x32 --setup disjoint --eval-split test",
        f"train {work} --iterations 1 --accelerator cpu",
        f"{export} 00-base",
        f"step {work} --add-classes star --from 00-base --name distilled --iterations 1 --accelerator cpu",
        f"{export} 01-distilled",
    ):
        assert run(command.split()) == 0, command
    bundles = place.folder / "demo-workspace/bundles"
    shutil.copytree(bundles / "01-distilled", bundles / "01-fine-tuned")


def given_bundles(place: Place) -> None:
    """Two real bundles of one family that keep all they know, images with labels, and frames."""
    child, parent = write_family(place.folder)
    child.rename(place.folder / "new.bundle")
    parent.rename(place.folder / "base.bundle")
    write_color_folder(place.folder / "VALIDATION", count=30)
    write_color_folder(place.folder / "more", count=100)
    (place.folder / "more/images").rename(place.folder / "frames")
    shutil.copytree(place.folder / "VALIDATION/images", place.folder / "PHOTOS")


def given_folders(place: Place) -> None:
    """Images and masks of the old ones and of new ones; the list of classes is made by the page."""
    names = ("background", "road", "car", "boat")
    write_folder(place.folder / "DATA", names, count=24)
    (place.folder / "DATA/classes.txt").unlink()
    write_folder(place.folder / "NEW_IMAGES", names, count=24)


def given_exports(place: Place) -> None:
    """What CVAT exports: two zip files."""
    for name, names in (("export", ("background", "road", "car")), ("boats", ("background", "road", "car", "boat"))):
        write_folder(place.folder / "made" / name, names, count=24, cvat=True)
        with zipfile.ZipFile(place.folder / f"{name}.zip", "w") as archive:
            for path in sorted((place.folder / "made" / name).rglob("*")):
                archive.write(path, path.relative_to(place.folder / "made" / name))


def given_stick(place: Place) -> None:
    """A USB stick that is mounted."""
    (place.folder / "usb").mkdir()


def given_workspace(place: Place) -> None:
    """A workspace on a folder of images."""
    write_folder(place.folder / "DATA", ("background", "road", "car", "boat"), count=24)
    command = f"init {place.folder}/work --dataset folder --root {place.folder}/DATA --later-classes boat"
    assert run([*command.split(), *SMALL["init"].split()]) == 0


def given_device(place: Place) -> None:
    """A folder that is the home of a device, which is this machine over SSH, and a profile that fits it."""
    (place.folder / "there").mkdir()
    limits = "[limits]\nmax_old_miou_drop_pct = 2.0\n"
    profile = f'machine = "{platform.machine()}"\ndescription = "the machine of the tests"\nint8_flags = []\n'
    (place.folder / "this-machine.toml").write_text(profile + limits)


GIVEN: dict[str, tuple[Callable[[Place], None], ...]] = {
    "start.md": (given_demo,),
    "new-class.md": (given_clone, given_msrc),
    "own-data.md": (given_folders,),
    "cvat.md": (given_exports,),
    "raspberry-pi.md": (given_bundles, given_device),
    "air-gapped.md": (given_clone, given_bundles, given_stick),
    "keys.md": (given_bundles,),
    "several-gpus.md": (given_workspace,),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An empty folder that commands run in, with the program on the path."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, arguments in (("edge-ilseg", "-m edge_ilseg"), ("python3", "")):
        program = bin_folder / name
        program.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" {arguments} "$@"\n')
        program.chmod(0o755)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("EDGE_ILSEG_KEY_PASSPHRASE", raising=False)
    programs = {"program": str(bin_folder / "edge-ilseg"), "python": str(bin_folder / "python3")}
    return Place(folder, {**programs, "there": str(folder / "there")})


def with_device(place: Place, server: Sshd) -> Place:
    """By which address, options and configuration of ssh the device of the pages is found."""
    config = {"HostName": "127.0.0.1", "Port": server.port, **server.settings}
    lines = ["Host camera-1", *(f"  {key} {value}" for key, value in config.items())]
    (place.folder / "ssh_config").write_text("\n".join([*lines, ""]))
    options = [f"--ssh-option {item}" for item in server.options()]
    options.append(f"--remote-folder {place.folder / 'there/store'}")
    return place._replace(values={**place.values, "address": server.address, "ssh_options": " ".join(options)})


def meant_here(page: Path, statement: str, place: Place) -> str:
    """A statement of a page, with what stands for it here."""
    for name, said, meant in REPLACED:
        if page.name == name:
            statement = re.sub(said, lambda _, meant=meant: meant.format(**place.values), statement)
    return statement


def small(words: tuple[str, ...]) -> list[str]:
    """A call with the options that make it small."""
    return [*words, *SMALL.get(words[0], "").split()]


def allowed_codes(words: tuple[str, ...], *, trains: bool) -> set[int]:
    """The exit codes that a call may end with."""
    return VERDICTS.get(words[0], VERDICTS.get(" ".join(words[:2]), {0})) if trains else {0}


def perform(statement: str, *, trains: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run one statement and return what it printed: the program in this process, the rest in a shell."""
    words = words_of(statement)
    is_plain = words is not None and shlex.split(statement, comments=True) == [PROGRAM, *words]
    if words is not None and is_plain and "--devices" in words:  # which starts this program anew
        statement = shlex.join([PROGRAM, *small(words)])
    elif words is not None and is_plain:
        printed = StringIO()
        with redirect_stdout(printed):
            code = run(small(words))
        assert code in allowed_codes(words, trains=trains), f"exit code {code}\n{printed.getvalue()}"
        return printed.getvalue()
    if setting := re.fullmatch(r"export (\w+)='([^']*)'", statement):
        monkeypatch.setenv(setting[1], setting[2])
        return ""
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", statement], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def header_cells(text: str) -> set[str]:
    """The heads of the columns of all tables in a text."""
    lines = [line for line in text.splitlines() if line.startswith("┃")]
    return {cell.strip() for line in lines for cell in line.strip("┃").split("┃")} - {""}


def follow(page: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> int:
    """Do all that a page says, in its order; the number of statements that were run."""
    trains = page.name == "start.md" or any(command.words[0] == "train" for command in commands(page))
    count, printed = 0, ""
    for block in blocks(page):
        if block.language == "text" and printed:
            missing = header_cells(block.text) - header_cells(printed)
            assert not missing, f"{block.place}: the tables have no column {', '.join(sorted(missing))}"
        if block.language != "bash":
            continue
        printed = ""
        for said in statements(block.text):
            if any(re.match(pattern, said) for pattern, _ in NOT_RUN):
                continue
            statement = meant_here(page, said, place)
            try:
                printed += perform(statement, trains=trains, monkeypatch=monkeypatch)
            except (AssertionError, OSError) as error:
                raise AssertionError(f"{block.place}: {said}\n(here: {statement})\n{error}") from error
            count += 1
    return count


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [path for path in FOLLOWED if path.name != "raspberry-pi.md"], ids=lambda path: path.stem
)
def test_a_page_can_be_followed_to_the_letter(page: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for give in GIVEN[page.name]:
        give(place)
    assert follow(page, place, monkeypatch) >= 3


@pytest.mark.slow
def test_the_page_on_the_raspberry_pi_can_be_followed_over_ssh(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = DOCS / "how-to/raspberry-pi.md"
    for give in GIVEN[page.name]:
        give(place)
    (tmp_path / "sshd").mkdir()
    with running_sshd(tmp_path / "sshd") as server:
        assert follow(page, with_device(place, server), monkeypatch) >= 6
    assert list((place.folder / "seen/overlays").iterdir())


def test_every_exception_is_needed() -> None:
    for name, said, _ in REPLACED:
        page = next(path for path in FOLLOWED if path.name == name)
        text = "\n".join(line for block in blocks(page) if block.language == "bash" for line in statements(block.text))
        assert re.search(said, text, re.MULTILINE), f"{name} does not say {said!r} any more"
    everything = "\n".join(line for page in FOLLOWED for block in blocks(page) for line in statements(block.text))
    for pattern, _ in NOT_RUN:
        assert re.search(f"^{pattern}", everything, re.MULTILINE), f"no page says {pattern!r} any more"
    assert set(GIVEN) == {page.name for page in FOLLOWED}
