"""A model card says what stands in the manifest, to parsers of YAML and Markdown, whatever the classes are called."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from bundles import GROWN, write_bundle, write_family
from markdown_it import MarkdownIt

from edge_ilseg.bundle import ClassEntry, Manifest, read_manifest
from edge_ilseg.cli import run
from edge_ilseg.int8_record import AttemptRecord, CalibrationEntry, DeltaRow, GuardRow, Int8Record
from edge_ilseg.metrics import Metrics
from edge_ilseg.report.markdown import table, text, yaml_lines, yaml_text
from edge_ilseg.report.model_card import model_card

HOSTILE = (
    "<script>alert(1)</script>",
    "a | b || c",
    "---\nlicense: mit\n---",
    '": !!python/object/apply:os.system ["id"]',
    "`code` *strong* _em_ ~~gone~~ $x$",
    "[link](https://evil.example) ![image](x)",
    "https://evil.example www.evil.example a@evil.example",
    "\\ back \\| slash",
    "&lt; &amp;",
    "# head ##",
    "\u202e\x00\x07\x85\u2028 signs",
    "船 \u2013 Müller 🛥",
)


class Page(HTMLParser):
    """Tags and texts of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.cells: list[str] = []
        self.title = ""
        self._in = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._in = tag
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in in ("td", "th"):
            self.cells[-1] += data
        if self._in == "h1":
            self.title += data


def read_card(card: str) -> tuple[dict[str, Any], Page]:
    """Header and body, by parsers that are not ours."""
    _, header, body = card.split("---\n", 2)
    return yaml.safe_load(header), Page(MarkdownIt("gfm-like", {"linkify": False}).render(body))


def shown(name: str) -> str:
    """How a name is to be read: in one line, without signs that cannot be printed."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in name).split())


def scores(**iou: float | None) -> Metrics:
    known = [value for value in iou.values() if value is not None]
    mean = sum(known) / len(known)
    return Metrics(7, 100, dict(iou), 0.5, 0.25, mean, None, mean, 0.9, None, None)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Step 1 with fp32 and int8 for one runtime, both scored, and a record of how int8 came about."""
    folder = tmp_path_factory.mktemp("card") / "bundle"
    models = (("onnxruntime", "fp32"), ("onnxruntime", "int8"))
    plain = write_bundle(folder, GROWN, step_id="b" * 64, parent_id="a" * 64, models=models)  # type: ignore[arg-type]
    fp32, int8 = plain.models
    calibration = CalibrationEntry("minmax", "carry", ("1", "2", "3"), "c" * 64, True, "fitted", None, ())
    row = GuardRow("onnxruntime", "images at hand", 9, 0.8, 0.79, 1.25, "grass", 2.5, {"grass": (0.8, 0.775)})
    record = Int8Record(
        asked="carry",
        taken="union",
        max_old_drop_points=2.0,
        attempts=(AttemptRecord("union", (), (row,), 1.25, "taken", ""),),
        carried=5,
        merged=6,
        measured=7,
        silent_channels={"a": 2},
        worst_sqnr=(),
        sqnr_db={},
        delta=(DeltaRow("onnxruntime", 2048, 512, 0, 0, None),),
    )
    return msgspec.structs.replace(
        plain,
        expected_data="msrc:test",
        int8=record,
        models=(
            msgspec.structs.replace(fp32, expected=scores(background=0.9, apple=0.8, grass=0.7, boat=None)),
            msgspec.structs.replace(
                int8, expected=scores(background=0.9, apple=0.75, grass=0.2, boat=None), calibration=calibration
            ),
        ),
    )


