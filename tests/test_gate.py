"""The gate, with real models: good ones, forgetful ones, and such as take a process down."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bundles import BASE, ENOUGH, GROWN, color_images, write_bundle, write_color_folder, write_family
from hostile_models import ENDLESS, hungry_network, looping_network, make_slot, nan_network, release_of
from PIL import Image

from edge_ilseg.bundle import Runtime, read_manifest, write_manifest
from edge_ilseg.data.folder import Folder
from edge_ilseg.devices.limits import Limits, OwnLimits, set_limits, tighten, tightening
from edge_ilseg.devices.update import gate_child
from edge_ilseg.devices.update.comparable import pair_up
from edge_ilseg.devices.update.confined import Ended, clean_environment, group_rss_mib, run_confined
from edge_ilseg.devices.update.gate import run_gate
from edge_ilseg.devices.update.gate_child import judge
from edge_ilseg.devices.update.gate_judgement import Run, decide
from edge_ilseg.devices.update.gate_records import GateRequest, GateSettings, GateVerdict
from edge_ilseg.devices.update.release import Release
from edge_ilseg.devices.verification import VerifyRequest, verify_bundle
from edge_ilseg.errors import BundleError, UpdateError

ROOT = Path(__file__).parents[1]
BOTH = pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
FAST: dict[str, Any] = {"threads": 1, "latency_runs": 2}
Slots = tuple[Path, Path]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_color_folder(tmp_path_factory.mktemp("data") / "colors")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Slots:
    return family_slots(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory: pytest.TempPathFactory) -> Slots:
    return family_slots(tmp_path_factory.mktemp("forgetful"), forget="grass")


def family_slots(folder: Path, **options: Any) -> Slots:
    """Slots of a new bundle and of the active one, which is its parent."""
    child, parent = write_family(folder, **options)
    return make_slot(child), make_slot(parent)


def settings(labels: Path | None = None, **others: Any) -> GateSettings:
    data = {} if labels is None else {"data": f"folder:{labels}"}
    return GateSettings(**{**FAST, **data, **others})


def ask(slots: Slots, given: GateSettings, tmp_path: Path, release: Release | None = None) -> GateVerdict:
    """The verdict without a process of its own."""
    release = release or release_of(slots[0])
    work = tmp_path / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    return judge(request_of(slots, given, work, release))


def request_of(slots: Slots, given: GateSettings, work: Path, release: Release) -> GateRequest:
    return GateRequest(
        slot=str(slots[0]),
        active=str(slots[1]),
        bundle_id=release.bundle_id,
        limits=release.limits,
        settings=given,
        work=str(work),
        agent_pid=os.getpid(),
        data_limit_mib=1,
        cpu_limit_s=1,
        file_limit_mib=1,
    )


def run(slots: Slots, given: GateSettings, tmp_path: Path, limits: Limits | None = None) -> GateVerdict:
    """The verdict as the agent gets it."""
    return run_gate(slots[0], slots[1], release_of(slots[0], limits), given, work=tmp_path / "work")


@pytest.mark.slow
@BOTH
def test_a_model_that_kept_everything_passes_with_its_numbers(runtime: Runtime, images: Path, tmp_path: Path) -> None:
    slots = family_slots(tmp_path, models=((runtime, "fp32"),))
    verdict = run(slots, settings(images), tmp_path, Limits(max_class_drop_pct=10.0, min_new_miou_pct=90.0))
    assert (verdict.outcome, verdict.is_taken, verdict.is_final) == ("passed", True, True)
    assert (verdict.evidence, verdict.images) == (("own labels",), ENOUGH)
    assert (verdict.old_miou_before_pct, verdict.old_miou_after_pct, verdict.old_miou_drop_pct) == (100.0, 100.0, 0.0)
    assert (verdict.drop_low_pct, verdict.drop_high_pct, verdict.falls) == (0.0, 0.0, ())
    assert (verdict.new_miou_pct, verdict.golden_agreement) == (100.0, 1.0)
    assert (verdict.runtime, verdict.precision) == (runtime, "fp32")
    assert verdict.latency_p95_ms is not None
    assert verdict.latency_p95_ms > 0
    assert verdict.peak_rss_mib is not None
    assert verdict.peak_rss_mib > 10
    assert verdict.seconds > 0
    assert list((tmp_path / "work").iterdir()) == []
    assert msgspec.json.decode(msgspec.json.encode(verdict), type=GateVerdict) == verdict


@pytest.mark.slow
@BOTH
def test_a_model_that_forgot_a_class_is_refused_and_the_class_is_named(
    runtime: Runtime, images: Path, tmp_path: Path
) -> None:
    slots = family_slots(tmp_path, forget="grass", models=((runtime, "fp32"),))
    verdict = run(slots, settings(images), tmp_path)
    assert (verdict.outcome, verdict.is_taken, verdict.is_final) == ("refused", False, True)
    assert verdict.reason.startswith("it forgot grass 100.0 -> 0.0 %")
    assert "\n" not in verdict.reason
    worst = verdict.falls[0]
    assert (worst.name, worst.before_pct, worst.after_pct, worst.drop_pct) == ("grass", 100.0, 0.0, 100.0)
    assert (worst.low_pct, worst.high_pct, worst.is_forgotten) == (100.0, 100.0, True)
    assert "grass" in verdict.forgotten
    assert [item.name for item in verdict.falls] == ["grass", "background"]
    assert verdict.old_miou_drop_pct is not None
    assert verdict.drop_low_pct is not None
    assert verdict.drop_low_pct <= verdict.old_miou_drop_pct
    assert verdict.old_miou_drop_pct > 30


def test_frames_without_labels_tell_what_was_forgotten(
    good: Slots, forgetful: Slots, images: Path, tmp_path: Path
) -> None:
    """No limit is signed for frames: the defaults of the gate hold."""
    given = settings(images=str(images / "images"))
    kept = ask(good, given, tmp_path)
    assert (kept.outcome, kept.evidence, kept.agreement_pct, kept.moved_pct) == ("passed", ("frames",), 100.0, 0.0)
    lost = ask(forgetful, given, tmp_path)
    assert (lost.outcome, lost.is_taken) == ("refused", False)
    assert lost.forgotten[0] == "grass"
    assert lost.reason.startswith("the active model sees grass, background otherwise; unlabelled agreement")


def write_frames(folder: Path, count: int, names: list[str]) -> str:
    folder.mkdir()
    for number, image_HWC in enumerate(color_images(count, names, seed=3)):
        Image.fromarray(image_HWC).save(folder / f"{number:02}.png")
    return str(folder)


def test_a_limit_for_each_class_is_open_where_frames_do_not_show_each_class(good: Slots, tmp_path: Path) -> None:
    """As with labels: what nobody has seen was not proved."""
    release = release_of(good[0], Limits(min_class_agreement_pct=50.0))
    shown = write_frames(tmp_path / "all", ENOUGH, list(BASE))
    assert ask(good, settings(images=shown), tmp_path, release).outcome == "passed"
    frames = write_frames(tmp_path / "some", ENOUGH, ["background", "apple"])
    verdict = ask(good, settings(images=frames), tmp_path, release)
    assert (verdict.outcome, verdict.is_taken) == ("too few images", False)
    assert "class agreement" in verdict.reason
    assert "too few images show grass" in verdict.reason
    assert ask(good, settings(images=frames, accept_too_few=True), tmp_path, release).is_taken
    assert ask(good, settings(images=frames), tmp_path).outcome == "passed"  # without such a limit
    few = write_frames(tmp_path / "few", 12, list(BASE))
    assert ask(good, settings(images=few), tmp_path, release).outcome == "passed"  # of ten frames the gate can tell


def test_frames_that_cannot_be_read_leave_a_limit_for_each_class_open(
    good: Slots, images: Path, tmp_path: Path
) -> None:
    """Labels decide beside them, and nothing has looked at what this limit is about."""
    frames = Path(write_frames(tmp_path / "frames", 3, list(BASE)))
    for path in frames.iterdir():
        path.write_bytes(b"no image")
    release = release_of(good[0], Limits(min_class_agreement_pct=50.0))
    verdict = ask(good, settings(images, images=str(frames)), tmp_path, release)
    assert (verdict.outcome, verdict.is_taken) == ("too few images", False)
    assert "class agreement (no image could be used)" in verdict.reason
    assert ask(good, settings(images, images=str(frames)), tmp_path).outcome == "passed"


@pytest.mark.parametrize("forget", [None, "grass"])
def test_frames_tell_what_would_be_lost_by_going_back_class_by_class(forget: str | None, tmp_path: Path) -> None:
    """What the older model gives to an old class and the active one calls a boat is given up on purpose."""
    write_bundle(tmp_path / "active", GROWN, step_id="b" * 64, parent_id="a" * 64)
    write_bundle(tmp_path / "new", BASE, step_id="a" * 64, forget=forget)
    slots = make_slot(tmp_path / "new"), make_slot(tmp_path / "active")
    frames = write_frames(tmp_path / "frames", ENOUGH, list(GROWN))
    limits = Limits(min_class_agreement_pct=50.0, min_agreement_pct=1.0)
    verdict = ask(slots, settings(images=frames), tmp_path, release_of(slots[0], limits))
    if forget is None:
        assert (verdict.outcome, verdict.evidence) == ("passed", ("frames",))
    else:
        assert (verdict.outcome, verdict.disagreeing[0]) == ("refused", "grass")
        assert verdict.reason.startswith("the active model sees grass")
        assert "class agreement 0 % (limit 50; least: grass, in " in verdict.reason


def test_images_shipped_with_the_release_are_used(forgetful: Slots, images: Path, tmp_path: Path) -> None:
    slot = tmp_path / "slot"
    shutil.copytree(forgetful[0], slot)
    shutil.copytree(images, slot / "validation")
    verdict = ask((slot, forgetful[1]), settings(), tmp_path)
    assert (verdict.outcome, verdict.evidence) == ("refused", ("shipped labels",))
    assert "grass" in verdict.forgotten


@pytest.mark.slow
def test_labels_of_the_device_and_labels_of_the_release_are_both_judged(
    forgetful: Slots, images: Path, tmp_path: Path
) -> None:
    """The publisher's images show no grass at all; the device's do."""
    slot = tmp_path / "slot"
    shutil.copytree(forgetful[0], slot)
    write_color_folder(slot / "validation", ("background", "apple", "boat"))
    alone = ask((slot, forgetful[1]), settings(), tmp_path)
    assert (alone.outcome, alone.evidence, alone.new_miou_pct) == ("passed", ("shipped labels",), 100.0)
    both = ask((slot, forgetful[1]), settings(images), tmp_path)
    assert (both.outcome, both.evidence, both.images) == ("refused", ("own labels", "shipped labels"), 2 * ENOUGH)
    assert both.forgotten[0] == "grass"


@pytest.mark.slow
def test_images_that_nobody_has_split_are_all_used(good: Slots, tmp_path: Path) -> None:
    unsplit = write_color_folder(tmp_path / "unsplit", count=30)
    shutil.rmtree(unsplit / "splits")
    assert set(Folder(unsplit).info.splits) == {"train", "val"}
    assert ask(good, settings(unsplit), tmp_path).images == 30


def test_a_release_that_nothing_measures_is_not_taken(good: Slots, tmp_path: Path) -> None:
    verdict = ask(good, settings(), tmp_path)
    assert (verdict.outcome, verdict.is_taken, verdict.is_final) == ("cannot be judged", False, False)
    assert "neither data nor images" in verdict.reason
    verdict = ask(good, settings(allow_unjudged=True), tmp_path)
    assert (verdict.outcome, verdict.is_taken) == ("cannot be judged", True)


def test_what_broke_a_limit_is_not_taken_as_unjudged(good: Slots, tmp_path: Path) -> None:
    release = release_of(good[0], Limits(max_model_mib=1e-6))
    verdict = ask(good, settings(allow_unjudged=True, accept_too_few=True), tmp_path, release)
    assert (verdict.outcome, verdict.is_taken) == ("refused", False)
    assert "model size" in verdict.reason


@pytest.mark.slow
def test_a_first_model_has_nothing_to_be_compared_with(good: Slots, images: Path, tmp_path: Path) -> None:
    verdict = run_gate(good[1], None, release_of(good[1]), settings(images), work=tmp_path / "work")
    assert verdict.outcome == "cannot be judged"
    assert "no active model" in verdict.reason
    assert verdict.golden_agreement == 1.0


def test_frames_that_show_nothing_but_the_background_prove_nothing(forgetful: Slots, tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    for number, image_HWC in enumerate(color_images(12, ["background"])):
        Image.fromarray(image_HWC).save(frames / f"{number}.png")
    verdict = ask(forgetful, settings(images=str(frames)), tmp_path)
    assert (verdict.outcome, verdict.is_taken, verdict.agreement_pct) == ("cannot be judged", False, 100.0)
    assert "none of the old classes but the background" in verdict.reason


def test_labelled_images_of_nothing_but_the_background_prove_nothing(forgetful: Slots, tmp_path: Path) -> None:
    sky = write_color_folder(tmp_path / "sky", ("background",))
    (sky / "classes.txt").write_text("".join(f"{name}\n" for name in GROWN))
    verdict = ask(forgetful, settings(sky), tmp_path)
    assert (verdict.outcome, verdict.is_taken, verdict.old_miou_drop_pct) == ("cannot be judged", False, 0.0)


def test_a_few_frames_prove_nothing(good: Slots, images: Path, tmp_path: Path) -> None:
    verdict = ask(good, settings(images=str(images / "images"), min_frames=ENOUGH + 1), tmp_path)
    assert verdict.outcome == "cannot be judged"
    assert f"{ENOUGH} of {ENOUGH} frames show an old class, and {ENOUGH + 1} that do are needed" in verdict.reason


def test_frames_of_which_few_show_an_old_class_prove_nothing(good: Slots, tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    for number, image_HWC in enumerate([*color_images(9, list(BASE), seed=3), *color_images(9, ["background"])]):
        Image.fromarray(image_HWC).save(frames / f"{number:02}.png")
    verdict = ask(good, settings(images=str(frames)), tmp_path)
    assert (verdict.outcome, verdict.is_taken) == ("cannot be judged", False)
    assert "9 of 18 frames show an old class, and 10 that do are needed" in verdict.reason
    assert ask(good, settings(images=str(frames), min_frames=9), tmp_path).outcome == "passed"


@pytest.mark.parametrize(
    ("signed", "own", "bundle", "has_labels", "held"),
    [
        ({"max_old_miou_drop_pct": 5.0}, {}, {"max_old_miou_drop_pct": 3.0}, True, {"max_old_miou_drop_pct": 3.0}),
        ({}, {}, {"max_old_miou_drop_pct": 3.0}, True, {"max_old_miou_drop_pct": None}),
        ({"min_agreement_pct": 50.0}, {}, {"min_agreement_pct": 70.0}, False, {"min_agreement_pct": 70.0}),
        ({}, {}, {"min_agreement_pct": 70.0}, True, {"min_agreement_pct": 70.0}),
        ({}, {}, {"min_agreement_pct": 70.0}, False, {"min_agreement_pct": None}),
        ({}, {"max_moved_pct": 30.0}, {"max_moved_pct": 20.0}, False, {"max_moved_pct": 20.0}),
        ({"min_golden_agreement": 0.5}, {}, {"min_golden_agreement": 0.6}, True, {"min_golden_agreement": 0.6}),
        ({"min_images": 5}, {}, {"min_images": 20, "max_bad_images": 0}, True, {"min_images": 20}),
        ({"min_images": 30}, {}, {"min_images": 20}, True, {"min_images": 30}),
    ],
)
def test_a_bundles_limit_is_held_where_it_is_stricter_than_what_holds_without_it(
    signed: dict[str, Any], own: dict[str, Any], bundle: dict[str, Any], has_labels: bool, held: dict[str, Any],
    good: Slots, tmp_path: Path,
) -> None:  # fmt: skip
    """`None`: the default, which is stricter."""
    slot = tmp_path / "slot"
    shutil.copytree(good[0], slot)
    manifest = read_manifest(slot / "bundle")
    manifest = write_manifest(slot / "bundle", msgspec.structs.replace(manifest, limits=OwnLimits(**bundle)))
    given = settings(limits=OwnLimits(**own))
    request = request_of((slot, good[1]), given, tmp_path, release_of(slot, Limits(**signed)))
    found = gate_child._verify_request(request, slot / "bundle", manifest, has_labels=has_labels)
    assert {name: getattr(found.limits, name) for name in held} == held


@pytest.mark.slow
def test_too_few_labelled_images_are_no_proof_unless_the_owner_says_so(good: Slots, tmp_path: Path) -> None:
    one = write_color_folder(tmp_path / "one", count=1)
    verdict = ask(good, settings(one), tmp_path)
    assert (verdict.outcome, verdict.is_taken, verdict.is_final) == ("too few images", False, True)
    assert ask(good, settings(one, accept_too_few=True), tmp_path).is_taken


@pytest.mark.slow
def test_how_many_images_it_takes_is_signed_and_the_device_may_ask_for_more(good: Slots, tmp_path: Path) -> None:
    ten = write_color_folder(tmp_path / "ten", count=10)
    assert ask(good, settings(ten), tmp_path).outcome == "too few images"
    release = release_of(good[0], Limits(min_images=10))
    assert ask(good, settings(ten), tmp_path, release).outcome == "passed"
    profile = tmp_path / "plain.toml"
    profile.write_text(f'description = "plain"\nmachine = "{os.uname().machine}"\nint8_flags = []\n')
    assert ask(good, settings(ten, profile=str(profile)), tmp_path, release).outcome == "passed"
    more = settings(ten, limits=OwnLimits(min_images=11))
    assert ask(good, more, tmp_path, release).outcome == "too few images"


@pytest.mark.slow
def test_what_few_images_cannot_tell_is_not_called_forgotten(forgetful: Slots, tmp_path: Path) -> None:
    verdict = ask(forgetful, settings(write_color_folder(tmp_path / "ten", count=10)), tmp_path)
    assert (verdict.outcome, verdict.forgotten) == ("too few images", ())
    assert verdict.falls[0].name == "grass"


@pytest.mark.slow
def test_a_frame_that_cannot_be_read_is_left_out_and_refuses_nothing(
    good: Slots, forgetful: Slots, images: Path, tmp_path: Path
) -> None:
    """A camera writes while the gate reads."""
    frames = tmp_path / "frames"
    shutil.copytree(images / "images", frames)
    (frames / "003.png").write_bytes(b"no image")
    verdict = ask(good, settings(images=str(frames)), tmp_path)
    assert (verdict.outcome, verdict.images) == ("passed", ENOUGH - 1)
    assert ask(forgetful, settings(images=str(frames)), tmp_path).outcome == "refused"


@pytest.mark.slow
def test_frames_beside_labels_refuse_nothing_unless_a_limit_for_them_is_signed(
    forgetful: Slots, images: Path, tmp_path: Path
) -> None:
    """Limits of labels so wide that nothing breaks them; on the frames a third of what was seen is gone."""
    given = settings(images, images=str(images / "images"))
    wide = Limits(max_old_miou_drop_pct=100.0)
    assert ask(forgetful, given, tmp_path, release_of(forgetful[0], wide)).outcome == "passed"
    for name in ("min_agreement_pct", "min_class_agreement_pct"):
        signed = msgspec.structs.replace(wide, **{name: 90.0})
        verdict = ask(forgetful, given, tmp_path, release_of(forgetful[0], signed))
        assert (verdict.outcome, verdict.forgotten[0]) == ("refused", "grass")


@pytest.mark.slow
def test_a_class_that_no_image_shows_leaves_a_limit_for_each_class_open(good: Slots, tmp_path: Path) -> None:
    labels = write_color_folder(tmp_path / "labels", ("background", "apple", "boat"))
    release = release_of(good[0], Limits(max_class_drop_pct=5.0))
    verdict = ask(good, settings(labels), tmp_path, release)
    assert (verdict.outcome, verdict.is_taken) == ("too few images", False)
    assert ask(good, settings(labels, accept_too_few=True), tmp_path, release).is_taken


@pytest.mark.slow
def test_too_few_images_of_the_device_do_not_matter_where_those_of_the_release_prove_it(
    good: Slots, images: Path, tmp_path: Path
) -> None:
    slot = tmp_path / "slot"
    shutil.copytree(good[0], slot)
    shutil.copytree(images, slot / "validation")
    verdict = ask((slot, good[1]), settings(write_color_folder(tmp_path / "one", count=1)), tmp_path)
    assert (verdict.outcome, verdict.evidence) == ("passed", ("own labels", "shipped labels"))


def test_the_devices_own_limits_make_signed_ones_stricter_and_never_looser() -> None:
    signed = Limits(max_class_drop_pct=5.0, min_agreement_pct=90.0, max_bad_images=3)
    strict = {"max_class_drop_pct": 1.0, "min_agreement_pct": 95.0, "max_latency_p95_ms": 40.0, "max_bad_images": 1}
    assert tighten(signed, strict, {}) == Limits(
        max_class_drop_pct=1.0, min_agreement_pct=95.0, max_latency_p95_ms=40.0, max_bad_images=1
    )
    loose = {"max_class_drop_pct": 50.0, "min_agreement_pct": 10.0, "max_bad_images": 9, "min_new_miou_pct": None}
    assert tighten(signed, loose, {}) == signed
    defaults = {"max_old_miou_drop_pct": 2.0, "min_golden_agreement": 0.999}
    looser = tighten(Limits(), {"max_old_miou_drop_pct": 30.0, "min_golden_agreement": 0.5}, defaults)
    assert (looser.max_old_miou_drop_pct, looser.min_golden_agreement) == (2.0, 0.999)


def test_only_what_is_stricter_tightens() -> None:
    assert set_limits(OwnLimits()) == {}
    assert set_limits(OwnLimits(max_bad_images=0, min_images=20)) == {"max_bad_images": 0, "min_images": 20}
    held = {"max_rss_mib": 5.0, "min_images": 4}
    assert tightening({"max_rss_mib": 7.0, "min_images": 3, "max_moved_pct": 0.0}, held) == {"max_moved_pct": 0.0}
    assert tightening({"max_rss_mib": 4.0, "min_images": 4}, held) == {"max_rss_mib": 4.0, "min_images": 4}


@pytest.mark.slow
def test_own_limits_and_those_of_the_profile_hold_in_the_gate(good: Slots, images: Path, tmp_path: Path) -> None:
    own = settings(images, limits=OwnLimits(max_model_mib=1e-6))
    assert "model size" in ask(good, own, tmp_path).reason
    profile = tmp_path / "tiny.toml"
    profile.write_text(
        f'description = "tiny"\nmachine = "{os.uname().machine}"\nint8_flags = []\n[limits]\nmax_model_mib = 1e-6\n'
    )
    release = release_of(good[0], Limits(max_model_mib=1000.0))
    verdict = ask(good, settings(images, profile=str(profile)), tmp_path, release)
    assert "model size" in verdict.reason
    assert "1e-06" in verdict.reason


@pytest.mark.slow
def test_limits_in_the_bundle_hold_in_the_gate_whatever_is_signed_beside_them(
    good: Slots, images: Path, tmp_path: Path
) -> None:
    slot = tmp_path / "slot"
    shutil.copytree(good[0], slot)
    manifest = read_manifest(slot / "bundle")
    write_manifest(slot / "bundle", msgspec.structs.replace(manifest, limits=OwnLimits(max_model_mib=1e-6)))
    verdict = ask((slot, good[1]), settings(images), tmp_path, release_of(slot, Limits(max_model_mib=1000.0)))
    assert verdict.outcome == "refused"
    assert "model size" in verdict.reason
    assert "1e-06" in verdict.reason
    more = OwnLimits(min_images=ENOUGH + 1, max_bad_images=0)
    write_manifest(slot / "bundle", msgspec.structs.replace(manifest, limits=more))
    verdict = ask((slot, good[1]), settings(images), tmp_path, release_of(slot, Limits(min_images=2, max_bad_images=9)))
    assert verdict.outcome == "too few images"


@pytest.mark.slow
def test_limits_in_the_bundle_loosen_nothing_in_the_gate(forgetful: Slots, images: Path, tmp_path: Path) -> None:
    """Neither the default for labels nor those for frames, and none that is signed."""
    slot = tmp_path / "slot"
    shutil.copytree(forgetful[0], slot)
    easy = OwnLimits(max_old_miou_drop_pct=100.0, max_class_drop_pct=100.0, min_agreement_pct=0.0, max_moved_pct=100.0)
    write_manifest(slot / "bundle", msgspec.structs.replace(read_manifest(slot / "bundle"), limits=easy))
    slots = slot, forgetful[1]
    assert ask(slots, settings(images), tmp_path).outcome == "refused"
    assert ask(slots, settings(images=str(images / "images")), tmp_path).outcome == "refused"


def test_a_model_that_the_profile_does_not_take_is_not_run_in_the_gate(
    good: Slots, images: Path, tmp_path: Path
) -> None:
    profile = tmp_path / "small.toml"
    profile.write_text(
        f'description = "small"\nmachine = "{os.uname().machine}"\nint8_flags = []\n'
        "[input_size]\nwidth_px = 1\nheight_px = 1\n"
    )
    verdict = ask(good, settings(images, profile=str(profile)), tmp_path)
    assert (verdict.outcome, verdict.is_taken) == ("cannot be judged", False)
    assert "the bundle's input is larger than the device profile" in verdict.reason


@pytest.mark.slow
def test_what_a_profile_says_is_held_in_the_gate_also_where_it_is_the_default(good: Slots, tmp_path: Path) -> None:
    profile = tmp_path / "strict.toml"
    profile.write_text(
        f'description = "strict"\nmachine = "{os.uname().machine}"\nint8_flags = []\n[limits]\nmin_images = 20\n'
    )
    ten = write_color_folder(tmp_path / "ten", count=10)
    release = release_of(good[0], Limits(min_images=5))
    assert ask(good, settings(ten), tmp_path, release).outcome == "passed"
    assert ask(good, settings(ten, profile=str(profile)), tmp_path, release).outcome == "too few images"


@pytest.mark.slow
def test_a_profile_that_says_nothing_of_bad_images_forbids_none(good: Slots, images: Path, tmp_path: Path) -> None:
    profile = tmp_path / "plain.toml"
    profile.write_text(f'description = "plain"\nmachine = "{os.uname().machine}"\nint8_flags = []\n')
    own = tmp_path / "own"
    shutil.copytree(images, own)
    (own / "images/003.png").write_bytes(b"no image")
    release = release_of(good[0], Limits(max_bad_images=1))
    verdict = ask(good, settings(own, profile=str(profile)), tmp_path, release)
    assert (verdict.outcome, verdict.images) == ("passed", ENOUGH - 1)


@pytest.mark.slow
def test_a_signed_limit_that_cannot_be_measured_here_is_left_out(good: Slots, images: Path, tmp_path: Path) -> None:
    limits = Limits(min_agreement_pct=99.0, max_moved_pct=1.0, min_new_miou_pct=50.0, max_class_drop_pct=5.0)
    assert ask(good, settings(images), tmp_path, release_of(good[0], limits)).outcome == "passed"
    old_only = write_color_folder(tmp_path / "old", tuple(BASE))
    assert ask(good, settings(old_only), tmp_path, release_of(good[0], limits)).outcome == "passed"
    frames = settings(images=str(images / "images"))
    assert ask(good, frames, tmp_path, release_of(good[0], limits)).outcome == "passed"


@pytest.mark.slow
@BOTH
def test_a_model_that_gives_no_numbers_is_refused(runtime: Runtime, images: Path, tmp_path: Path) -> None:
    slots = family_slots(tmp_path, network=nan_network(), models=((runtime, "fp32"),))
    verdict = run(slots, settings(images), tmp_path)
    assert verdict.outcome == "refused"
    assert "golden outputs" in verdict.reason
    assert verdict.golden_agreement is not None
    assert verdict.golden_agreement < 0.9


@pytest.mark.slow
@BOTH
def test_a_slow_model_is_refused_where_the_active_one_keeps_the_limit(runtime: Runtime, tmp_path: Path) -> None:
    slots = family_slots(tmp_path, network=looping_network(4_000), models=((runtime, "fp32"),))
    quick = settings(write_color_folder(tmp_path / "few", count=2), accept_too_few=True)
    free = run(slots, quick, tmp_path)
    assert (free.outcome, free.is_taken) == ("too few images", True), free
    assert free.latency_p95_ms is not None
    verdict = run(slots, quick, tmp_path, Limits(max_latency_p95_ms=free.latency_p95_ms / 4))
    assert verdict.outcome == "refused", verdict
    assert verdict.reason.startswith("latency p95 ")


def test_a_limit_that_the_active_model_breaks_too_tells_of_the_device(
    good: Slots, images: Path, tmp_path: Path
) -> None:
    verdict = ask(good, settings(images), tmp_path, release_of(good[0], Limits(max_latency_p95_ms=1e-6)))
    assert (verdict.outcome, verdict.is_taken, verdict.is_final) == ("cannot be judged", False, False)
    assert "the device is busy" in verdict.reason


@pytest.mark.slow
@BOTH
def test_a_model_that_hangs_is_killed_with_everything_that_it_started(
    runtime: Runtime, images: Path, tmp_path: Path
) -> None:
    slots = family_slots(tmp_path, network=looping_network(ENDLESS), models=((runtime, "fp32"),))
    verdict = run(slots, settings(images, timeout_s=6), tmp_path)
    assert (verdict.outcome, verdict.is_taken, verdict.is_final) == ("crashed", False, False)
    assert verdict.reason == "it took longer than 6 s, and was killed"
    assert gate_processes(tmp_path / "work") == frozenset()
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.slow
def test_a_runtime_that_is_killed_by_a_signal_is_a_crash_that_names_it(images: Path, tmp_path: Path) -> None:
    """No model is known that takes one of the runtimes down; the signal is the one that such a model would raise."""
    slots = family_slots(tmp_path, network=looping_network(ENDLESS))

    def shoot() -> None:
        while not (found := gate_processes(tmp_path / "work")):
            time.sleep(0.02)
        os.kill(min(found), signal.SIGSEGV)

    shooter = threading.Thread(target=shoot)
    shooter.start()
    verdict = run(slots, settings(images, timeout_s=60), tmp_path)
    shooter.join()
    assert verdict.outcome == "crashed"
    assert verdict.reason.startswith("the process ended with signal SIGSEGV")


@pytest.mark.slow
@BOTH
def test_a_model_that_eats_memory_is_killed_when_somebody_looks(runtime: Runtime, images: Path, tmp_path: Path) -> None:
    """What it touches is within what the kernel grants, and beyond what the owner does."""
    slots = family_slots(tmp_path, network=hungry_network(100), models=((runtime, "fp32"),))
    verdict = run(slots, settings(images, memory_mib=180), tmp_path)
    assert (verdict.outcome, verdict.is_taken) == ("crashed", False)
    assert verdict.reason.startswith("it took more than 180 MiB of memory (")


@pytest.mark.slow
@BOTH
def test_a_model_that_asks_for_much_at_once_gets_nothing(runtime: Runtime, images: Path, tmp_path: Path) -> None:
    """The machine has it, and the kernel refuses it before anybody could look."""
    slots = family_slots(tmp_path, network=hungry_network(3 << 10), models=((runtime, "fp32"),))
    verdict = run(slots, settings(images, memory_mib=300), tmp_path)
    assert (verdict.outcome, verdict.is_taken) == ("crashed", False)
    assert verdict.reason.startswith("it ran out of the memory that it may take")


@pytest.mark.slow
@BOTH
def test_the_kernel_lets_both_runtimes_reserve_what_they_never_touch(
    runtime: Runtime, images: Path, tmp_path: Path
) -> None:
    """Stacks of many threads count for the kernel, and not for the owner (rule 4 of `confined`)."""
    slots = family_slots(tmp_path, models=((runtime, "fp32"),))
    free = run(slots, settings(images, threads=24, timeout_s=120), tmp_path)
    assert free.peak_rss_mib is not None
    touched_mib = 3 * int(free.peak_rss_mib)  # two processes and some images
    held = run(slots, settings(images, threads=24, timeout_s=120, memory_mib=touched_mib), tmp_path)
    assert held.outcome == "passed", held


def test_the_child_is_held_to_its_limits_by_the_kernel() -> None:
    program = """
        import os, resource
        from pathlib import Path
        from edge_ilseg.devices.update.confined import confine
        confine(parent_pid=os.getppid(), cpu_s=77, data_mib=900, file_mib=3, nice=5)
        kinds = ("RLIMIT_CORE", "RLIMIT_CPU", "RLIMIT_DATA", "RLIMIT_FSIZE")
        print(*(resource.getrlimit(getattr(resource, kind)) for kind in kinds), os.nice(0), sep="|")
        print(Path("/proc/self/oom_score_adj").read_text().strip())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    limits, score = done.stdout.splitlines()
    assert limits == f"(0, 0)|(77, 77)|({900 << 20}, {900 << 20})|({3 << 20}, {3 << 20})|{min(19, os.nice(0) + 5)}"
    assert score == "1000"


