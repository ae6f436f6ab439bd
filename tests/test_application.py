"""The three calls, on devices with real slots; and the example, run while its model is exchanged."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from bundles import BASE, GROWN, color_images, nearest_color, write_family
from device_roots import TIME, install, put_on_trial, state_of
from PIL import Image

from edge_ilseg.bundle import read_manifest, write_manifest
from edge_ilseg.devices.application import Application
from edge_ilseg.devices.update import lifecycle
from edge_ilseg.devices.update.disk import RealDisk
from edge_ilseg.devices.update.heartbeat import HEARTBEAT_NAME, Heartbeat, read_heartbeat
from edge_ilseg.devices.update.slots import CURRENT, slot_path
from edge_ilseg.errors import UpdateError

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs/examples/frame_loop.py"
MASK = np.array([[0, 0, 0, 1], [1, 2, 2, 2]], dtype=np.uint8)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_family(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def root(family: tuple[Path, Path], tmp_path: Path) -> Path:
    """A device that runs the parent."""
    install(tmp_path / "root", family[1])
    return tmp_path / "root"


def heartbeat_of(root: Path) -> Heartbeat:
    found = read_heartbeat(root)
    assert found is not None
    return found


def corrupt(bundle: Path, out: Path) -> Path:
    """A bundle whose hashes are right, and whose model no runtime loads."""
    shutil.copytree(bundle, out)
    (out / "fp32.onnx").write_bytes(b"no model")
    write_manifest(out, read_manifest(out))
    return out


def test_the_first_call_says_what_to_load_and_the_next_ones_that_nothing_changed(root: Path) -> None:
    with Application(root) as application:
        model = application.current()
        assert model.changed
        assert not model.is_on_trial
        assert model.notes == ()
        assert read_manifest(model.folder).step.index == 0
        assert application.current() == model._replace(changed=False)
        assert application.current() == model._replace(changed=False)


def test_a_start_on_trial_is_counted_before_the_model_is_handed_out(root: Path, family: tuple[Path, Path]) -> None:
    new = put_on_trial(root, family[0])
    for starts in (1, 2, 3):
        model = Application(root).current()
        assert (model.content_id, model.changed, model.is_on_trial) == (new, True, True)
        trial = state_of(root).trial
        assert trial is not None
        assert trial.starts == starts


def test_frames_count_no_starts(root: Path, family: tuple[Path, Path]) -> None:
    put_on_trial(root, family[0])
    with Application(root) as application:
        for _ in range(10):
            application.current()
            application.frame_done(MASK, 1.0)
    trial = state_of(root).trial
    assert trial is not None
    assert trial.starts == 1


def test_a_new_model_is_handed_out_between_two_frames(root: Path, family: tuple[Path, Path]) -> None:
    with Application(root) as application:
        old = application.current()
        application.frame_done(MASK, 1.0)
        new = put_on_trial(root, family[0])
        model = application.current()
        assert (model.content_id, model.changed) == (new, True)
        application.frame_done(MASK, 1.0)
        lifecycle.roll_back(RealDisk(root), 1, "by hand", TIME)
        back = application.current()
        assert (back.content_id, back.changed) == (old.content_id, True)


def test_a_switch_in_the_very_moment_of_a_load_is_seen_at_the_next_frame(
    root: Path, family: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent activates a release after the start was counted, and before `current` has returned."""
    counted = lifecycle.count_start

    def count_and_switch(disk: RealDisk, now: datetime) -> lifecycle.Start:
        start = counted(disk, now)
        monkeypatch.undo()
        put_on_trial(root, family[0])
        return start

    monkeypatch.setattr(lifecycle, "count_start", count_and_switch)
    application = Application(root)
    assert not application.current().is_on_trial
    assert application.current().is_on_trial


def test_a_model_that_was_started_too_often_makes_room(root: Path, family: tuple[Path, Path]) -> None:
    old = state_of(root).active.content_id
    put_on_trial(root, family[0], max_starts=2)
    for _ in range(2):
        assert Application(root).current().is_on_trial
    model = Application(root).current()
    assert (model.content_id, model.is_on_trial) == (old, False)
    assert any("not confirmed after 2 starts" in note for note in model.notes)
    assert [item.release for item in state_of(root).rejected] == [1]