def with_names(manifest: Manifest, names: tuple[str, ...]) -> Manifest:
    iou = {name: 0.1 for name in names}
    models = tuple(
        msgspec.structs.replace(entry, expected=msgspec.structs.replace(scores(a=0.5), iou=iou))
        for entry in manifest.models
    )
    classes = tuple(ClassEntry(name, place // 6, (0, 0, 0)) for place, name in enumerate(names))
    step = msgspec.structs.replace(manifest.step, name=names[0], method=names[1], id=names[2], parent_id=names[3])
    return msgspec.structs.replace(
        manifest, classes=classes, models=models, step=step, background=names[4], expected_data=f"{names[5]}:{names[6]}"
    )


def test_the_header_is_what_a_model_hub_asks_for(manifest: Manifest) -> None:
    header, _ = read_card(model_card(manifest, license_id="apache-2.0"))
    assert (header["license"], header["library_name"]) == ("apache-2.0", "edge-ilseg")
    assert header["pipeline_tag"] == "image-segmentation"
    assert {"onnx", "int8", "fp32"} <= set(header["tags"])
    assert "openvino" not in header["tags"]
    assert header["metrics"] == ["mean_iou", "accuracy"]
    (entry,) = header["model-index"]
    assert entry["name"] == "01-boat"
    first, second = entry["results"]
    assert first["task"]["type"] == "image-segmentation"
    assert first["dataset"] == {"type": "msrc", "name": "msrc", "split": "test"}
    assert {item["name"]: item["value"] for item in first["metrics"]} == {
        "mIoU all classes, onnxruntime fp32": 0.8,
        "mIoU old classes, onnxruntime fp32": 0.5,
        "mIoU new classes, onnxruntime fp32": 0.25,
        "pixel accuracy, onnxruntime fp32": 0.9,
    }
    assert "int8" in second["metrics"][0]["name"]


def test_a_licence_is_never_made_up(manifest: Manifest) -> None:
    assert read_card(model_card(manifest))[0]["license"] == "unknown"
    assert "not recorded in it" in model_card(manifest)


def test_a_bundle_without_scores_has_no_results_in_its_header(tmp_path: Path) -> None:
    _, parent = write_family(tmp_path)
    card = model_card(read_manifest(parent))
    header, page = read_card(card)
    assert "model-index" not in header
    assert "were not scored" in card
    assert "forgotten against its parent" not in card
    assert {"apple", "grass", "background (background)"} <= set(page.cells)


def test_the_body_has_classes_scores_and_what_int8_costs(manifest: Manifest) -> None:
    card = model_card(manifest)
    assert "was taught boat as step 1" in card
    assert "| boat | 3 | 1 (new) |" in card
    assert "| onnxruntime fp32 | 50.0 | 25.0 | 80.0 | 90.0 |" in card
    assert "| grass | 70.0 | 20.0 | \u221250.0 |" in card
    assert "| background | 90.0 | 90.0 | +0.0 |" in card
    assert "Activation ranges: `union` (asked for: `carry`)" in card
    assert "| union | taken | onnxruntime | images at hand | 9 | \u22121.2 | grass \u22122.5 |" in card
    assert "512 B of 2 KiB" in card
    assert "Weights have 7 bits, depthwise ones 8, fitted to what each layer reads." in card


def test_weak_and_unseen_classes_are_among_the_limits(manifest: Manifest) -> None:
    card = model_card(manifest)
    assert "Hardly found (IoU below 30 in at least one model): grass." in card
    assert "nothing is known of it: boat." in card


def test_hostile_names_are_shown_and_do_nothing(manifest: Manifest) -> None:
    header, page = read_card(model_card(with_names(manifest, HOSTILE)))
    assert header["license"] == "unknown"
    assert header["model-index"][0]["name"] == HOSTILE[0]
    dataset = header["model-index"][0]["results"][0]["dataset"]
    assert f"{dataset['type']}:{dataset['split']}" == f"{HOSTILE[5]}:{HOSTILE[6]}"
    assert page.title == shown(HOSTILE[0])
    assert not page.tags & {"script", "a", "img", "em", "strong", "s", "math"}
    for place, name in enumerate(HOSTILE):
        assert shown(name) + (" (background)" if place == 4 else "") in page.cells, name


@pytest.mark.parametrize("name", [*HOSTILE, "", "null", "yes", "1e3", "\ud800", "x" * 5000])
def test_every_text_survives_yaml(name: str) -> None:
    assert yaml.safe_load(yaml_text(name)) == name
    assert yaml.safe_load("\n".join(yaml_lines({"a": [{"b": name, "c": [1, name]}, name], "d": {"e": name}}))) == {
        "a": [{"b": name, "c": [1, name]}, name],
        "d": {"e": name},
    }


def test_an_empty_name_and_an_empty_table_are_told_apart() -> None:
    assert text("\n") == "(empty)"
    assert table(("a",), []) == []
    assert table(("a", "b"), [("1", "2")]) == ["", "| a | b |", "| --- | ---: |", "| 1 | 2 |", ""]


def test_the_same_manifest_gives_the_same_card(manifest: Manifest) -> None:
    assert model_card(manifest) == model_card(manifest)


def test_the_command_prints_or_writes_and_never_into_a_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    child, _ = write_family(tmp_path)
    assert run(["card", str(child)]) == 0
    printed = capsys.readouterr().out
    out = tmp_path / "README.md"
    assert run(["card", str(child), "--out", str(out), "--license", "mit"]) == 0
    assert out.read_text() == printed.replace('"unknown"', '"mit"', 1)
    assert run(["card", str(child), "--out", str(out)]) == 3
    assert "--replace" in capsys.readouterr().err
    assert run(["card", str(child), "--out", str(out), "--replace"]) == 0
    assert run(["card", str(child), "--out", str(child / "README.md")]) == 3
    assert "a card cannot lie in its bundle" in capsys.readouterr().err
    assert run(["card", str(tmp_path / "none")]) == 3
    assert run(["card", str(child), "--out", str(tmp_path / "none" / "x.md")]) == 3


def test_a_device_without_jinja_makes_a_card(tmp_path: Path) -> None:
    child, _ = write_family(tmp_path)
    blocked = ("jinja2", "markupsafe", "torch", "onnx", "matplotlib", "yaml", "onnxruntime", "openvino")
    program = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nfrom edge_ilseg.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program, "card", child], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("---\nlicense")
