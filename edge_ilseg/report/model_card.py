"""The model card of a bundle: Markdown with the YAML header that model hubs read, from the manifest alone.

1. Everything in a card stands in the manifest, or follows from it; what does not is said to be unknown. Nobody's
   licence, author or data set is made up.
2. Names go through `edge_ilseg.report.markdown`: a class may be named anything.
3. Scores are shares 0..1 in the header and per cent in the text; a score that is not there is a dash, or left out.
4. The same manifest gives the same bytes.

The header: https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

from collections.abc import Iterator

from edge_ilseg.bundle import Manifest, ModelEntry, Runtime
from edge_ilseg.int8_notes import unmeasured
from edge_ilseg.metrics import Metrics
from edge_ilseg.report.markdown import Yaml, table, text, yaml_lines
from edge_ilseg.report.page import DASH, percent, points, short_id, size

UNKNOWN_LICENSE = "unknown"
LIBRARY = "edge-ilseg"
TASK = "image-segmentation"
WEAK_IOU = 0.3
"""A class below it is named among the limits."""
MOST_NAMES = 12
"""In one sentence."""
TAGS = ("semantic-segmentation", "class-incremental-learning", "edge")
FORMATS: dict[Runtime, str] = {"onnxruntime": "onnx", "openvino": "openvino"}


def model_card(manifest: Manifest, *, license_id: str = UNKNOWN_LICENSE) -> str:
    """The card of a bundle.

    Args:
        manifest: of the bundle.
        license_id: of the model's weights, as the hub names it, such as `apache-2.0`; a bundle does not record it.
    """
    lines = ["---", *yaml_lines(header(manifest, license_id)), "---", "", f"# {text(manifest.step.name)}"]
    for section in (_summary, _use, _classes, _scores, _class_scores, _int8, _size, _limits, _provenance):
        lines += section(manifest)
    body = "\n".join(lines)
    while "\n\n\n" in body:
        body = body.replace("\n\n\n", "\n\n")
    return body.rstrip("\n") + "\n"


def header(manifest: Manifest, license_id: str) -> dict[str, Yaml]:
    """The YAML header; `model-index` only where there are scores, because one without results is refused."""
    formats = dict.fromkeys(FORMATS[entry.runtime] for entry in manifest.models)
    precisions = dict.fromkeys(entry.precision for entry in manifest.models)
    found: dict[str, Yaml] = {
        "license": license_id,
        "library_name": LIBRARY,
        "pipeline_tag": TASK,
        "tags": [*TAGS, *formats, *precisions],
        "metrics": ["mean_iou", "accuracy"],
    }
    results = [_result(manifest, entry, entry.expected) for entry in manifest.models if entry.expected is not None]
    results = [result for result in results if result["metrics"]]
    if results and manifest.expected_data:
        found["model-index"] = [{"name": manifest.step.name, "results": results}]
    return found


def _result(manifest: Manifest, entry: ModelEntry, scores: Metrics) -> dict[str, Yaml]:
    kind, _, split = (manifest.expected_data or "").partition(":")
    form = f"{entry.runtime} {entry.precision}"
    values = (
        ("mean_iou", f"mIoU all classes, {form}", scores.miou_all),
        ("mean_iou", f"mIoU old classes, {form}", scores.miou_old),
        ("mean_iou", f"mIoU new classes, {form}", scores.miou_new if manifest.step.index else None),
        ("accuracy", f"pixel accuracy, {form}", scores.mpa),
    )
    metrics: list[Yaml] = [
        {"type": metric, "name": name, "value": round(value, 4)} for metric, name, value in values if value is not None
    ]
    dataset: dict[str, Yaml] = {"type": kind, "name": kind, **({"split": split} if split else {})}
    return {"task": {"type": TASK, "name": "semantic segmentation"}, "dataset": dataset, "metrics": metrics}


def _summary(manifest: Manifest) -> Iterator[str]:
    step, image = manifest.step, manifest.preprocessing
    new = [text(entry.name) for entry in manifest.classes if entry.step == step.index]
    yield ""
    if step.index:
        yield (
            f"A semantic segmentation model that was taught {_list(new)} as step {step.index}, without the images of "
            f"earlier steps, on top of {manifest.old_count} classes that it knew."
        )
    else:
        yield f"A semantic segmentation model of {len(new)} classes: the base of later steps."
    forms = ", ".join(f"{entry.runtime} {entry.precision}" for entry in manifest.models) or "none"
    rows = [
        ("bundle", f"`{manifest.bundle_id}`"),
        ("made", text(manifest.created)),
        ("step", f"{step.index}: {text(step.name)}, {text(short_id(step.id))}"),
        ("parent step", text(short_id(step.parent_id)) if step.parent_id else "none: this is step 0"),
        ("method", text(step.method) + ("; the encoder was frozen" if step.encoder_frozen else "")),
        ("input", f"RGB, uint8, resized to {image.width_px} x {image.height_px} px (width x height), stretched"),
        ("output", "one class for each pixel"),
        ("models", forms),
    ]
    yield from table(("property", "value"), rows, left=2)


def _use(manifest: Manifest) -> Iterator[str]:
    yield "## Intended use"
    yield ""
    yield (
        "To find the classes below in images of the kind that it learned from, on a device. Whoever uses it judges it "
        "on the device first, with labelled images of the place where it will run:"
    )
    against = " --against PARENT" if manifest.step.index else ""
    yield from ("", "```", f"edge-ilseg verify BUNDLE --data folder:VALIDATION{against}")
    yield from ("edge-ilseg predict BUNDLE PHOTOS --out seen", "```", "")
    yield (
        "Not for: classes that are not in the list (every pixel gets one of these all the same), decisions that "
        "endanger people without another safeguard, or recognising persons."
    )
    yield ""


def _classes(manifest: Manifest) -> Iterator[str]:
    yield "## Classes"
    rows = [
        (
            text(entry.name) + (" (background)" if entry.name == manifest.background else ""),
            str(channel),
            f"{entry.step}" + (" (new)" if manifest.step.index and entry.step == manifest.step.index else ""),
        )
        for channel, entry in enumerate(manifest.classes)
    ]
    yield from table(("class", "channel", "learned in step"), rows)


def _scores(manifest: Manifest) -> Iterator[str]:
    yield "## Results"
    yield ""
    scored = [(entry, entry.expected) for entry in manifest.models if entry.expected is not None]
    if not scored:
        yield "The models of this bundle were not scored when it was made."
        yield ""
        return
    images = {scores.images for _, scores in scored}
    yield (
        f"Each model file itself, on {text(manifest.expected_data or 'unknown')} "
        f"({' or '.join(map(str, sorted(images)))} images), by the machine that made the bundle; per cent."
    )
    rows = [(f"{entry.runtime} {entry.precision}", *map(percent, _means(manifest, scores))) for entry, scores in scored]
    yield from table(("model", "mIoU old", "mIoU new", "mIoU all", "pixel accuracy"), rows)


def _class_scores(manifest: Manifest) -> Iterator[str]:
    """IoU of each class: fp32, int8, and what int8 costs, in a runtime that has both; else of the first model."""
    by_form = {(entry.runtime, entry.precision): entry.expected for entry in manifest.models if entry.expected}
    for runtime in FORMATS:
        exact, small = by_form.get((runtime, "fp32")), by_form.get((runtime, "int8"))
        if exact is None or small is None:
            continue
        yield f"IoU of each class in {runtime}, and what int8 costs:"
        rows = []
        for name in manifest.class_names:
            before, after = exact.iou.get(name), small.iou.get(name)
            cost = None if before is None or after is None else 100 * (after - before)
            rows.append((text(name), percent(before), percent(after), _points(cost)))
        yield from table(("class", "fp32", "int8", "points"), rows)
        return
    for (runtime, precision), scores in by_form.items():
        yield f"IoU of each class, {runtime} {precision}:"
        rows = [(text(name), percent(scores.iou.get(name))) for name in manifest.class_names]  # type: ignore[misc]
        yield from table(("class", "IoU"), rows)
        return


def _int8(manifest: Manifest) -> Iterator[str]:
    record = manifest.int8
    if record is None:
        return
    yield "## int8"
    yield ""
    counts = {len(entry.calibration.image_ids) for entry in manifest.models if entry.calibration is not None}
    bits = {entry.calibration.reduce_range for entry in manifest.models if entry.calibration is not None}
    fitted = any(entry.calibration.rounding == "fitted" for entry in manifest.models if entry.calibration is not None)
    asked = f" (asked for: `{record.asked}`)" if record.taken != record.asked else ""
    images = " or ".join(map(str, sorted(counts))) or "no"
    yield (
        f"Activation ranges: `{record.taken}`{asked}. Tensors with the parent's range: {record.carried}; with an "
        f"envelope of both: {record.merged}; measured on {images} images of this step: {record.measured}. "
        f"Weights have {'7 bits, depthwise ones 8' if True in bits else '8 bits'}"
        f"{', fitted to what each layer reads' if fitted else ''}."
    )
    for sentence in unmeasured(manifest, record):
        yield ""
        yield sentence[:1].upper() + sentence[1:] + "."
    rows = []
    for attempt in record.attempts:
        for row in attempt.rows:
            cells = (attempt.attempt, attempt.verdict, row.runtime, row.images, str(row.count))
            drops = (_points(-row.drop_points), f"{text(row.worst_class)} {_points(-row.worst_class_drop_points)}")
            rows.append((*cells, *drops))
    if rows:
        limit = "no limit" if record.max_old_drop_points is None else f"limit {record.max_old_drop_points:g} points"
        yield ""
        yield f"What int8 was found to cost the old classes against fp32 before the bundle was written ({limit}):"
        yield from table(("way", "verdict", "runtime", "images", "count", "mIoU, points", "worst class"), rows, left=4)
    yield ""


def _size(manifest: Manifest) -> Iterator[str]:
    yield "## Size"
    rows = []
    delta = {row.runtime: row for row in manifest.int8.delta} if manifest.int8 else {}
    for entry in manifest.models:
        total = sum(manifest.files[name].bytes for name in entry.files)
        row = delta.get(entry.runtime) if entry.precision == "int8" else None
        changed = f"{size(row.changed_bytes)} of {size(row.total_bytes)}" if row else DASH
        rows.append((f"{entry.runtime} {entry.precision}", size(total), changed))
    rows.append(("the whole bundle", size(sum(entry.bytes for entry in manifest.files.values())), DASH))
    yield from table(("model", "files", "new against the parent's"), rows)


def _limits(manifest: Manifest) -> Iterator[str]:
    yield "## Limits"
    yield ""
    scores = [entry.expected for entry in manifest.models if entry.expected is not None]
    if scores:
        yield "- The scores are of one set of images, without intervals; other places, light and cameras give others."
        values = {name: [item.iou.get(name) for item in scores] for name in manifest.class_names}
        weak = [
            name for name, found in values.items() if any(value is not None and value < WEAK_IOU for value in found)
        ]
        unseen = [name for name, found in values.items() if all(value is None for value in found)]
        if weak:
            yield f"- Hardly found (IoU below {100 * WEAK_IOU:g} in at least one model): {_list(map(text, weak))}."
        if unseen:
            yield f"- Without a pixel in the images, so nothing is known of it: {_list(map(text, unseen))}."
    else:
        yield "- How well the model finds its classes is not in this bundle."
    if manifest.step.index:
        yield "- What it has forgotten against its parent is not in this bundle: `verify --against` measures it."
    if any(entry.precision == "int8" for entry in manifest.models):
        silent = len(manifest.int8.silent_channels) if manifest.int8 else 0
        yield "- int8 differs between processors: the golden outputs of the bundle tell by how much on yours." + (
            f" {silent} tensors have channels that were silent on the images of this step." if silent else ""
        )
    yield "- Latency and memory are those of your device: `edge-ilseg bench BUNDLE`."
    yield "- Whether it treats groups of people alike was not examined."
    yield ""


def _provenance(manifest: Manifest) -> Iterator[str]:
    yield "## Provenance"
    calibration = next((entry.calibration for entry in manifest.models if entry.calibration is not None), None)
    rows = [("encoder", text(manifest.step.encoder_sha256))]
    if calibration is not None:
        rows.append(("images that int8 was calibrated on", text(calibration.images_sha256)))
    rows += [(text(name), text(version)) for name, version in sorted(manifest.versions.items())]
    yield from table(("property", "value"), rows, left=2)
    yield (
        "The bundle holds no image that anybody took. Its licence, its authors and the origin of the images are not "
        "recorded in it: add them here."
    )


def _means(manifest: Manifest, scores: Metrics) -> tuple[float | None, ...]:
    """Old, new, all, pixel accuracy; at step 0 every class is new by count, and none is in words."""
    return (scores.miou_old, scores.miou_new if manifest.step.index else None, scores.miou_all, scores.mpa)


def _points(value: float | None) -> str:
    """As in the reports, without a zero that has a sign."""
    return points(None if value is None else round(value, 1) + 0.0)


def _list(items: Iterator[str] | list[str] | map[str]) -> str:
    *first, last = [*items] or ["no class"]
    if len(first) >= MOST_NAMES:
        return f"{', '.join(first[:MOST_NAMES])} and {len(first) + 1 - MOST_NAMES} more"
    return f"{', '.join(first)} and {last}" if first else last