@pytest.mark.slow
def test_a_child_is_killed_with_everything_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "restless.py").write_text(
        "import subprocess, sys, time\n"
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open('other', 'w').write(str(other.pid))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ended = run_confined("restless", b"", tmp_path, timeout_s=3, memory_mib=1000)
    assert ended.problem == "it took longer than 3 s, and was killed"
    other = Path("/proc", (tmp_path / "other").read_text())
    end_s = time.monotonic() + 20
    while other.exists() and b" Z " not in (other / "stat").read_bytes():  # it may wait for whoever adopted it
        assert time.monotonic() < end_s
        time.sleep(0.02)


def test_a_corrupt_model_with_the_right_hash_is_refused(good: Slots, images: Path, tmp_path: Path) -> None:
    slot = tmp_path / "slot"
    shutil.copytree(good[0], slot)
    path = slot / "bundle/fp32.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 2] = os.urandom(len(data) // 2 - len(data) // 3)
    path.write_bytes(data)
    write_manifest(slot / "bundle", read_manifest(slot / "bundle"))
    verdict = ask((slot, good[1]), settings(images), tmp_path)
    assert verdict.outcome == "refused"
    assert "fit" in verdict.reason
    assert "refuses the model file" in verdict.reason


def test_a_damaged_slot_is_refused_and_a_damaged_active_model_is_no_fault_of_the_release(
    good: Slots, images: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(good[0], broken)
    flip_one_bit(broken / "bundle/golden/images.npy")
    verdict = ask((broken, good[1]), settings(images), tmp_path, release_of(good[0]))
    assert verdict.outcome == "refused"
    assert "damaged" in verdict.reason
    rotten = tmp_path / "rotten"
    shutil.copytree(good[1], rotten)
    flip_one_bit(rotten / "bundle/fp32.onnx")
    verdict = ask((good[0], rotten), settings(images, allow_unjudged=True), tmp_path)
    assert (verdict.outcome, verdict.is_taken) == ("cannot be judged", False)


@pytest.mark.slow
def test_an_active_model_that_computes_wrongly_is_no_measure(images: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "parent", BASE, step_id="a" * 64, wrong_golden_share=0.5)
    write_bundle(tmp_path / "child", GROWN, step_id="b" * 64, parent_id="a" * 64)
    slots = (make_slot(tmp_path / "child"), make_slot(tmp_path / "parent"))
    verdict = ask(slots, settings(images), tmp_path)
    assert verdict.outcome == "cannot be judged"
    assert verdict.reason.startswith("parent's golden outputs")


def test_a_bundle_that_the_release_does_not_name_is_refused(good: Slots, images: Path, tmp_path: Path) -> None:
    verdict = ask(good, settings(images), tmp_path, release_of(good[0], bundle_id="0" * 64))
    assert verdict.outcome == "refused"
    assert "another bundle than the release names" in verdict.reason


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"data": "folder:/nowhere"}, "does not exist"),
        ({"data": "holes:/x"}, "data set cannot be read"),
        ({"images": "/nowhere"}, "folder of images is missing"),
        ({"profile": "no-such"}, "no such device profile"),
    ],
)
def test_a_wrong_setting_of_the_device_is_no_verdict_on_the_release(
    given: dict[str, str], words: str, good: Slots, tmp_path: Path
) -> None:
    verdict = ask(good, settings(**given, allow_unjudged=True), tmp_path)
    assert (verdict.outcome, verdict.is_taken) == ("cannot be judged", False)
    assert words in verdict.reason


