"""The world that a page of the documentation is followed in: what it needs beside this program is made here.

`GIVEN` says by page what a reader has when he begins: images, bundles, a workspace, machines. A device is this machine
over SSH, in a home of its own, and a web server is one on the loopback.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from bundles import write_color_folder, write_family
from docs_tables import small
from documents import DOCS, PROGRAM, ROOT
from fleet_world import write_fleet
from PIL import Image
from sshd import running_sshd
from voc_folder import write_voc

from edge_ilseg.cli import run
from edge_ilseg.data.msrc import COLORS, Msrc
from edge_ilseg.data.shapes import Shapes

PASSPHRASE = "EDGE_ILSEG_KEY_PASSPHRASE"
NAMES = ("background", "road", "car", "boat")
SSH_HOSTS = "camera-1 camera-2 gate"


@dataclass
class Reader:
    """Who follows a page: in a folder, with the programs and the machines that stand for those of the page."""

    folder: Path
    programs: Path
    """A folder on the path."""
    values: dict[str, str]
    """What stands for words of a page (docs_tables.py)."""
    monkeypatch: pytest.MonkeyPatch
    running: ExitStack
    """Servers, until the page is done."""
    is_loaded: bool = True
    """The program of the page is the one in this process, which need not be started anew for every command."""
    settings: list[str] = field(default_factory=list)
    """What changed the reader's shell, and is said again to each shell after it."""


def write_program(path: Path, line: str) -> None:
    """A program that is one line of shell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n{line} "$@"\n')
    path.chmod(0o755)


def write_programs(folder: Path) -> None:
    """This checkout's program, and the Python that has what it needs, by the names that pages call them."""
    for name, arguments in (
        ("edge-ilseg", "-m edge_ilseg"),
        ("python3", ""),
        ("python", ""),
        ("torchrun", "-m torch.distributed.run"),
    ):
        write_program(folder / name, f'PYTHONPATH="{ROOT}" exec "{sys.executable}" {arguments}')


def run_small(command: str) -> None:
    """A command of this program, made small; it is expected to succeed."""
    assert run(small(f"{PROGRAM} {command}").split()[1:]) == 0, command


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


def given_photographs(reader: Reader) -> None:
    """The photographs of MSRC-v2, where they are."""
    if root := os.environ.get("MSRC_ROOT"):
        (reader.folder / "MSRC").symlink_to(Path(root).resolve())
    else:
        given_msrc(reader)


def given_msrc(reader: Reader) -> None:
    """Coloured noise in their layout: neighbours in a list of classes, in which those that the pages leave for later
    stand together, so that every class has an image of its step. They are the rarest, too, so that a scenario by
    frequency leaves the same ones for later."""
    target = reader.folder / "MSRC"
    for part in ("Images", "GroundTruth"):
        (target / part).mkdir(parents=True)
    (target / "train.txt").touch()
    later = ("face", "dog", "aeroplane", "bird", "boat")
    classes = [name for name in Msrc(target).info.classes if name not in later] + list(later)
    rng = np.random.default_rng(0)
    for split, count in (("train", 63), ("val", 21), ("test", 63)):
        ids = [f"{split}_{number}_s" for number in range(count)]
        (target / f"{split}.txt").write_text("".join(f"{image_id}\n" for image_id in ids))
        for number, image_id in enumerate(ids):
            colors = [COLORS[classes[(number + shift) % len(classes)]] for shift in (0, 1)]
            truth = np.repeat(np.array([colors], dtype=np.uint8), 48, axis=0).repeat(32, axis=1)
            truth[48 - number % len(classes) :] = 0  # without a label
            noise = rng.integers(-20, 20, truth.shape)
            Image.fromarray((truth + noise).clip(0, 255).astype(np.uint8)).save(target / f"Images/{image_id}.jpg")
            Image.fromarray(truth).save(target / f"GroundTruth/{image_id}_GT.png")


def given_docs(reader: Reader) -> None:
    """What a reader who has a copy of the repository finds in it."""
    (reader.folder / "docs").symlink_to(DOCS)


def given_bundles(reader: Reader) -> None:
    """Two real bundles of one family that keep all they know, images with labels, and frames."""
    child, parent = write_family(reader.folder)
    shutil.copytree(child, reader.folder / "boat.bundle")
    child.rename(reader.folder / "new.bundle")
    parent.rename(reader.folder / "base.bundle")
    write_color_folder(reader.folder / "VALIDATION", count=30)
    write_color_folder(reader.folder / "more", count=100)
    (reader.folder / "more/images").rename(reader.folder / "frames")
    shutil.copytree(reader.folder / "VALIDATION/images", reader.folder / "PHOTOS")


def given_demo(reader: Reader) -> None:
    """A workspace with the steps and bundles of a demo, which has learned next to nothing."""
    work = f"{reader.folder}/demo-workspace"
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
    bundles = reader.folder / "demo-workspace/bundles"
    shutil.copytree(bundles / "01-distilled", bundles / "01-fine-tuned")


def given_folders(reader: Reader) -> None:
    """Images and masks of the old ones and of new ones; the list of classes is made by the page."""
    write_folder(reader.folder / "DATA", NAMES, count=24)
    (reader.folder / "DATA/classes.txt").unlink()
    write_folder(reader.folder / "NEW_IMAGES", NAMES, count=24)


def given_exports(reader: Reader) -> None:
    """What CVAT exports: two zip files."""
    for name, names in (("export", NAMES[:3]), ("boats", NAMES)):
        write_folder(reader.folder / "made" / name, names, count=24, cvat=True)
        with zipfile.ZipFile(reader.folder / f"{name}.zip", "w") as archive:
            for path in sorted((reader.folder / "made" / name).rglob("*")):
                archive.write(path, path.relative_to(reader.folder / "made" / name))


