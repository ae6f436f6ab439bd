"""Masks for a folder of frames, by whatever model this device runs now; a new one is picked up between two frames.

    python frame_loop.py ROOT FRAMES MASKS [--follow]

ROOT is the device's folder. Each image of FRAMES, in the order of the names, gets a mask of the same name in MASKS,
made once, by one model, and one line on standard output: frame, and content id of the model. With --follow new frames
are waited for, until SIGTERM or Ctrl-C; a frame is to be renamed into the folder when it is whole.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from edge_ilseg.bundle import read_manifest
from edge_ilseg.devices.application import Application, CurrentModel
from edge_ilseg.devices.loaded_bundle import choose_model
from edge_ilseg.devices.runtime import Session, load_session
from edge_ilseg.errors import DataError, EdgeIlsegError
from edge_ilseg.images import IMAGE_SUFFIXES, open_image, resize_image, resize_mask

LOOK_EVERY_S = 0.02
ATTEMPTS = 5
"""More than it takes to go from a model that cannot be loaded to the one before it."""


def load(model: CurrentModel) -> Session:
    """The model in the memory of the runtime."""
    manifest = read_manifest(model.folder)
    runtime, precision = choose_model(manifest, None, None)
    return load_session(model.folder, manifest.model(runtime, precision))


def run(root: Path, frames: Path, masks: Path, *, follow: bool, stop: threading.Event) -> None:
    """The loop."""
    session: Session | None = None
    with Application(root) as application:
        for path in frames_in(frames, follow=follow, stop=stop):
            try:
                image = open_image(path)
            except DataError as error:  # not the model's fault: nothing that `failed` should know of
                print(error, file=sys.stderr)
                continue
            for _ in range(ATTEMPTS):  # the same frame again, if the model turns out not to work
                model = application.current()
                try:
                    if model.changed or session is None:
                        for note in model.notes:
                            print(note, file=sys.stderr)
                        session = load(model)
                    start_s = time.perf_counter()
                    mask_HW = session.mask(resize_image(image, session.input_height_px, session.input_width_px))
                    latency_ms = (time.perf_counter() - start_s) * 1000
                except EdgeIlsegError as error:
                    session = None
                    application.failed(error)
                    continue
                Image.fromarray(resize_mask(mask_HW, image.height, image.width)).save(masks / f"{path.stem}.png")
                application.frame_done(mask_HW, latency_ms)
                print(path.name, model.content_id, flush=True)
                break


def frames_in(folder: Path, *, follow: bool, stop: threading.Event) -> Iterator[Path]:
    """Each image once, in the order of the names; with `follow`, those that come later, until `stop` is set."""
    last = ""
    while not stop.is_set():
        names = sorted(item.name for item in folder.iterdir() if item.suffix.lower() in IMAGE_SUFFIXES)
        for name in names:
            if name > last and not stop.is_set():
                last = name
                yield folder / name
        if not follow:
            return
        stop.wait(LOOK_EVERY_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("root", "frames", "masks"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--follow", action="store_true", help="wait for new frames, until SIGTERM or Ctrl-C")
    given = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    given.masks.mkdir(parents=True, exist_ok=True)
    run(given.root, given.frames, given.masks, follow=given.follow, stop=stop)


if __name__ == "__main__":
    main()