@pytest.mark.slow
def test_a_damaged_image_of_the_device_is_no_fault_of_the_release(good: Slots, images: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(images, own)
    (own / "images/003.png").write_bytes(b"no image")
    verdict = ask(good, settings(own), tmp_path)
    assert verdict.outcome == "cannot be judged"
    assert "003" in verdict.reason


def test_a_model_that_this_device_cannot_run_is_refused(good: Slots, images: Path, tmp_path: Path) -> None:
    verdict = ask(good, settings(images, precision="int8"), tmp_path)
    assert verdict.outcome == "refused"
    assert "onnxruntime in int8" in verdict.reason


def test_an_active_model_for_another_runtime_alone_cannot_be_a_measure(
    good: Slots, images: Path, tmp_path: Path
) -> None:
    write_bundle(tmp_path / "other", BASE, step_id="a" * 64, models=(("openvino", "fp32"),))
    verdict = ask((good[0], make_slot(tmp_path / "other")), settings(images), tmp_path)
    assert verdict.outcome == "cannot be judged"
    assert "no model for onnxruntime" in verdict.reason


@pytest.mark.slow
def test_going_to_another_precision_is_judged_by_what_the_device_would_lose(images: Path, tmp_path: Path) -> None:
    int8 = (("onnxruntime", "int8"),)
    for forget, outcome in ((None, "passed"), ("apple", "refused")):
        folder = tmp_path / str(forget)
        write_bundle(folder / "child", GROWN, step_id="b", parent_id="a", forget=forget, models=int8)  # type: ignore[arg-type]
        write_bundle(folder / "parent", BASE, step_id="a")
        slots = make_slot(folder / "child"), make_slot(folder / "parent")
        verdict = ask(slots, settings(images), tmp_path)
        assert (verdict.outcome, verdict.precision) == (outcome, "int8")


@pytest.mark.slow
@pytest.mark.parametrize("forget", [None, "boat"])
def test_a_device_that_slept_through_a_step_judges_by_what_it_knows(
    forget: str | None, images: Path, tmp_path: Path
) -> None:
    """The active model knows background, apple and grass; boat came in the step that it missed, tree is not shown."""
    write_bundle(tmp_path / "active", BASE, step_id="a" * 64)
    steps = {"background": 0, "apple": 0, "boat": 1, "grass": 2}
    write_bundle(tmp_path / "active2", {"background": 0, "apple": 0}, step_id="a" * 64)
    write_bundle(tmp_path / "new", steps, step_id="c" * 64, parent_id="b" * 64, forget=forget)
    slots = make_slot(tmp_path / "new"), make_slot(tmp_path / "active2")
    verdict = ask(slots, settings(images), tmp_path, release_of(slots[0], Limits(min_new_miou_pct=90.0)))
    assert verdict.old_miou_drop_pct is not None  # compared, though the active model is not its parent
    if forget is None:
        assert (verdict.outcome, verdict.new_miou_pct) == ("passed", 100.0)
    else:  # new to this device, and learned too little
        assert verdict.outcome == "refused"
        assert "new mIoU" in verdict.reason


@pytest.mark.slow
@pytest.mark.parametrize("forget", [None, "boat", "apple"])
def test_a_step_that_was_trained_anew_must_keep_every_class(forget: str | None, images: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "active", GROWN, step_id="b" * 64, parent_id="a" * 64)
    write_bundle(tmp_path / "new", GROWN, step_id="c" * 64, parent_id="a" * 64, forget=forget)
    verdict = ask((make_slot(tmp_path / "new"), make_slot(tmp_path / "active")), settings(images), tmp_path)
    assert verdict.outcome == ("passed" if forget is None else "refused")
    assert forget is None or verdict.forgotten[0] == forget


@pytest.mark.slow
@pytest.mark.parametrize("forget", [None, "grass"])
def test_a_device_that_is_sent_back_keeps_what_the_older_model_should_know(
    forget: str | None, images: Path, tmp_path: Path
) -> None:
    """Boats are given up on purpose; grass is not."""
    write_bundle(tmp_path / "active", GROWN, step_id="b" * 64, parent_id="a" * 64)
    write_bundle(tmp_path / "new", BASE, step_id="a" * 64, forget=forget)
    slots = make_slot(tmp_path / "new"), make_slot(tmp_path / "active")
    limits = Limits(max_class_drop_pct=10.0, max_moved_pct=1.0)
    given = settings(images, images=str(images / "images"))
    verdict = ask(slots, given, tmp_path, release_of(slots[0], limits))
    if forget is None:
        assert (verdict.outcome, verdict.old_miou_drop_pct) == ("passed", 0.0)
        assert verdict.evidence == ("own labels", "frames")
    else:
        assert verdict.outcome == "refused"
        assert verdict.reason.startswith("it forgot grass 100.0 -> 0.0 %")
        assert verdict.old_miou_before_pct == 100.0
        assert verdict.old_miou_after_pct is not None
        assert verdict.old_miou_after_pct < 70
        assert verdict.old_miou_drop_pct == pytest.approx(100 - verdict.old_miou_after_pct)
        assert [item.name for item in verdict.falls] == ["grass", "background"]


def test_classes_in_another_order_cannot_be_compared(good: Slots, images: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "other", {"background": 0, "grass": 0, "apple": 0}, step_id="a" * 64)
    verdict = ask((good[0], make_slot(tmp_path / "other")), settings(images), tmp_path)
    assert verdict.outcome == "cannot be judged"
    assert "not the same ones in the same order" in verdict.reason


def test_a_bundle_made_from_the_active_one_is_compared_as_it_is(good: Slots) -> None:
    child, parent = (read_manifest(slot / "bundle") for slot in good)
    pair = pair_up(child, parent, "onnxruntime", "fp32")
    assert (pair.later, pair.earlier, pair.is_back) == (child, parent, False)
    with pytest.raises(BundleError, match="no such model"):
        pair_up(child, parent, "openvino", "fp32")


def test_an_encoder_that_a_step_between_may_have_trained_is_not_held_against_it(good: Slots) -> None:
    child, parent = (read_manifest(slot / "bundle") for slot in good)
    frozen = msgspec.structs.replace(child.step, encoder_frozen=True, parent_id="f" * 64, encoder_sha256="1" * 64)
    later = pair_up(msgspec.structs.replace(child, step=frozen), parent, "onnxruntime", "fp32").later
    assert (later.step.encoder_frozen, later.step.parent_id) == (False, parent.step.id)
    same = msgspec.structs.replace(frozen, encoder_sha256=parent.step.encoder_sha256)
    assert pair_up(msgspec.structs.replace(child, step=same), parent, "onnxruntime", "fp32").later.step.encoder_frozen


def test_a_runtime_that_is_refused_memory_has_crashed(good: Slots) -> None:
    report = verify_bundle(good[0] / "bundle", VerifyRequest(**FAST))
    check = msgspec.structs.replace(
        report.check("golden outputs"),
        verdict="failed",
        detail="found std::bad_alloc",
        value=None,
        limit=None,
        exit_code=3,
    )
    checks = tuple(check if item.name == check.name else item for item in report.checks)
    starved = msgspec.structs.replace(report, checks=checks)
    verdict = decide([Run(starved, None, "alone", "background")], settings(), is_busy=False)
    assert verdict.outcome == "crashed"


@pytest.mark.slow
def test_a_gate_whose_agent_is_killed_ends_with_it(tmp_path: Path) -> None:
    slots = family_slots(tmp_path, network=looping_network(ENDLESS))
    program = f"""
        import sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        from pathlib import Path
        from hostile_models import release_of
        from edge_ilseg.devices.update.gate import GateSettings, run_gate
        new, active = Path({str(slots[0])!r}), Path({str(slots[1])!r})
        run_gate(new, active, release_of(new), GateSettings(threads=1), work=Path({str(tmp_path / "work")!r}))
    """
    agent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)])
    while not gate_processes(tmp_path / "work"):
        assert agent.poll() is None
        time.sleep(0.02)
    agent.kill()
    agent.wait()
    end_s = time.monotonic() + 20
    while gate_processes(tmp_path / "work"):
        assert time.monotonic() < end_s
        time.sleep(0.02)
    verdict = run_gate(slots[0], slots[1], release_of(slots[0], bundle_id="0" * 64), settings(), work=tmp_path / "work")
    assert verdict.outcome == "refused"
    assert list((tmp_path / "work").iterdir()) == []  # what the killed one has left is gone, too