def test_a_switch_that_a_power_cut_has_stopped_is_finished(root: Path, family: tuple[Path, Path]) -> None:
    old = state_of(root).active.content_id
    new = put_on_trial(root, family[0])
    (root / CURRENT).unlink()
    (root / CURRENT).symlink_to(slot_path(old))
    model = Application(root).current()
    assert (model.content_id, model.is_on_trial) == (new, True)
    assert os.readlink(root / CURRENT) == slot_path(new)


def test_a_model_on_trial_that_cannot_be_loaded_is_rolled_back_by_itself(root: Path, family: tuple[Path, Path]) -> None:
    old = state_of(root).active.content_id
    with Application(root) as application:
        application.current()
        application.frame_done(MASK, 1.0)
        new = put_on_trial(root, family[0])
        assert application.current().content_id == new
        application.failed(RuntimeError("no such\noperator"))
        assert heartbeat_of(root).last_failure == "no such operator"
        model = application.current()
        assert (model.content_id, model.changed) == (old, True)
        assert not application.current().changed
    state = state_of(root)
    assert (state.phase, state.active.content_id) == ("idle", old)
    assert state.rejected[0].reason == "the application cannot load it: no such operator"


def test_a_failure_after_the_first_mask_is_counted_and_left_to_the_agent(root: Path, family: tuple[Path, Path]) -> None:
    with Application(root) as application:
        new = put_on_trial(root, family[0])
        application.current()
        application.frame_done(MASK, 1.0)
        application.failed("one bad frame")
        assert application.current().content_id == new
    assert (heartbeat_of(root).failures, state_of(root).phase) == (1, "trial")


def test_a_permanent_model_that_cannot_be_loaded_is_tried_again_and_then_the_one_before_it_runs(
    root: Path, family: tuple[Path, Path]
) -> None:
    old = state_of(root).active.content_id
    new = put_on_trial(root, family[0])
    application = Application(root)
    application.current()
    lifecycle.confirm(RealDisk(root), 1)
    state = state_of(root)
    application = Application(root)
    for _ in range(2):
        model = application.current()
        assert (model.content_id, model.changed) == (new, True)
        application.failed("the runtime was updated")
    model = application.current()
    assert (model.content_id, model.changed, model.is_on_trial) == (old, True, False)
    assert model.notes == (f"{new[:12]} cannot be loaded; another one runs in its place",)
    application.frame_done(MASK, 1.0)
    assert not application.current().changed
    assert state_of(root) == state  # a permanent model is not rejected for what one process could not do
    assert Application(root).current().content_id == new


def test_the_only_model_is_handed_out_again_and_again(root: Path) -> None:
    application = Application(root)
    for _ in range(9):
        assert application.current().changed
        application.failed("out of memory")
    application.current()
    application.frame_done(MASK, 1.0)
    assert not application.current().changed


def test_the_heartbeat_counts_what_was_seen(root: Path) -> None:
    rng = np.random.default_rng(5)
    masks = rng.integers(0, 3, (20, 30, 40)).astype(np.uint8)
    masks[3], masks[7] = 0, 2
    with Application(root) as application:
        model = application.current()
        for number, mask_HW in enumerate(masks):
            application.frame_done(mask_HW, float(number + 1))
        application.failed("once")
    found = heartbeat_of(root)
    assert found.content_id == model.content_id
    assert found.bundle_id == read_manifest(model.folder).bundle_id
    assert (found.pid, found.processes, found.frames, found.failures) == (os.getpid(), 1, 20, 1)
    assert (found.constant_masks, found.background) == (2, "background")
    assert [(item.name, item.pixels) for item in found.classes] == [
        (name, int((masks == channel).sum())) for channel, name in enumerate(BASE)
    ]
    assert (found.latency_frames, found.latency_p50_ms, found.latency_p95_ms, found.latency_max_ms) == (20, 10, 19, 20)
    assert found.first_frame is not None
    assert found.last_frame is not None
    assert found.started <= found.first_frame <= found.last_frame <= found.updated


