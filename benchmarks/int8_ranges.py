"""What int8 costs old and new classes, by whose ranges: carried, united, of new images alone, none, forbidden ones.

    python benchmarks/int8_ranges.py RUN --methods freeze+kd-output,kd-output --out int8.json
    pip install -c constraints.txt nncf && python benchmarks/int8_ranges.py RUN --nncf ...

RUN is a folder that `edge-ilseg scenario run` made. For each seed and method, and each step of its chain, the same
float model is quantized in every way; each way goes on from its own ranges and weights of the step before. All are
scored in one run on the evaluation split, in both runtimes, with the real kernels of this machine and some simulated;
steps before the last in onnxruntime alone. Weights are rounded as the export does (fitted to the images that the ranges
are from, or carried), but for `carry, nearest`.

`old-images` calibrates on images of step 0, which nobody has in the field: what could be had without the privacy rule.
`nncf` is NNCF's post-training quantization with its defaults on the same new images, in OpenVINO.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import onnx
from numpy.typing import NDArray

from edge_ilseg.calibration.collect import collect_extremes, quantized_nodes
from edge_ilseg.calibration.merge import make_ranges
from edge_ilseg.calibration.moments import collect_moments
from edge_ilseg.calibration.ranges import Ranges
from edge_ilseg.calibration.sample import choose_images
from edge_ilseg.checkpoint import StepRecord, load_model
from edge_ilseg.data import open_data
from edge_ilseg.data.dataset import Dataset
from edge_ilseg.data.step_view import count_pixels, presence
from edge_ilseg.devices.facts import read_device_facts
from edge_ilseg.devices.runtime import OPENVINO_SETTINGS, import_openvino, openvino_core
from edge_ilseg.export.float_onnx import write_float_onnx
from edge_ilseg.export.openvino_ir import write_ir
from edge_ilseg.export.pieces import read_constants
from edge_ilseg.export.quantize import LAST, find_float_layers, write_int8_onnx, write_weights_only
from edge_ilseg.export.rounding import Rounding
from edge_ilseg.export.sessions import Predict, load_onnx, load_openvino
from edge_ilseg.images import resize_image, resize_mask
from edge_ilseg.int8_record import RangesMethod, RangesPolicy
from edge_ilseg.metrics import confusion_matrix, score
from edge_ilseg.scenario import evaluation_lookup
from edge_ilseg.scenario_plan import ScenarioPlan, read_plan
from edge_ilseg.scenario_run import seed_folder
from edge_ilseg.workspace import open_workspace

OLD_IMAGES, NNCF, WEIGHTS_ONLY, NEW_ONLY = "old-images", "nncf", "weights-only", "new-only"


class Way(NamedTuple):
    """One way to int8."""

    policy: RangesPolicy
    method: RangesMethod = "minmax"
    fitted: bool = True
    float_layers: tuple[str, ...] = ()
    simulated: bool = False
    """Scored in the simulated forms, too."""
    each_step: bool = False
    """Scored after each step, not after the last alone."""


WAYS = {
    "carry": Way("carry", simulated=True, each_step=True),
    "carry, mean": Way("carry", "mean-minmax", each_step=True),
    "carry, nearest": Way("carry", fitted=False),
    "carry, classifiers in float": Way("carry", float_layers=(LAST,)),
    "union": Way("union", simulated=True),
    NEW_ONLY: Way(NEW_ONLY, simulated=True, each_step=True),
    OLD_IMAGES: Way(NEW_ONLY, simulated=True),
}
TIMED_RUNS = 30
Row = dict[str, Any]


class Images:
    """The evaluation split at the input size, and calibration images, read once each."""

    def __init__(self, dataset: Dataset, split: str, height_px: int, width_px: int) -> None:
        self.dataset, self.height_px, self.width_px = dataset, height_px, width_px
        self.evaluation = [(self.read(name), dataset.read_labels(name)) for name in dataset.ids(split)]

    def read(self, image_id: str) -> NDArray[np.uint8]:
        return resize_image(self.dataset.read_image(image_id), self.height_px, self.width_px)

    def choose(self, record: StepRecord, count: int) -> tuple[str, ...]:
        """As the export chooses."""
        ids = record.data.image_ids
        shown = presence(self.dataset.info, ids, count_pixels(self.dataset, ids))
        new = [name for name in record.new_classes if name != record.background]
        return choose_images(shown, new, count, record.training.seed)


def score_masks(predict: Predict, images: Images, record: StepRecord) -> tuple[float | None, float | None]:
    """mIoU of old and of new classes on the evaluation split, per cent."""
    info = images.dataset.info
    lookup = evaluation_lookup(info.classes, info.background, record.class_names)
    count = len(record.classes)
    confusion = np.zeros((count, count), dtype=np.int64)
    for image_HWC, labels_HW in images.evaluation:
        mask_HW = resize_mask(predict(image_HWC[np.newaxis]).mask_NHW[0], *labels_HW.shape)
        confusion += confusion_matrix(lookup[labels_HW], mask_HW, count)
    scores = score(
        confusion,
        record.class_names,
        old_count=record.old_count,
        background=record.background,
        images=len(images.evaluation),
    )
    return tuple(None if value is None else 100 * value for value in (scores.miou_old, scores.miou_new))  # type: ignore[return-value]


def forms(onnx_path: Path, xml_path: Path, *, simulated: bool) -> Iterator[tuple[str, Callable[[], Predict]]]:
    """The ways to run one int8 graph."""
    for is_simulated in (False, True) if simulated else (False,):
        kind = "simulated" if is_simulated else "real"
        yield f"onnxruntime {kind}", lambda s=is_simulated: load_onnx(onnx_path, simulated=s)
        yield f"openvino {kind}", lambda s=is_simulated: load_openvino(xml_path, simulated=s)


def quantize_step(
    work: Path,
    record: StepRecord,
    images: Images,
    base_ids: Sequence[str],
    kept: dict[str, tuple[Ranges, Mapping[str, bytes]]],
    ids: tuple[str, ...],
    wanted: Sequence[str],
) -> None:
    """Quantize `work/float.onnx` in the `wanted` ways; `kept`: ranges and constants from step to step."""
    float_path = work / "float.onnx"
    model = onnx.load(float_path)
    chosen = {NEW_ONLY: ids, OLD_IMAGES: tuple(base_ids)}
    measured, moments = {}, {}
    for source in (NEW_ONLY, OLD_IMAGES) if OLD_IMAGES in wanted else (NEW_ONLY,):
        images_NHWC = [images.read(item)[np.newaxis] for item in chosen[source]]
        measured[source] = collect_extremes(
            float_path, images_NHWC, image_ids=chosen[source], images_sha256="", step=record.name
        )
        moments[source] = collect_moments(float_path, images_NHWC, quantized_nodes(model), count=len(images_NHWC))
    for way in wanted:
        item, source = WAYS[way], OLD_IMAGES if way == OLD_IMAGES else NEW_ONLY
        before, constants = kept.get(way, (None, {}))
        given = moments[source] if item.fitted else {}
        ranges = make_ranges(measured[source], item.policy, before, method=item.method)
        parents = frozenset(tensor.subgraph_sha256 for tensor in before.tensors.values()) if before else frozenset()
        write_int8_onnx(
            float_path,
            work / f"{way}.onnx",
            ranges,
            float_layers=find_float_layers(model, item.float_layers),
            rounding=Rounding(lambda _, given=given: given, constants, parents),
        )
        kept[way] = ranges, read_constants([work / f"{way}.onnx"])


def score_step(
    work: Path,
    record: StepRecord,
    images: Images,
    ids: Sequence[str],
    wanted: Sequence[str],
    *,
    is_last: bool,
    simulated: bool,
    nncf: bool,
) -> list[Row]:
    """Score what `quantize_step` made of the `wanted` ways: before the last step in onnxruntime alone."""
    float_path = work / "float.onnx"
    scores = score_masks(load_onnx(float_path), images, record)
    rows = [_row("fp32", "onnxruntime real", scores, float_path.stat().st_size)]
    if not is_last:
        for way in (way for way in wanted if way in WAYS and WAYS[way].each_step):
            path = work / f"{way}.onnx"
            scores = score_masks(load_onnx(path), images, record)
            rows.append(_row(way, "onnxruntime real", scores, path.stat().st_size))
        return rows
    if WEIGHTS_ONLY in wanted:
        write_weights_only(float_path, work / f"{WEIGHTS_ONLY}.onnx")
    for way in wanted:
        onnx_path, xml_path = work / f"{way}.onnx", work / f"{way}.xml"
        write_ir(onnx_path, xml_path, "int8", {})
        for form, load in forms(onnx_path, xml_path, simulated=simulated and way in WAYS and WAYS[way].simulated):
            size = onnx_path.stat().st_size if form.startswith("onnx") else _ir_bytes(xml_path)
            rows.append(_row(way, form, score_masks(load(), images, record), size))
    if nncf:
        _quantize_with_nncf(float_path, work / "nncf.xml", [images.read(item) for item in ids])
        predict = load_openvino(work / "nncf.xml")
        rows.append(_row(NNCF, "openvino real", score_masks(predict, images, record), _ir_bytes(work / "nncf.xml")))
        timed = tuple(way for way in ("carry", NNCF) if way in (*wanted, NNCF))
        latencies = _time_in_turns([load_openvino(work / f"{way}.xml") for way in timed], images)
        for way, latency_ms in zip(timed, latencies, strict=True):
            next(row for row in rows if (row["way"], row["form"]) == (way, "openvino real"))["ms"] = latency_ms
    return rows


def _row(way: str, form: str, scores: tuple[float | None, float | None], size_bytes: int) -> Row:
    return {"way": way, "form": form, "old": scores[0], "new": scores[1], "bytes": size_bytes}


def _ir_bytes(xml_path: Path) -> int:
    return xml_path.stat().st_size + xml_path.with_suffix(".bin").stat().st_size


def _quantize_with_nncf(float_path: Path, xml_path: Path, inputs_HWC: Sequence[NDArray[np.uint8]]) -> None:
    import nncf

    model = openvino_core().read_model(float_path)
    quantized = nncf.quantize(model, nncf.Dataset(inputs_HWC, lambda item: {"image": item[np.newaxis]}))
    import_openvino().save_model(quantized, xml_path, compress_to_fp16=False)
    openvino_core().compile_model(quantized, "CPU", OPENVINO_SETTINGS)


def _time_in_turns(predicts: Sequence[Predict], images: Images) -> list[float]:
    """Median ms of each, the models taking turns."""
    image_NHWC = images.evaluation[0][0][np.newaxis]
    times: list[list[float]] = [[] for _ in predicts]
    for run in range(TIMED_RUNS + 1):
        for predict, kept in zip(predicts, times, strict=True):
            start_ns = time.perf_counter_ns()
            predict(image_NHWC)
            if run:
                kept.append((time.perf_counter_ns() - start_ns) / 1e6)
    return [float(np.median(kept)) for kept in times]


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--methods", default="freeze+kd-output,kd-output", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--way", "ways", multiple=True, type=click.Choice((WEIGHTS_ONLY, *WAYS)), help="Again for more. [all]")
@click.option("--calibration-images", default=96, show_default=True)
@click.option("--simulated/--real-only", default=True, show_default=True, help="Of the last step.")
@click.option("--all-steps/--last-step", default=True, show_default=True, help="Score every step, or the last alone.")
@click.option("--nncf", is_flag=True, help="NNCF's quantization, too; of the last step.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
def main(
    run: Path,
    methods: str,
    seeds: str,
    ways: tuple[str, ...],
    calibration_images: int,
    simulated: bool,
    all_steps: bool,
    nncf: bool,
    out: Path,
) -> None:
    plan = read_plan(run)
    images = Images(
        open_data(plan.data), str(plan.data.eval_split), plan.model.input_height_px, plan.model.input_width_px
    )
    last = len(plan.classes) - 1
    ways = ways or (WEIGHTS_ONLY, *WAYS)
    rows: list[Row] = []
    for seed in map(int, seeds.split(",")):
        workspace = open_workspace(seed_folder(run, seed))
        base = workspace.read_step("00-base")
        base_ids = images.choose(base, calibration_images)
        for method in methods.split(","):
            kept: dict[str, tuple[Ranges, Mapping[str, bytes]]] = {}
            for index in range(last + 1):
                record = base if index == 0 else workspace.read_step(f"{index:02}-{method}")
                ids = images.choose(record, calibration_images)
                is_last, is_scored = index == last, index == last or (all_steps and index > 0)
                wanted = [
                    way
                    for way, item in WAYS.items()
                    if way in ways and (is_last or item.policy != NEW_ONLY or (is_scored and item.each_step))
                ]
                found: list[Row] = []
                with tempfile.TemporaryDirectory() as folder:
                    work = Path(folder)
                    write_float_onnx(load_model(workspace.step_folder(record.name), record), work / "float.onnx")
                    quantize_step(work, record, images, base_ids, kept, ids, wanted)
                    if is_scored:
                        if is_last and WEIGHTS_ONLY in ways:
                            wanted.insert(0, WEIGHTS_ONLY)
                        found = score_step(
                            work, record, images, ids, wanted, is_last=is_last, simulated=simulated, nncf=nncf
                        )
                rows += [{"seed": seed, "method": method, "step": index, **row} for row in found]
                click.echo(f"seed {seed} {method} step {index}: {len(found)} rows", err=True)
            write_rows(out, plan, rows)
    click.echo(table(rows, last))


def write_rows(out: Path, plan: ScenarioPlan, rows: Sequence[Row]) -> None:
    """What is known so far, after each chain: a run that is stopped loses one at most."""
    facts = read_device_facts()
    result = {
        "scenario": plan.scenario,
        "backbone": plan.model.backbone,
        "processor": facts.processor,
        "int8_flags": facts.int8_flags,
        "rows": list(rows),
    }
    out.write_text(json.dumps(result, indent=1) + "\n")


def table(rows: Sequence[Row], last: int) -> str:
    """The last step as Markdown: old and new mIoU, mean +- deviation over seeds, and the drop of old against fp32."""
    lines = ["| method | ranges | form | old | new | old less fp32 | worst seed |", "|---|---|---|---:|---:|---:|---:|"]
    final = [row for row in rows if row["step"] == last]
    fp32 = {(row["method"], row["seed"]): row for row in final if row["way"] == "fp32"}
    for method, way, form in dict.fromkeys((row["method"], row["way"], row["form"]) for row in final):
        same = [row for row in final if (row["method"], row["way"], row["form"]) == (method, way, form)]
        gains = [row["old"] - fp32[row["method"], row["seed"]]["old"] for row in same]
        cells = (_spread([row["old"] for row in same]), _spread([row["new"] for row in same]))
        lines.append(
            f"| {method} | {way} | {form} | {cells[0]} | {cells[1]} | {np.mean(gains):+.2f} | {min(gains):+.2f} |"
        )
    return "\n".join(lines)


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{np.mean(known):.1f}" + (f" ± {np.std(known, ddof=1):.1f}" if len(known) > 1 else "")


if __name__ == "__main__":
    main()