def given_stick(reader: Reader) -> None:
    """A USB stick that is mounted."""
    (reader.folder / "usb").mkdir()


def given_workspace(reader: Reader) -> None:
    """A workspace on a folder of images."""
    write_folder(reader.folder / "DATA", NAMES, count=24)
    run_small(f"init {reader.folder}/work --dataset folder --root {reader.folder}/DATA --later-classes boat")


def given_step_0(reader: Reader) -> None:
    """The same, with step 0."""
    given_workspace(reader)
    run_small(f"train {reader.folder}/work")


def given_base_for_the_device(reader: Reader) -> None:
    """The bundle of step 0 that a device with this profile has."""
    run_small(f"export {reader.folder}/work --profile raspberry-pi-5 --out {reader.folder}/base.bundle")


def given_reports(reader: Reader) -> None:
    """A step that was taught, judged on two cameras and measured, and two workspaces."""
    given_step_0(reader)
    work = reader.folder / "work"
    run_small(f"step {work} --add-classes boat")
    run_small(f"export {work} --step 00-base")
    run_small(f"export {work} --step 01-boat")
    for name in ("camera-1", "camera-2"):
        verify = f"verify {work}/bundles/01-boat --against {work}/bundles/00-base --data folder:DATA --json"
        with (reader.folder / f"{name}.json").open("w") as file, redirect_stdout(file):
            assert run(verify.split()) in (0, 1, 4)
    run_small(f"bench {work}/bundles/01-boat --out {reader.folder}/bench.json")
    for name in ("work-a", "work-b"):
        shutil.copytree(work, reader.folder / name)


def given_publisher(reader: Reader) -> None:
    """What the publisher types when asked, a web server for his repository, a device's folder, reports of a fleet."""
    reader.monkeypatch.setenv(PASSPHRASE, "a passphrase of my own")
    reader.monkeypatch.setenv("EDGE_ILSEG_ROOT", str(reader.folder / "device"))
    reader.values["web"] = reader.running.enter_context(web_server(reader.folder))
    write_fleet(reader.folder / "REPORTS", devices=10)
    (reader.folder / "units").mkdir()  # /etc/systemd/system


@contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """Serve a folder, as any web server does; gives its URL."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def given_device(reader: Reader) -> None:
    """A device that is this machine over SSH, in a home of its own, with the program; and a profile that fits it."""
    home, folder = reader.folder / "there", reader.programs.parent / "sshd"
    write_programs(home / "venv/bin")
    folder.mkdir()
    environment = f"HOME={home} PATH={home}/venv/bin:{os.environ['PATH']}"
    more = f'SetEnv {environment}\nForceCommand cd "{home}" && exec sh -c "$SSH_ORIGINAL_COMMAND"'
    server = reader.running.enter_context(running_sshd(folder, more=more))
    config = {"HostName": "127.0.0.1", "Port": server.port, **server.settings}
    lines = [f"Host {SSH_HOSTS}", *(f"  {key} {value}" for key, value in config.items())]
    (folder / "ssh_config").write_text("\n".join([*lines, ""]))
    for name, option in (("ssh", ""), ("scp", "-O")):
        write_program(reader.programs / name, f"exec {shutil.which(name)} {option} -F {folder}/ssh_config")
    limits = "[limits]\nmax_old_miou_drop_pct = 2.0\n"
    profile = f'machine = "{platform.machine()}"\ndescription = "the machine of the tests"\nint8_flags = []\n'
    (reader.folder / "this-machine.toml").write_text(profile + limits)


def given_voc(reader: Reader) -> None:
    """VOC 2012, and weights of the network that takes the place of ResNet-101."""
    import torch
    from fakes import small_model

    write_voc(reader.folder / "VOCdevkit/VOC2012")
    torch.save(small_model().encoder.state_dict(), reader.folder / "resnet101.pth")


def given_readme(reader: Reader) -> None:
    """All that the README speaks of."""
    write_folder(reader.folder / "DATA", NAMES, count=24)
    for name in ("NEW_IMAGES", "VALIDATION"):
        shutil.copytree(reader.folder / "DATA", reader.folder / name)
    for name in ("PHOTOS", "FRAMES"):
        shutil.copytree(reader.folder / "DATA/images", reader.folder / name)


GIVEN: dict[str, tuple[Callable[[Reader], None], ...]] = {
    "README.md": (given_readme, given_device, given_publisher, given_msrc, given_voc),
    "docs/doctor.md": (),
    "docs/how-to/air-gapped.md": (given_docs, given_bundles, given_stick),
    "docs/how-to/cvat.md": (given_exports,),
    "docs/how-to/keys.md": (given_bundles,),
    "docs/how-to/own-data.md": (given_folders,),
    "docs/how-to/raspberry-pi.md": (given_bundles, given_device),
    "docs/how-to/several-gpus.md": (given_workspace,),
    "docs/int8.md": (given_step_0, given_base_for_the_device),
    "docs/log.md": (given_msrc,),
    "docs/model-card.md": (given_bundles,),
    "docs/profiles.md": (given_step_0, given_bundles, given_device),
    "docs/remote.md": (given_bundles, given_device),
    "docs/report.md": (given_reports,),
    "docs/results.md": (given_msrc,),
    "docs/start.md": (given_demo,),
    "docs/tutorial/new-class.md": (given_photographs,),
    "docs/update.md": (given_bundles, given_publisher),
}