def test_counts_go_on_when_the_application_starts_again_and_begin_anew_with_another_model(
    root: Path, family: tuple[Path, Path]
) -> None:
    for _ in range(2):
        with Application(root) as application:
            application.current()
            application.frame_done(MASK, 1.0)
            application.failed("x")
            application.frame_done(MASK, 1.0)
    found = heartbeat_of(root)
    assert (found.processes, found.frames, found.failures, found.classes[0].pixels) == (2, 4, 2, 12)
    put_on_trial(root, family[0])
    with Application(root) as application:
        application.current()
        application.frame_done(MASK, 1.0)
    found = heartbeat_of(root)
    assert (found.processes, found.frames, found.failures) == (1, 1, 0)
    assert [item.name for item in found.classes] == list(GROWN)


def test_a_hostile_heartbeat_does_not_stop_the_application(root: Path) -> None:
    (root / HEARTBEAT_NAME).write_bytes(b"\xff" * 1000)
    with Application(root) as application:
        application.current()
        application.frame_done(MASK, 1.0)
    assert heartbeat_of(root).frames == 1


def test_large_masks_are_counted_by_rows_and_one_odd_pixel_is_still_seen(root: Path) -> None:
    mask_HW = np.zeros((1080, 1920), dtype=np.uint8)
    mask_HW[:540] = 1
    with Application(root) as application:
        application.current()
        application.frame_done(mask_HW, 1.0)
        mask_HW[:] = 0
        application.frame_done(mask_HW, 1.0)
        mask_HW[1, 7] = 2  # in a row that is not counted
        application.frame_done(mask_HW, 1.0)
    found = heartbeat_of(root)
    assert (found.frames, found.constant_masks) == (3, 1)
    total = sum(item.pixels for item in found.classes)
    assert found.classes[1].pixels / total == pytest.approx(1 / 6, rel=0.02)
    assert total <= 3 * 140_000


def test_a_channel_that_the_bundle_does_not_have_is_a_failure(root: Path, family: tuple[Path, Path]) -> None:
    put_on_trial(root, family[0])
    with Application(root) as application:
        application.current()
        application.frame_done(np.full((2, 2), 4, np.uint8), 1.0)
        assert not application.current().is_on_trial  # its first mask, and useless
    assert "channel 4" in state_of(root).rejected[0].reason


@pytest.mark.parametrize("mask", [np.zeros((2, 2, 1), np.uint8), np.zeros((0, 4), np.uint8), np.zeros((2, 2))])
def test_what_is_no_mask_is_the_callers_mistake(mask: np.ndarray, root: Path) -> None:  # type: ignore[type-arg]
    application = Application(root)
    application.current()
    with pytest.raises(ValueError, match="a mask of integers"):
        application.frame_done(mask, 1.0)


def test_frames_before_the_first_model_are_the_callers_mistake(root: Path) -> None:
    for call in (lambda: Application(root).frame_done(MASK, 1.0), lambda: Application(root).failed("x")):
        with pytest.raises(ValueError, match="comes first"):
            call()


def test_the_heartbeat_is_written_once_a_second_and_a_failure_at_once(root: Path) -> None:
    application = Application(root)
    application.current()
    written = set()
    start_s = time.monotonic()
    for _ in range(300):
        application.frame_done(MASK, 1.0)
        written.add((root / HEARTBEAT_NAME).stat().st_mtime_ns)
    most = 2 + int(time.monotonic() - start_s)
    assert len(written) <= most
    application.failed("x")
    assert (heartbeat_of(root).frames, heartbeat_of(root).failures) == (300, 1)
    application.frame_done(MASK, 1.0)
    application.close()
    assert heartbeat_of(root).frames == 301


def test_no_frame_waits_for_the_disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    application = Application(root)
    application.current()

    def refuse(_: int) -> None:
        raise AssertionError("a frame waits for the disk")

    monkeypatch.setattr(os, "fsync", refuse)
    for _ in range(3):
        application.current()
        application.frame_done(MASK, 1.0)
    application.failed("x")
    application.close()


def test_a_heartbeat_that_cannot_be_written_stops_nothing_and_is_told(root: Path, family: tuple[Path, Path]) -> None:
    (root / HEARTBEAT_NAME).mkdir()
    application = Application(root)
    application.current()
    application.frame_done(MASK, 1.0)
    application.close()
    put_on_trial(root, family[0])
    assert any("heartbeat cannot be written" in note for note in application.current().notes)