def test_a_process_that_leaves_no_verdict_has_crashed(good: Slots, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UpdateError, match="no place to work"):
        run_gate(good[0], good[1], release_of(good[0]), settings(), work=tmp_path / "file")
    assert Ended(1, None, None, "MemoryError").problem == "the process ended with exit status 1: MemoryError"
    assert Ended(-9, None, None, "").problem == "the process ended with signal SIGKILL"
    assert Ended(0, None, 12.0, "a warning").problem is None


@pytest.mark.slow
def test_places_of_the_settings_are_those_of_the_agent(
    good: Slots, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child works elsewhere."""
    monkeypatch.chdir(images.parent)
    given = GateSettings(**FAST, data=f"folder:{images.name}", images=f"{images.name}/images")
    verdict = run_gate(*good, release_of(good[0]), given, work=Path(os.path.relpath(tmp_path / "work")))
    assert (verdict.outcome, verdict.evidence) == ("passed", ("own labels", "frames")), verdict
    generated = run_gate(*good, release_of(good[0]), GateSettings(**FAST, data="shapes:"), work=tmp_path / "work")
    assert "reads no folder" not in generated.reason


def test_the_child_gets_no_proxy_and_no_token() -> None:
    given = {
        "PATH": "/bin",
        "HOME": "/home/pi",
        "HTTPS_PROXY": "http://x",
        "EDGE_ILSEG_KEY_TARGETS": "secret",
        "A": "b",
    }
    assert set(clean_environment(given, Path("/w"))) == {"PATH", "HOME", "TMPDIR", "PYTHONDONTWRITEBYTECODE"}


def test_memory_is_that_of_the_whole_group(tmp_path: Path) -> None:
    own = group_rss_mib(os.getpgid(0))
    assert own is not None
    assert own > 10
    eater = subprocess.Popen(
        [sys.executable, "-c", "import time; held = bytearray(b'x') * (64 << 20); print(flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    with eater:
        assert eater.stdout is not None
        eater.stdout.readline()
        found = group_rss_mib(eater.pid)
        eater.kill()
    assert found is not None
    assert 64 < found < 100
    assert group_rss_mib(os.getpgid(0), proc=tmp_path / "none") is None
    assert group_rss_mib(os.getpgid(0), proc=tmp_path) is None


def test_the_agents_part_of_the_gate_loads_neither_numpy_nor_a_runtime() -> None:
    program = (
        "import sys, edge_ilseg.devices.update.gate\n"
        "print(*sorted({'numpy', 'onnxruntime', 'openvino', 'PIL', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


def flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def gate_processes(work: Path) -> frozenset[int]:
    """Processes of the gates that work in this folder; other tests run gates at the same time."""
    return frozenset(_gate_processes(str(work.resolve())))


def _gate_processes(work: str) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(folder / "cwd").startswith(f"{work}/"):
                yield int(folder.name)
        except OSError:
            continue
