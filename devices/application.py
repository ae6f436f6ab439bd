"""Three calls for the application that runs the model: which one, what it gave, what went wrong. docs/application.md.

1. `current()` costs one `readlink` while nothing changes. When another model is to be loaded, its start is counted,
   durably, before it is handed out (`lifecycle.count_start`): a model that takes the application down is counted, too.
2. What cannot be counted is not tried: where ROOT cannot be written, the model before the one on trial is handed out,
   and a note says why. It is looked again from time to time.
3. A model that cannot be loaded (`failed` before its first `frame_done`) makes room by itself: on trial it is rolled
   back at once; a permanent one is tried once more, and then the one before it is handed out, for as long as this
   process lives.
4. `frame_done` and `failed` raise nothing for what the disk does, and never wait for it: counts are written at most
   once a second, without a sync; the first failure at once.
5. All calls may come from several threads. What a thread still got from the model before is not counted for the new
   one, if it says which model it was (`model=`).
6. One application reports for one ROOT. A second one (a viewer) says `reports=False`: it neither counts nor writes, and
   is never handed a model on trial.
7. While a model is loaded, no damage to ROOT stops the application: it goes on with what it has.
"""

from __future__ import annotations

import os
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_ilseg.bundle import read_manifest
from edge_ilseg.devices.update import decisions, lifecycle
from edge_ilseg.devices.update.disk import RealDisk
from edge_ilseg.devices.update.frame_counts import FrameCounts, Origin
from edge_ilseg.devices.update.heartbeat import read_heartbeat, short_error, write_heartbeat
from edge_ilseg.devices.update.lifecycle import Start
from edge_ilseg.devices.update.slots import CURRENT, FETCH_AGAIN, bundle_path, is_whole, slot_path
from edge_ilseg.devices.update.state import SET_UP, Installed, read_copies
from edge_ilseg.errors import BundleError, EdgeIlsegError, UpdateError

WRITE_EVERY_S = 1.0
LOADS = 2
"""Of a permanent model, before another one is handed out (rule 3)."""
LOOK_AGAIN_S = 60.0
"""After a start could not be counted, or `current` was not what was handed out (rule 2)."""
TURNS = 8
"""Models that one call of `current` looks at: more than a device holds."""


class CurrentModel(NamedTuple):
    """The model to run."""

    folder: Path
    """Of the bundle: `manifest.json` and its files. It never changes while it is there."""
    content_id: str
    changed: bool
    """Load it: it is another one than this call gave before, or it could not be loaded."""
    is_on_trial: bool = False
    notes: tuple[str, ...] = ()
    """What a person should know: what was mended, why a trial does not run."""