def test_many_threads_lose_no_frame(root: Path) -> None:
    application = Application(root)
    application.current()

    def work() -> None:
        for _ in range(200):
            application.current()
            application.frame_done(MASK, 1.0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    application.close()
    found = heartbeat_of(root)
    assert (found.frames, found.classes[0].pixels) == (800, 2400)


def test_a_thread_that_still_has_the_model_before_counts_nothing_for_the_new_one(
    root: Path, family: tuple[Path, Path]
) -> None:
    application = Application(root)
    old = application.current()
    application.frame_done(MASK, 1.0, model=old)
    put_on_trial(root, family[0])
    new = application.current()
    application.failed("of the model before", model=old)
    application.frame_done(MASK, 1.0, model=old)
    application.frame_done(MASK, 1.0, model=new)
    application.close()
    assert application.current().content_id == new.content_id
    assert (heartbeat_of(root).frames, heartbeat_of(root).failures) == (1, 0)


def test_one_that_does_not_report_counts_and_writes_nothing(root: Path, family: tuple[Path, Path]) -> None:
    old = state_of(root).active.content_id
    put_on_trial(root, family[0])
    viewer = Application(root, reports=False)
    model = viewer.current()
    assert (model.content_id, model.changed, model.is_on_trial) == (old, True, False)
    viewer.frame_done(MASK, 1.0)
    viewer.close()
    assert read_heartbeat(root) is None
    trial = state_of(root).trial
    assert trial is not None
    assert trial.starts == 0


def test_a_folder_that_is_no_device_is_told(tmp_path: Path) -> None:
    for reports in (True, False):
        with pytest.raises(UpdateError):
            Application(tmp_path, reports=reports).current()


def test_damage_below_a_loaded_model_stops_nothing(root: Path) -> None:
    application = Application(root)
    model = application.current()
    application.frame_done(MASK, 1.0)
    for name in ("state.json", "state.copy.json", CURRENT):
        (root / name).unlink()
    shutil.rmtree(root / "slots")
    after = application.current()
    assert (after.content_id, after.changed) == (model.content_id, False)
    assert "is not set up" in after.notes[0]
    application.frame_done(MASK, 1.0)


@pytest.fixture
def open_root(family: tuple[Path, Path]) -> Iterator[Path]:
    """A device in a folder that every user may enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        install(Path(folder) / "root", family[1])
        yield Path(folder) / "root"


def as_a_reader(root: Path) -> dict[str, object]:
    """What a process is handed out that may read ROOT, and not write to it."""
    program = """
        import json, os, sys
        from pathlib import Path
        import numpy as np
        from edge_ilseg.devices.application import Application
        root = Path(sys.argv[1])
        Application(root, reports=False).current()  # loads the modules, which another user may not be able to read
        if os.geteuid() == 0:
            os.setgroups([])
            os.setegid(65534)
            os.seteuid(65534)
        else:
            root.chmod(0o555)
        with Application(root) as application:
            model = application.current()
            application.frame_done(np.zeros((2, 2), np.uint8), 1.0)
            again = application.current()
        print(json.dumps([model.content_id, model.changed, model.is_on_trial, " ".join(model.notes), again.changed]))
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    root.chmod(0o755)
    assert done.returncode == 0, done.stderr
    keys = ("content_id", "changed", "is_on_trial", "notes", "again")
    return dict(zip(keys, json.loads(done.stdout), strict=True))


def test_an_application_that_may_only_read_gets_the_model_and_is_told_that_a_trial_cannot_be_counted(
    open_root: Path, family: tuple[Path, Path]
) -> None:
    old = state_of(open_root).active.content_id
    found = as_a_reader(open_root)
    assert (found["content_id"], found["changed"], found["again"]) == (old, True, False)
    put_on_trial(open_root, family[0])
    before = state_of(open_root)
    found = as_a_reader(open_root)
    assert (found["content_id"], found["is_on_trial"], found["again"]) == (old, False, False)
    assert "cannot be" in str(found["notes"])
    assert state_of(open_root) == before


@pytest.mark.slow
def test_a_model_that_kills_the_application_at_every_load_is_left_after_its_starts(
    root: Path, family: tuple[Path, Path]
) -> None:
    old = state_of(root).active.content_id
    put_on_trial(root, family[0], max_starts=2)
    program = """
        import os, signal, sys
        from pathlib import Path
        from edge_ilseg.devices.application import Application
        model = Application(Path(sys.argv[1])).current()
        if model.is_on_trial:
            os.kill(os.getpid(), signal.SIGSEGV)  # as a runtime does that cannot bear the model
        print(model.content_id)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(root)]
    ends = [subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT) for _ in range(3)]
    assert [end.returncode for end in ends] == [-signal.SIGSEGV, -signal.SIGSEGV, 0]
    assert ends[-1].stdout.strip() == old


class Loop:
    """The example, running over a folder that frames are put into."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.frames, self.masks, self._folder = folder / "frames", folder / "masks", folder
        self.frames.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, str(EXAMPLE), str(root), str(self.frames), str(self.masks), "--follow"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.images = color_images(40, list(GROWN), seed=11)
        self.sent = 0

    def send(self, count: int = 1) -> None:
        """Put the next frames into the folder, each of them whole."""
        for _ in range(count):
            name = f"{self.sent:03d}.png"
            Image.fromarray(self.images[self.sent]).save(self._folder / "part.png")
            (self._folder / "part.png").rename(self.frames / name)
            self.sent += 1

    def lines(self, count: int) -> list[list[str]]:
        """The next lines, each a frame and a content id."""
        assert self.process.stdout is not None
        return [self.process.stdout.readline().split() for _ in range(count)]

    def end(self) -> str:
        """Stop it; returns what it wrote to standard error."""
        self.process.send_signal(signal.SIGTERM)
        rest, errors = self.process.communicate(timeout=60)
        assert (self.process.returncode, rest) == (0, ""), errors
        return errors

    def check_masks(self, told: list[list[str]], classes: dict[str, list[str]]) -> None:
        """Each frame was masked once, in order, by the model that its line names."""
        assert [name for name, _ in told] == [f"{number:03d}.png" for number in range(self.sent)]
        assert sorted(path.name for path in self.masks.iterdir()) == [name for name, _ in told]
        for (name, content_id), image_HWC in zip(told, self.images[: self.sent], strict=True):
            mask_HW = np.asarray(Image.open(self.masks / name))
            np.testing.assert_array_equal(mask_HW, nearest_color(image_HWC, classes[content_id]))


@pytest.fixture
def loop(root: Path, tmp_path: Path) -> Iterator[Loop]:
    found = Loop(root, tmp_path)
    with found.process:
        yield found
        found.process.kill()


@pytest.mark.slow
def test_the_example_takes_a_new_model_between_two_frames_and_drops_none(
    root: Path, family: tuple[Path, Path], loop: Loop
) -> None:
    old = state_of(root).active.content_id
    loop.send(5)
    told = loop.lines(5)
    loop.send(4)  # some of these by the old model, some by the new
    new = put_on_trial(root, family[0])
    loop.send(6)
    told += loop.lines(10)
    assert told[-1][1] == new
    lifecycle.roll_back(RealDisk(root), 1, "by hand", TIME)
    loop.send(5)
    told += loop.lines(5)
    loop.end()
    used = [content_id for _, content_id in told]
    assert used[:5] == [old] * 5
    assert used[-5:] == [old] * 5
    switches = sum(one != two for one, two in itertools.pairwise(used))
    assert switches == 2
    loop.check_masks(told, {old: list(BASE), new: list(GROWN)})
    assert heartbeat_of(root).failures == 0


@pytest.mark.slow
def test_the_example_goes_back_by_itself_from_a_model_that_cannot_be_loaded(
    root: Path, family: tuple[Path, Path], loop: Loop, tmp_path: Path
) -> None:
    old = state_of(root).active.content_id
    loop.send(3)
    told = loop.lines(3)
    put_on_trial(root, corrupt(family[0], tmp_path / "broken"))
    loop.send(3)
    told += loop.lines(3)
    loop.end()
    assert {content_id for _, content_id in told} == {old}
    loop.check_masks(told, {old: list(BASE)})
    assert "refuses the model file" in state_of(root).rejected[0].reason
    assert heartbeat_of(root).frames >= 3