class Application:
    """This process, as the update parts know it."""

    def __init__(self, root: Path, *, reports: bool = True) -> None:
        """Nothing is read yet.

        Args:
            root: the device's folder.
            reports: whether what this process sees decides about trials (rule 6).
        """
        self._root = root
        self._link = os.path.join(root, CURRENT)
        self._disk = RealDisk(root)
        self._reports = reports
        self._lock = threading.RLock()
        self._pid, self._started = os.getpid(), datetime.now(UTC)
        self._start: Start | None = None
        self._counts: FrameCounts | None = None
        self._model: CurrentModel | None = None
        self._seen_link: str | None = None
        self._look_again_s: float | None = None
        self._must_load = False
        self._is_proven = False
        """The model has given a mask in this process."""
        self._loads = 0
        self._unusable: set[str] = set()
        self._written_s = float("-inf")
        self._write_problem: str | None = None

    def __enter__(self) -> Application:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def current(self) -> CurrentModel:
        """The model to run from now on; call it before each frame (rules 1 to 3).

        Raises:
            UpdateError: there is no whole model on this device, or ROOT is none.
        """
        with self._lock:
            if self._model is None or self._is_to_look():
                return self._switch()
            self._write_if_due()
            return self._model

    def frame_done(self, mask_HW: NDArray[np.uint8], latency_ms: float, *, model: CurrentModel | None = None) -> None:
        """The model gave a mask.

        Args:
            mask_HW: channels, height x width.
            latency_ms: of the model alone.
            model: what gave it; needed where several threads run models.

        Raises:
            ValueError: this is no mask, or `current` was never called.
        """
        with self._lock:
            counts = self._counts_of(model)
            if counts is None:
                return
            try:
                counts.add_mask(mask_HW, latency_ms, awake_s=time.monotonic(), now=datetime.now(UTC))
            except BundleError as error:
                self.failed(error, model=model)
                return
            self._is_proven, self._loads = True, 0
            self._write_if_due()

    def failed(self, error: BaseException | str, *, model: CurrentModel | None = None) -> None:
        """The model could not be loaded, or gave no mask. What a camera does wrong does not belong here.

        Args:
            error: what went wrong.
            model: what failed; needed where several threads run models.

        Raises:
            ValueError: `current` was never called.
        """
        with self._lock:
            counts = self._counts_of(model)
            if counts is None:
                return
            counts.add_failure(error)
            self._write_if_due(at_once=counts.failures == 1)
            if not self._is_proven:
                self._make_room(error)

    def close(self) -> None:
        """Write what was counted last."""
        with self._lock:
            self._write_if_due(at_once=True)

    def _counts_of(self, model: CurrentModel | None) -> FrameCounts | None:
        """Where to count for a model; `None`: it is no longer the one that runs (rule 5)."""
        if self._model is None or self._counts is None:
            raise ValueError("current() comes first")
        return self._counts if model is None or model.content_id == self._model.content_id else None

    def _is_to_look(self) -> bool:
        if self._must_load or self._read_link() != self._seen_link:
            return True
        return self._look_again_s is not None and time.monotonic() >= self._look_again_s

    def _read_link(self) -> str | None:
        try:
            return os.readlink(self._link)
        except OSError:
            return None

    def _switch(self) -> CurrentModel:
        """Find out what is to run; if it is another model than the loaded one, begin to count for it."""
        for _ in range(TURNS):
            link = self._read_link()
            try:
                start = self._choose()
            except UpdateError as error:
                return self._stay(link, error)
            self._look_where_it_points(link, start)
            if self._start is not None and start.content_id == self._start.content_id and not self._must_load:
                self._start = start
                return self._hand_out(changed=False)
            self._write_if_due(at_once=True)  # the last of the model before
            self._start, self._is_proven = start, False
            try:
                manifest = read_manifest(self._root / start.bundle)
            except EdgeIlsegError as error:
                self._make_room(error)
                continue
            origin = Origin(
                content_id=start.content_id,
                bundle_id=manifest.bundle_id,
                class_names=manifest.class_names,
                background=manifest.background,
                pid=self._pid,
                started=self._started,
            )
            if self._model is None or self._model.content_id != start.content_id:
                self._counts = FrameCounts(origin, read_heartbeat(self._root))
            self._must_load = False
            return self._hand_out(changed=True)
        raise UpdateError("no model on this device can be loaded", where=self._root, hint=FETCH_AGAIN)

    def _choose(self) -> Start:
        """The model that is to be loaded, its start counted (rules 1, 2, 3 and 6)."""
        if not self._reports:
            return self._first_usable("reports=False: what is on trial is not run")
        start = lifecycle.count_start(self._disk, datetime.now(UTC))
        if start.content_id not in self._unusable:
            return start
        try:
            return self._first_usable(f"{start.content_id[:12]} cannot be loaded; another one runs in its place")
        except UpdateError:  # there is no other one
            self._unusable.clear()
            return start

    def _first_usable(self, note: str) -> Start:
        """The best permanent model that is whole, and could be loaded so far."""
        state = read_copies(self._disk).state
        if state is None:
            raise UpdateError(
                "this folder is no device's, or its state is lost",
                where=self._root,
                hint=f"edge-ilseg device run mends it from the slots; {SET_UP}",
            )
        for item in decisions.order_without_counting(state):
            if item.content_id not in self._unusable and is_whole(self._disk, item.content_id, bundle_only=True):
                return _permanent(item, note)
        raise UpdateError("there is no whole model on this device", where=self._root, hint=FETCH_AGAIN)

    def _look_where_it_points(self, before: str | None, start: Start) -> None:
        """Remember what `current` says, so that the next change is seen (rule 1).

        Where it names another model than is handed out, it is looked again later.
        """
        after = self._read_link()
        is_there = after == slot_path(start.content_id)
        self._seen_link = after if is_there else before
        self._look_again_s = None if is_there else time.monotonic() + LOOK_AGAIN_S

    def _stay(self, link: str | None, error: UpdateError) -> CurrentModel:
        """Nothing whole can be found: go on with what is loaded (rule 7)."""
        if self._model is None or not self._is_proven:
            raise error
        self._seen_link, self._look_again_s = link, time.monotonic() + LOOK_AGAIN_S
        self._model = self._model._replace(changed=False, notes=(error.one_line(),))
        return self._model

    def _hand_out(self, *, changed: bool) -> CurrentModel:
        """What the caller gets; what later calls get says that nothing has changed."""
        start = self._start
        assert start is not None
        notes = start.notes if self._write_problem is None else (*start.notes, self._write_problem)
        self._model = CurrentModel(
            folder=self._root / start.bundle,
            content_id=start.content_id,
            changed=False,
            is_on_trial=start.is_on_trial,
            notes=notes,
        )
        return self._model._replace(changed=changed)

    def _make_room(self, error: BaseException | str) -> None:
        """The model cannot be loaded: the next call of `current` gives another one, or the same once more (rule 3)."""
        start = self._start
        assert start is not None
        self._must_load = True
        if start.is_on_trial:
            try:
                reason = f"the application cannot load it: {short_error(error)}"
                lifecycle.roll_back(self._disk, start.release, reason, datetime.now(UTC))
            except UpdateError:  # the disk refuses: this process goes without it, and the next start counts anew
                self._unusable.add(start.content_id)
            return
        self._loads += 1
        if self._loads >= LOADS:
            self._loads = 0
            self._unusable.add(start.content_id)

    def _write_if_due(self, *, at_once: bool = False) -> None:
        """Replace the heartbeat, if it is time (rule 4)."""
        is_due = at_once or time.monotonic() - self._written_s >= WRITE_EVERY_S
        if not (self._reports and is_due and self._counts is not None and self._counts.has_news):
            return
        self._written_s = time.monotonic()
        try:
            write_heartbeat(self._root, self._counts.heartbeat(datetime.now(UTC)))
        except OSError as error:
            self._write_problem = f"the heartbeat cannot be written, and no trial be confirmed: {error.strerror}"
        else:
            self._write_problem = None
            self._counts.has_news = False


def _permanent(installed: Installed, note: str) -> Start:
    bundle = bundle_path(installed.content_id)
    return Start(installed.content_id, installed.release, bundle, is_on_trial=False, starts=0, notes=(note,))
